"""A federated run of every kind of task, and replies that do not fit the kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill.config import Config, make_config
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.metrics import counts_shape
from fedistill.files import read_json
from fedistill.site.describe import describe
from fedistill.synthetic.store import load_set
from server.replies import read_confusions, read_description, read_reply

SITES = 2


def tiny(**more: Any) -> Config:
    settings = {
        "partition": "iid", "sites": SITES, "phantom_images": 60, "phantom_classes": 3, "phantom_size": 16, "width": 4, "depth": 2,
        "experts": 1, "expert_steps": 40, "expert_batch": 8, "ipc": 2, "segment": 2, "iterations": 3, "syn_steps": 2,
        "method": "mtt", "eval_nets": 1, "eval_steps": 4, "eval_batch": 8, "eval_models": "mlp", "slice_seconds": 60.0,
        "deadline": 60.0, "skip_above": 1000.0,
    }  # fmt: skip
    return make_config(settings | more).resolved()


def run(config: Config, nodes: list[dict[str, Any]]) -> LocalGrid:
    grid = LocalGrid(client_app, nodes)
    serve(grid, config)
    return grid


@pytest.mark.parametrize(
    ("more", "first"),
    [
        ({"task": "multilabel"}, "AUC"),
        ({"task": "multilabel", "method": "datm"}, "AUC"),
        ({"task": "ordinal", "method": "cf", "real_batch": 4}, "QWK"),
        ({"phantom_depth": 8, "model": "mlp"}, "Balanced accuracy"),
    ],
)
def test_a_run_of_every_kind(more: dict[str, Any], first: str, tmp_path: Path) -> None:
    config = tiny(out=str(tmp_path / "run"), **more)
    run(config, [{"partition-id": i} for i in range(SITES)])
    merged = load_set(tmp_path / "run/seed-0/merged")
    data = load_data(config)
    assert (merged.kind, merged.geometry, len(merged)) == (data.kind, data.geometry, SITES * 6)
    summary = read_json(tmp_path / "run/summary.json")
    assert (summary["data"]["kind"], summary["data"]["train"]) == (data.kind, 60)
    assert [site["train"] for site in summary["sites"]] == [30, 30]
    assert summary["arms"]["random_real"]["images"] == SITES * 6
    at_sites = summary["federated"]["distilled"]
    assert sum(figures["images"] for figures in at_sites.values()) == 30
    if data.kind == "ordinal":
        assert set(at_sites["site-1"]) >= {"qwk", "mae"}
        assert (merged.labels > 0).all()  # smoothed over the grades
    assert (tmp_path / "run/results.md").read_text().startswith(f"| Arm | {first} |")
    assert "n/a" not in (tmp_path / "run/results.md").read_text().split("\n\n")[0]
    assert first in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_a_server_without_data_elects_by_counts(task: str, tmp_path: Path) -> None:
    nodes = [real_site(n, tmp_path / n) for n in ("north", "south")]
    run(tiny(out=str(tmp_path / "run"), task=task, server_data="none"), nodes)
    figures = read_json(tmp_path / "run/summary.json")["arms"]["distilled"]
    assert figures["auc"]["mean"] is None
    assert figures["balanced_accuracy"]["mean"] is not None
    if task == "ordinal":
        assert figures["mae"]["mean"] is not None


def test_a_site_with_too_few_images_of_findings_says_so_before_it_works(tmp_path: Path) -> None:
    nodes = [{"partition-id": i} for i in range(SITES)]
    config = tiny(out=str(tmp_path / "run"), task="multilabel", ipc=11)
    with pytest.raises(FedistillError, match="site-1: ipc=11 asks for 33 synthetic images, but site-1 has only 30"):
        run(config, nodes)
    assert not list((tmp_path / "run").rglob("expert-*"))


def about(**changes: Any) -> dict[str, Any]:
    return describe(load_data(tiny(task="multilabel")), "north") | changes


def test_a_description_carries_its_kind() -> None:
    assert read_description(about())["kind"] == "multilabel"
    assert read_description(about(geometry=[1, 8, 16, 16]))["geometry"] == [1, 8, 16, 16]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kind": "both"}, "no kind of task"),
        ({"kind": None}, "no kind of task"),
        ({"train": True}, "no number of images"),
        ({"train": -1}, "no number of images"),
        ({"train": 1}, "do not fit the number of its images"),
        ({"kind": "ordinal"}, "do not fit the number of its images"),
        ({"geometry": [1, 2, 3, 4, 5]}, "no geometry"),
        ({"geometry": [1, 8, 8.0, 8]}, "no geometry"),
    ],
)
def test_descriptions_that_make_no_sense(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(FedistillError, match=why):
        read_description(about(**changes))


def test_tables_have_the_shape_of_the_kind() -> None:
    findings = [[[1, 2], [3, 4]]] * 3
    assert read_confusions({"m": findings}, {"m"}, counts_shape(3, "multilabel")) == {"m": findings}
    assert read_confusions({"m": [[1, 2], [3, 4]]}, {"m"}, counts_shape(2, "ordinal"))
    for table in (
        findings[:2],
        [[1] * 3] * 3,
        [[[1, 2], [3, -4]]] * 3,
        [[[1, 2], [3, True]]] * 3,
        [[[1, 2]] * 3] * 3,
        5,
        "a",
    ):
        content = RecordDict({"reply": ConfigRecord({"json": json.dumps({"m": table})})})
        with pytest.raises(FedistillError, match="no table of counts"):
            read_confusions(read_reply(content), {"m"}, counts_shape(3, "multilabel"))
    with pytest.raises(FedistillError, match="no table of counts"):
        read_confusions({"m": findings}, {"m"}, counts_shape(3, "multiclass"))
