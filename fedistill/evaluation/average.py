"""Federated averaging (McMahan et al., AISTATS 2017), also with FedProx's proximal term, under the protocol of all others
(`evaluation.fit`).

    theta <- sum_i n_i theta_i / sum_i n_i

theta_i: what `fl_steps` SGD steps of site i make of theta; n_i: its records. The average is taken here, and not by the strategy
that Flower has for it, so that it is the same without Flower; and that strategy writes error texts of sites into its log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config, listed
from fedistill.data.dataset import Dataset
from fedistill.data.partition import Partition
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures, figures_beside
from fedistill.evaluation.fit import Result, choose_and_test
from fedistill.experts.train import Task
from fedistill.files import read_tensors, write_tensors
from fedistill.seeding import generator
from fedistill.site.average import Local, name_of, train_round
from fedistill.site.describe import task_of

# Ten times those of other arms (`fit.LEARNING_RATES`): there is no momentum of 0.9 here.
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
EARLY = 0.1  # of all rounds: until then no learning rate is given up

Ask = Callable[[int, dict[str, Tensor]], Mapping[str, Local]]  # round, global parameters -> the answer of each site


def averaged_models(config: Config) -> list[str]:
    """The architectures that are averaged: in private work only the headline's, since every network costs noise."""
    return architectures(config)[:1] if config.privacy == "dp" else architectures(config)


def rates_of(config: Config) -> tuple[float, ...]:
    """The learning rates that are tried: a public one in private work, where every try would have to be paid for."""
    if config.fl_lr:
        return (config.fl_lr,)
    return (config.dp_lr,) if config.privacy == "dp" else RATES


def nets_of(config: Config) -> int:
    """Networks of an arm that sites train: in private work one, since every network costs noise."""
    return 1 if config.privacy == "dp" else config.eval_nets


