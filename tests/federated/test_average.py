"""Federated averaging through the app: an arm beside the others, sites that fail, resume, and what a real site refuses."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill.config import Config
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.average import fedavg
from fedistill.files import read_json, read_tensors
from fedistill.report.tables import guarantee
from fedistill.seeding import generator
from fedistill.site.average import name_of
from fedistill.site.describe import task_of
from server import collect
from server.replies import read_local

TINY = Config(
    partition="iid", sites=3, phantom_images=90, phantom_classes=2, phantom_size=16, width=8, depth=2, method="random",
    expert_batch=16, ipc=1, eval_nets=1, eval_steps=5, eval_models="mlp", deadline=60.0, fl_rounds=2, fl_steps=2,
).resolved()  # fmt: skip
Break = Callable[[str, int, int], float | None]


def run(
    out: Path,
    break_with: Break = lambda kind, node, before: None,
    nodes: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> LocalGrid:
    grid = LocalGrid(client_app, nodes or [{"partition-id": i} for i in range(3)], break_with)
    config = dataclasses.replace(TINY, out=str(out), **changes)
    serve(grid, config)
    return grid


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out)
    return out


def test_the_arm_is_beside_the_others_and_the_same_without_flower(finished: Path, tmp_path: Path) -> None:
    arms = read_json(finished / "seed-0/arms.json")["mlp"]
    assert set(arms) == {"distilled", "random_real", "local_only", "centralised", "fedavg"}
    data = load_data(TINY)
    alone = fedavg(TINY, data, partition(data, TINY), tmp_path)
    assert {k: v for k, v in arms["fedavg"].items() if k != "seconds"} == {
        k: v for k, v in alone.items() if k != "seconds"
    }
    summary = read_json(finished / "summary.json")
    assert summary["arms"]["fedavg"]["upload_bytes"] == alone["upload_bytes"] > 0
    assert summary["arms"]["fedavg"]["images"] is None
    row = next(line for line in (finished / "results.md").read_text().splitlines() if "Federated averaging" in line)
    assert " - " in row
    assert "n/a" not in row
    page = (finished / "report.html").read_text()
    assert "Federated averaging" in page
    assert "averaging, where their parameters are what travels. Results" in page
    assert "for one network, over 2 rounds." in page


def test_all_comparators_are_arms_and_are_not_done_twice(tmp_path: Path) -> None:
    more = {
        "method": "dm",
        "iterations": 3,
        "compare": "all",
        "fl_rounds": 4,
        "fl_shown": "1",
        "fl_mu": 30.0,
        "segment": 2,
        "syn_steps": 2,
    }
    grid = run(tmp_path / "run", **more)
    arms = read_json(tmp_path / "run/seed-0/arms.json")["mlp"]
    assert set(arms) == {
        "distilled", "random_real", "local_only", "centralised", "fedavg-1", "fedavg", "fedprox-1", "fedprox", "ensemble",
        "one-shot", "ensemble-distilled", "fedavg-distilled", "central-distilled",
    }  # fmt: skip
    assert (grid.count("train.fedavg"), grid.count("train.alone")) == (2 * 4 * 3, 3)
    averaged, proximal = ({k: v for k, v in arms[name].items() if k != "seconds"} for name in ("fedavg", "fedprox"))
    assert averaged != proximal
    assert arms["central-distilled"]["images"] == arms["distilled"]["images"] == arms["fedavg-distilled"]["images"]
    text = (tmp_path / "run/results.md").read_text()
    assert "Federated averaging, 1 round |" in text
    assert "Ensemble, distilled on phantoms" in text
    for name in ("arms.json", "federated.json"):
        (tmp_path / "run/seed-0" / name).unlink()
    again = run(tmp_path / "run", **more)
    assert again.count("train.fedavg") == again.count("train.alone") == 0
    assert read_json(tmp_path / "run/seed-0/arms.json")["mlp"].keys() == arms.keys()


def test_private_networks_that_sites_train_alone_are_arms_too(tmp_path: Path) -> None:
    private = {
        "privacy": "dp",
        "epsilon": 8.0,
        "method": "sketch",
        "iterations": 2,
        "sketch_networks": 1,
        "expert_steps": 3,
    }
    changes = private | {"phantom_images": 180, "sketch_frequencies": 16, "class_weights": False}
    grid = run(tmp_path / "run", compare="ensemble,one-shot", fl_rounds=0, **changes)
    assert grid.count("train.alone") == 3
    assert set(read_json(tmp_path / "run/seed-0/arms.json")["mlp"]) >= {"dp-ensemble", "dp-one-shot"}
    assert "Private ensemble of local networks" in (tmp_path / "run/results.md").read_text()
    assert "the networks that sites trained alone" in guarantee(read_json(tmp_path / "run/summary.json"))


class FlowersGrid(LocalGrid):
    """A grid for Flower's own strategies: their messages, under the names of this app, and its answers, under theirs."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = []
        for message in messages:
            content = message.content
            content["job"] = ConfigRecord({**content["job"], "round": content["job"]["server-round"]})
            asked.append(Message(content, dst_node_id=message.metadata.dst_node_id, message_type="train.fedavg"))
        replies = [self.wait_for(identity) for identity in self.push_messages(asked)]
        for reply in replies:
            records = int(reply.content["reply"]["json"])
            reply.content = RecordDict(
                {"models": reply.content["models"], "m": MetricRecord({"num-examples": records})}
            )
        return replies


