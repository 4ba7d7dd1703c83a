"""Federated averaging as an arm, in one process: the arithmetic, resume, and the protocol that it shares with other arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.errors import FedistillError
from fedistill.evaluation.average import (
    RATES,
    average_sites,
    evaluate_average,
    fedavg,
    mean_of,
    path_of,
    rates_of,
    run_rounds,
    shown_rounds,
)
from fedistill.evaluation.fit import choose_and_test, predict
from fedistill.evaluation.metrics import score
from fedistill.files import read_json
from fedistill.seeding import generator
from fedistill.site.average import Local, name_of, train_round
from fedistill.site.describe import task_of


def settings(**more: Any) -> Config:
    tiny = {
        "partition": "iid", "sites": 2, "width": 4, "expert_batch": 16, "eval_models": "mlp", "fl_rounds": 2, "fl_steps": 3,
        "workers": 1, "eval_nets": 2,
    }  # fmt: skip
    return make_config(tiny | more).resolved()


def test_the_average_is_that_of_flower() -> None:
    answers = [Local({"a": torch.randn(7), "b": torch.randn(3)}, n) for n in (5, 40, 1)]
    records = [
        RecordDict({
            "arrays": ArrayRecord({k: Array(theta.numpy()) for k, theta in answer.thetas.items()}),
            "metrics": MetricRecord({"num-examples": answer.records}),
        })
        for answer in answers
    ]  # fmt: skip
    theirs = aggregate_arrayrecords(records, "num-examples")
    for name, mine in mean_of(answers).items():
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, torch.from_numpy(theirs[name].numpy()))


def test_one_site_and_one_round_are_local_training(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(sites=1, fl_rounds=1, fl_lr=0.1, fl_steps=8, eval_nets=1)
    parts, task = partition(tiny, config), task_of(tiny)
    figures = fedavg(config, tiny, parts, tmp_path)
    net = task.network("mlp", config)
    start = {name_of("mlp", 0.1, 0): net.initial(generator(0, "global", "mlp"))}
    site = parts.at(tiny, 0)
    (theta,) = train_round(config, site, site.name, tmp_path, round=1, thetas=start).thetas.values()
    want = score(predict(net, theta, tiny.test.images, task), tiny.test.labels)
    assert figures["balanced_accuracy"]["mean"] == want["balanced_accuracy"]
    assert figures["auc"]["mean"] == want["auc"]
    assert (figures["images"], figures["upload_bytes"], figures["learning_rate"]) == (None, 4 * net.size, [0.1])


def test_several_networks_share_a_chosen_rate_and_an_upload_is_that_of_one(tiny: Dataset, tmp_path: Path) -> None:
    config = settings()
    figures = fedavg(config, tiny, partition(tiny, config), tmp_path)
    size = task_of(tiny).network("mlp", config).size
    assert figures["learning_rate"][0] in RATES
    assert figures["balanced_accuracy"]["std"] is not None
    assert figures["upload_bytes"] == 2 * 2 * 4 * size  # two sites, two rounds
    rounds = sorted(tmp_path.rglob("round-*.safetensors"))
    before = [p.stat().st_mtime_ns for p in rounds]
    again = fedavg(config, tiny, partition(tiny, config), tmp_path)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in figures.items() if k != "seconds"}
    assert [p.stat().st_mtime_ns for p in rounds] == before


def test_an_earlier_round_is_what_fewer_rounds_would_have_been(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(fl_rounds=3, fl_shown="2, 1", fl_lr=0.1, eval_nets=1)
    parts, asked = partition(tiny, config), []

    def ask(round: int, thetas: Mapping[str, Tensor]) -> dict[str, Local]:
        asked.append(round)
        sites = [parts.at(tiny, place) for place in range(2)]
        return {s.name: train_round(config, s, s.name, tmp_path, round=round, thetas=thetas) for s in sites}

    figures = evaluate_average(config, tiny, "mlp", ask, tmp_path / "a", "fedavg")
    assert list(figures) == ["fedavg-1", "fedavg-2", "fedavg"]
    assert asked == [1, 2, 3]
    for rounds in (1, 2):
        alone = fedavg(settings(fl_rounds=rounds, fl_lr=0.1, eval_nets=1), tiny, parts, tmp_path / str(rounds))
        shown = figures[f"fedavg-{rounds}"]
        assert {k: v for k, v in shown.items() if k != "seconds"} == {k: v for k, v in alone.items() if k != "seconds"}
    assert [f["upload_bytes"] / figures["fedavg-1"]["upload_bytes"] for f in figures.values()] == [1, 2, 3]


def test_the_better_half_of_the_rates_goes_on(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(fl_rounds=12, fl_shown="1,2,3", fl_steps=1, eval_nets=1)
    parts, asked = partition(tiny, config), []

    def ask(round: int, thetas: Mapping[str, Tensor]) -> dict[str, Local]:
        asked.append([float(name.split("@")[1]) for name in thetas])
        sites = [parts.at(tiny, place) for place in range(2)]
        return {s.name: train_round(config, s, s.name, tmp_path, round=round, thetas=thetas) for s in sites}

    figures = evaluate_average(config, tiny, "mlp", ask, tmp_path / "a", "fedavg")
    assert [len(rates) for rates in asked] == [5, 5, 3, *[2] * 9]  # not after the first round: it says little
    assert set(asked[3]) < set(asked[2]) < set(RATES)
    assert figures["fedavg-2"]["learning_rate"][0] in asked[2]
    assert figures["fedavg-3"]["learning_rate"][0] in asked[3]


def test_a_network_that_diverged_is_chosen_only_where_all_did(tiny: Dataset) -> None:
    """One that is surely wrong on every image is better than none."""
    config, task = settings(eval_nets=1), task_of(tiny)
    net = task.network("mlp", config)
    wrong = net.initial(generator(0, "wrong"))

    def train(todo: Sequence[tuple[float, int]]) -> list[Tensor]:
        return [wrong if rate == 0.1 else wrong * float("nan") for rate, _ in todo]

    def answer(net: Any, theta: Tensor, images: Tensor, task: Any) -> Tensor:
        labels = tiny.val.labels if len(images) == len(tiny.val) else tiny.test.labels
        one = torch.nn.functional.one_hot((labels + 1) % 3, 3).float()
        return one if torch.isfinite(theta).all() else torch.full((len(images), 3), 1 / 3)

    judged = partial(choose_and_test, config, task, "mlp", train, tiny.val, tiny.test, nets=1, answer=answer)
    assert judged(rates=(0.01, 0.1)).learning_rate == 0.1
    assert judged(rates=(0.01, 0.02)).learning_rate == 0.01


def test_the_way_of_the_global_network_begins_and_ends_where_it_did(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(eval_nets=1)
    parts, task = partition(tiny, config), task_of(tiny)
    sites = [parts.at(tiny, place) for place in range(2)]
    result, _ = average_sites(config, tiny, sites, tmp_path)
    path = path_of(config, task, "mlp", tmp_path / "rounds", result.learning_rate)
    assert path.shape == (3, task.network("mlp", config).size)
    assert torch.equal(path[0], task.network("mlp", config).initial(generator(0, "global", "mlp")))
    assert torch.equal(path[-1], result.thetas[0])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"fl_shown": "one"}, "no list of rounds"),
        ({"fl_shown": "2"}, "earlier rounds than the last"),
        ({"fl_shown": "0"}, "earlier rounds than the last"),
        ({"fl_shown": "1", "privacy": "dp", "epsilon": 5.0, "method": "sketch"}, "the noise is for all fl_rounds"),
    ],
)
def test_rounds_that_cannot_be_shown(more: dict[str, Any], words: str) -> None:
    with pytest.raises(FedistillError, match=words):
        shown_rounds(settings(**more))


def test_private_averaging_trains_one_network_at_one_public_rate(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(privacy="dp", epsilon=5.0, method="sketch", dp_lr=0.25)
    assert rates_of(config) == (0.25,)
    figures = fedavg(config, tiny, partition(tiny, config), tmp_path)
    assert figures["learning_rate"] == [0.25]
    assert figures["balanced_accuracy"]["std"] is None
    plans = [read_json(p) for p in tmp_path.rglob("plan.json")]
    assert [m["steps"] for plan in plans for m in plan["mechanisms"] if m["name"] == "dp-sgd"] == [6, 6]
    assert all(plan["first"]["epsilon"] <= 5.0 for plan in plans)


def test_a_network_that_diverged_is_not_asked_about_again(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def ask(round: int, thetas: Mapping[str, Tensor]) -> dict[str, Local]:
        asked.append(list(thetas))
        return {"north": Local({name: theta / (0 if name == "bad" else 1) for name, theta in thetas.items()}, 1)}

    start = {"good": torch.ones(2), "bad": torch.ones(2)}
    thetas, sent = run_rounds(start, ask, tmp_path, 2)
    assert asked == [["good", "bad"], ["good"]]
    assert torch.equal(thetas[0], torch.ones(2))
    assert not torch.isfinite(thetas[1]).any()
    assert sent == [16, 8]


def test_rounds_go_on_where_they_stopped(tmp_path: Path) -> None:
    def ask(round: int, thetas: Mapping[str, Tensor]) -> dict[str, Local]:
        if round == broken:
            raise KeyboardInterrupt
        return {site: Local({k: theta + round for k, theta in thetas.items()}, 1) for site in ("north", "south")}

    broken = 2
    with pytest.raises(KeyboardInterrupt):
        run_rounds({"a": torch.zeros(2)}, ask, tmp_path, 3)
    broken = 1  # which is not asked for again
    (theta,), (sent,) = run_rounds({"a": torch.zeros(2)}, ask, tmp_path, 3)
    assert theta.tolist() == [6, 6]
    assert sent == 3 * 2 * 8