def going_on(config: Config, rounds: int, rates: int) -> int:
    """How many of so many learning rates go on after a round that is shown."""
    return -(-rates // 2) if rounds >= EARLY * config.fl_rounds else rates


def shown_rounds(config: Config) -> list[int]:
    """The rounds after which the networks are judged, the last one last.

    Raises `FedistillError` on a round that there is not, and in private work, where the noise is for all rounds together.
    """
    try:
        earlier = sorted(set(map(int, listed(config.fl_shown))))
    except ValueError:
        raise FedistillError("bad-value", f"fl_shown={config.fl_shown} is no list of rounds such as 1,10.") from None
    if earlier and not 0 < earlier[0] <= earlier[-1] < config.fl_rounds:
        raise FedistillError(
            "bad-value",
            f"fl_shown={config.fl_shown}: earlier rounds than the last of fl_rounds={config.fl_rounds} are shown.",
        )
    if earlier and config.privacy == "dp":
        raise FedistillError(
            "not-private",
            f"fl_shown={config.fl_shown}: with privacy=dp the noise is for all fl_rounds, and fewer would need less of it; "
            "run them by themselves.",
        )
    return [*earlier, config.fl_rounds]


def fedavg(config: Config, data: Dataset, parts: Partition, folder: Path) -> dict[str, Any]:
    """Figures of the arm with the first of `config.eval_models`; otherwise as `average_sites`."""
    result, upload = average_sites(config, data, [parts.at(data, place) for place in range(len(parts))], folder)
    return figures_beside(result, images=None, upload=upload, rounds=config.fl_rounds)


def average_sites(config: Config, data: Dataset, sites: Sequence[Dataset], folder: Path) -> tuple[Result, int]:
    """The arm with the first of `config.eval_models`, and the bytes that `sites` sent: they take turns in this process.

    folder: of this configuration and partition; it has the sites' ledgers, and what goes on after a stop. Raises
    `FedistillError` as `site.average.train_round` does.
    """

    def ask(round: int, thetas: dict[str, Tensor]) -> dict[str, Local]:
        return {
            site.name: train_round(config, site, site.name, folder / "work", round=round, thetas=thetas)
            for site in sites
        }

    return averaged(config, data, architectures(config)[0], ask, folder / "rounds", config.fl_rounds, rates_of(config))


def evaluate_average(
    config: Config, data: Dataset, model: str, ask: Ask, folder: Path, arm: str
) -> dict[str, dict[str, Any]]:
    """Figures of `arm`, as `arms.evaluate_arms` has them of others, and of `arm-R` after each earlier round R that is shown.

    After each of these the better half of the learning rates goes on (successive halving, Jamieson and Talwalkar, AISTATS 2016),
    but for the very first rounds, which say little of the last.
    """
    figures, rates = {}, rates_of(config)
    for rounds in shown_rounds(config):
        name = arm if rounds == config.fl_rounds else f"{arm}-{rounds}"
        result, upload = averaged(config, data, model, ask, folder, rounds, rates)
        figures[name] = figures_beside(result, images=None, upload=upload, rounds=rounds)
        rates = result.rates[: going_on(config, rounds, len(rates))]
    return figures


def averaged(
    config: Config, data: Dataset, model: str, ask: Ask, folder: Path, rounds: int, rates: Sequence[float]
) -> tuple[Result, int]:
    """The arm with one architecture after so many rounds, and bytes; finished rounds are kept in `folder` and not asked for again.

    The networks begin where those of other arms begin. The bytes are what the sites sent for one network, over all rounds; what
    the other learning rates and the repetitions took is not in it, as it is in no other arm's.
    """
    task, sent = task_of(data), []

    def train(todo: Sequence[tuple[float, int]]) -> list[Tensor]:
        thetas, uploads = run_rounds(_initial(config, task, model, todo), ask, folder, rounds)
        sent.append(uploads)
        return thetas

    result = choose_and_test(config, task, model, train, data.val, data.test, rates=rates, nets=nets_of(config))
    return result, sent[0][rates.index(result.learning_rate)]


def path_of(config: Config, task: Task, model: str, folder: Path, rate: float) -> Tensor:
    """The global parameters `(R+1, P)` before the first and after each round that `averaged` left in `folder`, of the first network
    at `rate`. Raises `FedistillError` ("diverged") where it did not last."""
    ((name, theta),) = _initial(config, task, model, [(rate, config.seed)]).items()
    files = [_round_file(folder, name, round) for round in range(1, config.fl_rounds + 1)]
    if not files[-1].exists():
        raise FedistillError(
            "diverged", f"federated averaging of {model} diverged at every learning rate that was tried"
        )
    return torch.stack([theta, *(read_tensors(file)[0]["theta"] for file in files)])


def run_rounds(start: Mapping[str, Tensor], ask: Ask, folder: Path, rounds: int) -> tuple[list[Tensor], list[int]]:
    """So many rounds from the parameters `start` `(P,)` of each network: its last ones, and the bytes that the sites sent of it.

    A network that diverged is not asked about again.
    """
    thetas, sent = dict(start), dict.fromkeys(start, 0)
    for round in range(1, rounds + 1):
        files = {n: _round_file(folder, n, round) for n, theta in thetas.items() if torch.isfinite(theta).all()}
        if new := {name: thetas[name] for name, file in files.items() if not file.exists()}:
            answers = list(ask(round, new).values())
            for name, theta in mean_of(answers).items():
                write_tensors(files[name], {"theta": theta}, {"answers": len(answers)})
        for name, file in files.items():
            found, about = read_tensors(file)
            thetas[name] = found["theta"]
            sent[name] += about["answers"] * thetas[name].numel() * thetas[name].element_size()
    return list(thetas.values()), list(sent.values())


def _round_file(folder: Path, name: str, round: int) -> Path:
    return folder / name / f"round-{round}.safetensors"


def mean_of(answers: Sequence[Local]) -> dict[str, Tensor]:
    """The mean of each network's parameters, weighted by records; every answer has the same networks."""
    total = sum(answer.records for answer in answers)
    return {
        name: sum((answer.records / total * answer.thetas[name] for answer in answers), torch.zeros(()))
        for name in answers[0].thetas
    }


def _initial(config: Config, task: Task, model: str, todo: Sequence[tuple[float, int]]) -> dict[str, Tensor]:
    net = task.network(model, config)
    return {name_of(model, rate, seed): net.initial(generator(seed, "global", model)) for rate, seed in todo}