@pytest.mark.parametrize("arm", ["fedavg", "fedprox"])
def test_the_arm_ends_where_flowers_own_strategy_does(tmp_path: Path, arm: str) -> None:
    """Sites of unequal size, three rounds of FedAvg and FedProx as Flower has them, and of the same app's own."""
    more = {"partition": "quantity", "fl_rounds": 3, "fl_lr": 0.1, "fl_mu": 2.0, "compare": "fedprox"}
    run(tmp_path / "run", **more)
    files = sorted((tmp_path / "run/seed-0/compare/mlp" / arm).rglob("round-*.safetensors"))
    assert [file.name for file in files] == [f"round-{i}.safetensors" for i in (1, 2, 3)]
    name, mine = files[0].parent.name, read_tensors(files[2])[0]["theta"]

    config = dataclasses.replace(TINY, out=str(tmp_path / "theirs"), work=str(tmp_path / "work"), **more)
    grid = FlowersGrid(client_app, [{"partition-id": i} for i in range(3)])
    keys = {"arrayrecord_key": "models", "configrecord_key": "job", "fraction_evaluate": 0.0}
    strategy = FedAvg(**keys) if arm == "fedavg" else FedProx(**keys, proximal_mu=config.fl_mu)
    start = task_of(load_data(config)).network("mlp", config).initial(generator(config.seed, "global", "mlp"))
    job = collect.job(config, run="theirs")["job"]
    theirs = strategy.start(grid, ArrayRecord({name: Array(start.numpy())}), num_rounds=3, train_config=job).arrays
    torch.testing.assert_close(mine, torch.from_numpy(theirs[name].numpy()))
    assert not torch.allclose(mine, start)


