"""A site's part in the comparisons in which parameters travel instead of images: federated averaging, and networks trained alone.

A network is named "model@rate@seed" in messages: its architecture, its learning rate, and the seed that it began with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.evaluation.fit import fit, of_split
from fedistill.experts.train import Task, sgd
from fedistill.files import read_tensors, write_tensors
from fedistill.memory import one_thread
from fedistill.models.flat import device_of
from fedistill.privacy.dpsgd import PrivateSGD
from fedistill.privacy.learn import counts_file, pay, private_weights, store_plan
from fedistill.privacy.ledger import Cap
from fedistill.privacy.once import drop, may_have_been_used, use
from fedistill.privacy.plan import plan_of_steps, records_of
from fedistill.processes import alone
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.site.folder import ledger_file, make_site_folder


@dataclass(frozen=True)
class Local:
    """What a site answers in a round: the parameters `(P,)` of each network, and how many records taught them."""

    thetas: dict[str, Tensor]
    records: int


def name_of(model: str, rate: float, seed: int) -> str:
    return f"{model}@{rate!r}@{seed}"


@one_thread()
def train_round(
    config: Config,
    data: Dataset,
    site: str,
    work: Path,
    *,
    round: int,
    thetas: Mapping[str, Tensor],
    mu: float = 0.0,
    run: str = "",
    cap: Cap | None = None,
) -> Local:
    """`config.fl_steps` SGD steps on the site's training images from each of the global parameters `(P,)`.

    mu: weight of the proximal term mu/2 |theta - theta_global|^2 (FedProx, Li et al., MLSys 2020, eq. 2).
    run: a word for the federated run, whose rounds have one plan. cap: the most that may ever be spent on the site's records.
    Asked again, it answers the same. Raises `FedistillError` on a round that is not one of `config.fl_rounds`, on parameters
    that do not fit, and in private work on all that the plan does not cover: a second network, or a round that was answered
    for other parameters.

    *Formal guarantee* of privacy=dp: the answers to all rounds together have the epsilon of `plan_of_steps`, whatever
    parameters are sent, as long as the site keeps them: what is lost is paid for, and answered, anew. The number of records is
    declared public.
    """
    if not 1 <= round <= config.fl_rounds:
        raise FedistillError("no-round", f"There is no round {round}: fl_rounds={config.fl_rounds}.")
    task = task_of(data)
    for name, theta in thetas.items():
        _check(config, task, name, theta)
    if config.privacy == "dp":
        if mu:
            raise FedistillError("not-private", "FedProx is compared without privacy only: leave it out of compare.")
        return _private_round(config, task, data, site, work, round, thetas, run, cap)
    answers = {}
    for name, theta in thetas.items():
        model, rate, _ = _read(name)
        rng = generator(config.seed, "average", site, name, round)
        step, start = sgd(config, task, task.network(model, config), data.train, rate, rng), _on_device(config, theta)
        theta = start
        for _ in range(config.fl_steps):
            theta = step(theta) - rate * mu * (theta - start)
        answers[name] = theta.cpu()
    return Local(answers, len(data.train))


@one_thread()
def train_alone(
    config: Config, data: Dataset, site: str, work: Path, *, names: Sequence[str], run: str = "", cap: Cap | None = None
) -> Local:
    """One network for each of `names` as other arms train theirs (`evaluation.fit`), from parameters that all sites begin with.

    In private work one network of `config.expert_steps` steps, under the same guarantee as a round of averaging.
    """
    task = task_of(data)
    if config.privacy == "dp":
        start = {}
        for name in names:
            model, _, seed = _read(name)
            start[name] = task.network(model, config).initial(generator(seed, "global", model))
        once = dataclasses.replace(config, fl_rounds=1, fl_steps=config.expert_steps)
        return train_round(once, data, site, work, round=1, thetas=start, run=f"{run}-alone", cap=cap)
    answers = {}
    for name in names:
        model, rate, seed = _read(name)
        answers[name] = fit(config, task, model, of_split(data.train, task), lr=rate, seed=seed)
    return Local(answers, len(data.train))


def _private_round(
    config: Config,
    task: Task,
    data: Dataset,
    site: str,
    work: Path,
    round: int,
    thetas: Mapping[str, Tensor],
    run: str,
    cap: Cap | None,
) -> Local:
    """The answer to a round is stored and never made twice: two answers with two noises would be more than was paid for.

    Where one is gone that was given, or the counts that the rounds share, all that this plan paid for is dropped, and rounds are
    answered from then on under another plan, which costs once more.
    """
    if len(thetas) != 1:
        raise FedistillError("many-networks", f"The plan pays for one network, and the server sent {len(thetas)}.")
    ((name, theta),) = thetas.items()
    model, rate, _ = _read(name)
    asked = hashlib.sha256(name.encode() + theta.cpu().numpy().tobytes()).hexdigest()
    key = f"{data.fingerprint_by(config.unit)}-{config.key('data', 'experts', 'eval')}-{quote(run, safe='')}"
    folder = make_site_folder(work, site) / f"average-{key}"
    file = folder / f"round-{round}.safetensors"
    plan_file, counts = folder / "plan.json", counts_file(folder)
    with alone(folder, wait=True):
        if not file.exists():
            if any(may_have_been_used(plan_file, result) and not result.exists() for result in (file, counts)):
                drop(plan_file, [counts, *folder.glob("round-*.safetensors")])
            records = records_of(data.train, config.unit)
            if not plan_file.exists():
                store_plan(plan_file, plan_of_steps(config, records, config.fl_rounds * config.fl_steps))
            plan = pay(plan_file, ledger_file(work, site), what="averaging", site=site, cap=cap)
            weights = private_weights(config, task, data.train, folder, plan["counts"])
            private = dataclasses.replace(config, dp_lr=rate)
            steps = PrivateSGD(private, task, model, _on_device(config, theta), plan["dp-sgd"], data.train, weights)
            for _ in range(config.fl_steps):
                steps.step()
            write_tensors(file, {"theta": steps.theta()}, {"asked": asked, "records": records})
        use(plan_file, counts, file)
    parts, about = read_tensors(file)
    if about["asked"] != asked:
        raise FedistillError(
            "other-round", f"Round {round} was answered before, for other parameters: it is paid for once."
        )
    return Local({name: parts["theta"]}, int(about["records"]))


def _read(name: str) -> tuple[str, float, int]:
    """Architecture, learning rate and seed of a network. Raises `FedistillError` on what `name_of` cannot have written."""
    try:
        model, rate, seed = name.split("@")
        if 0 < float(rate) < math.inf:
            return model, float(rate), int(seed)
    except ValueError:
        pass
    raise FedistillError("bad-model", "A network of the server has no name of the form model@rate@seed.")


def _check(config: Config, task: Task, name: str, theta: Tensor) -> None:
    model, _, _ = _read(name)
    size = task.network(model, config).size
    if theta.dtype != torch.float32 or theta.shape != (size,) or not torch.isfinite(theta).all():
        raise FedistillError("bad-model", f"The global model does not fit: {model} has {size} finite parameters.")


def _on_device(config: Config, theta: Tensor) -> Tensor:
    return theta.to(device_of(config.device))