def test_finished_rounds_are_not_asked_for_again(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = read_json(out / "seed-0/arms.json")
    for name in ("arms.json", "federated.json"):
        (out / "seed-0" / name).unlink()
    next((out / "seed-0").rglob("compare/**/round-2.safetensors")).unlink()
    (out / "seed-0/compare/fedavg-mlp.json").unlink()
    grid = run(out)
    assert [grid.count("train.fedavg", i) for i in range(3)] == [1, 1, 1]
    after = read_json(out / "seed-0/arms.json")
    before["mlp"]["fedavg"].pop("seconds"), after["mlp"]["fedavg"].pop("seconds")
    assert after["mlp"]["fedavg"] == before["mlp"]["fedavg"]


def test_a_failing_site_is_left_out_of_its_round(tmp_path: Path) -> None:
    grid = run(
        tmp_path / "run", lambda kind, node, before: 2 if (kind, node, before) == ("train.fedavg", 1, 0) else None
    )
    assert [grid.count("train.fedavg", i) for i in range(3)] == [2, 2, 2]
    arms = read_json(tmp_path / "run/seed-0/arms.json")["mlp"]
    data = load_data(TINY)
    size = fedavg(TINY, data, partition(data, TINY), tmp_path / "alone")["upload_bytes"] // 6
    assert arms["fedavg"]["upload_bytes"] == 5 * size
    with pytest.raises(FedistillError, match=r"1 site finished and 2 are needed\. site-2, site-3: its client app"):
        run(tmp_path / "few", lambda kind, node, before: 2 if kind == "train.fedavg" and node else None)


def test_private_rounds_are_paid_for_at_every_site_and_the_arm_says_so(tmp_path: Path) -> None:
    private = {"privacy": "dp", "epsilon": 8.0, "method": "sketch", "iterations": 2, "sketch_networks": 1}
    changes = private | {"phantom_images": 180, "sketch_frequencies": 16, "class_weights": False}
    grid = run(tmp_path / "run", **changes)
    assert grid.count("train.fedavg") == 6
    assert set(read_json(tmp_path / "run/seed-0/arms.json")["mlp"]) >= {"dp-fedavg", "distilled"}
    assert "Private federated averaging" in (tmp_path / "run/results.md").read_text()
    assert "another epsilon=" in guarantee(read_json(tmp_path / "run/summary.json"))
    assert len(list((tmp_path / "run/work").rglob("average-*/plan.json"))) == 3


def refusal(node: dict[str, Any], kind: str, content: RecordDict) -> str:
    """Why a real site answers to a message with nothing."""
    said: list[Any] = []
    failures = collect.converse(
        LocalGrid(client_app, [node]),
        kind,
        {100: content},
        lambda _, reply: said.append(read_local(reply, {})),
        lambda *_: None,
        deadline=30,
    )
    assert said == []
    return failures[100].reason


def test_a_real_site_sends_no_bare_parameters(tmp_path: Path) -> None:
    node = real_site("north", tmp_path / "disk")
    content = collect.with_arrays(collect.job(TINY, round=1, run="x"), "models", {name_of("mlp", 0.1, 0): np.zeros(3)})
    reason = refusal(node, "train.fedavg", content)
    assert reason == "privacy=none would send parameters as they are: no site does that."


def test_a_real_site_sends_no_networks_that_it_trains_alone(tmp_path: Path) -> None:
    content = collect.job(TINY, networks='["mlp@0.1@0"]', run="x")
    reason = refusal(real_site("north", tmp_path / "disk"), "train.alone", content)
    assert reason == "privacy=none would send parameters as they are: no site does that."


def test_a_real_site_takes_no_part_in_private_averaging(tmp_path: Path) -> None:
    """It would pay a whole epsilon for every word that a server calls the run by."""
    node = real_site("north", tmp_path / "disk")
    config = dataclasses.replace(TINY, privacy="dp", epsilon=8.0, method="sketch")
    content = collect.with_arrays(
        collect.job(config, round=1, run="x"), "models", {name_of("mlp", 0.1, 0): np.zeros(3, np.float32)}
    )
    assert "no real site takes part" in refusal(node, "train.fedavg", content)
    assert not (tmp_path / "disk").exists()


def test_averaging_needs_a_server_that_can_compare(tmp_path: Path) -> None:
    node = real_site("north", tmp_path / "disk")
    with pytest.raises(FedistillError, match="fl_rounds=2 is for comparison"):
        run(tmp_path / "run", nodes=[node], sites=1, server_data="none", method="dm")


@pytest.mark.parametrize(
    ("records", "arrays"),
    [
        ("0", {"a": np.zeros(3, np.float32)}),
        ("true", {"a": np.zeros(3, np.float32)}),
        ("5", {"a": np.zeros(3)}),
        ("5", {"a": np.zeros((1, 3), np.float32)}),
        ("5", {"b": np.zeros(3, np.float32)}),
        ("5", {}),
    ],
)
def test_replies_are_read_without_trust(records: str, arrays: dict[str, Any]) -> None:
    content = RecordDict({"reply": ConfigRecord({"json": records})})
    content["models"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
    with pytest.raises(FedistillError, check=lambda e: e.code == "bad-reply"):
        read_local(content, {"a": 3})
    with pytest.raises(FedistillError, check=lambda e: e.code == "bad-reply"):
        read_local(RecordDict({"reply": ConfigRecord({"json": "5"})}), {"a": 3})
