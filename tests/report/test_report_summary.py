"""`summary.json` from the files of a run: means and deviations over seeds, failures, and the command to repeat it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fedistill import cli
from fedistill.config import Config, make_config
from fedistill.events import EventLog
from fedistill.files import write_json
from fedistill.report.summary import command_of, summarise


def figures(value: float) -> dict[str, Any]:
    spread = {"mean": value, "std": 0.5}
    names = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
    more = {
        "per_class_recall": [spread, {"mean": None, "std": None}],
        "images": 4,
        "upload_bytes": 100,
        "seconds": 2.0,
        "learning_rate": [0.01],
        "validation": {"auc": value / 2},
    }
    return dict.fromkeys(names, spread) | more


def site(**more: Any) -> dict[str, Any]:
    about = {
        "class_names": ["a", "b"], "kind": "multiclass", "counts": [5, 3], "train": 8, "geometry": [1, 8, 8], "modality": "xray",
        "fingerprint": "f",
    }  # fmt: skip
    work = {
        "seconds": {"experts": 1.0, "distill": 3.0},
        "iterations": 10,
        "skipped": 1,
        "notes": ["n"],
        "final_loss": 0.5,
    }
    return about | work | {"status": "ok", "reason": "", "upload_bytes": 50, "synthetic_images": 2} | more


def make_run(run: Path, seeds: int) -> Config:
    config = make_config({"preset": "quick", "seeds": seeds, "eval_models": "convnet,mlp"}).resolved()
    for s in range(seeds):
        folder = run / f"seed-{s}"
        late = {"status": "late", "reason": "no answer within 5 s"}
        write_json(folder / "sites.json", {"north": site(), "south": site(**late) if s else site(iterations=20)})
        write_json(folder / "arms.json", {m: {"distilled": figures(0.6 + 0.2 * s)} for m in ("convnet", "mlp")})
        write_json(folder / "federated.json", {"north": {"convnet": [[3, 1], [0, 4]]}})
    events = EventLog(run / "events.jsonl")
    events.add(0, "", "describe", "start")
    write_json(run / "engine.json", {"peak_memory_bytes": 123, "seconds": 9.5})
    return config


def test_figures_are_means_over_seeds_with_their_deviation(tmp_path: Path) -> None:
    config = make_run(tmp_path, 2)
    summary = summarise(config, tmp_path, [tmp_path / "seed-0", tmp_path / "seed-1"])
    arm = summary["arms"]["distilled"]
    assert arm["accuracy"] == {"mean": pytest.approx(0.7), "std": pytest.approx(0.02**0.5)}
    assert arm["std_over"] == "seeds"
    assert arm["per_class_recall"]["b"] == {"mean": None, "std": None}
    assert arm["learning_rate"] == [0.01, 0.01]
    assert arm["validation"] == {"auc": pytest.approx(0.35)}
    assert list(summary["cross_architecture"]) == ["mlp"]
    assert summary["federated"]["distilled"]["north"]["accuracy"] == 7 / 8
    assert summary["federated"]["distilled"]["north"]["images"] == 8
    assert summary["federated"]["distilled"]["north"]["recognised"] == {
        "a": {"right": 3, "of": 4},
        "b": {"right": 4, "of": 4},
    }
    assert summary["calibration"] is None
    assert summary["peak_memory_bytes"] == 123
    assert summary["seconds"] == 9.5
    north, south = summary["sites"]
    assert north["phases"] == {"experts": 1.0, "distill": 3.0}
    assert (south["status"], south["iterations"]) == ("late", 20)
    assert summary["notes"] == ["Site south answered late and is not in every merged set: no answer within 5 s"]


def test_findings_of_sites_are_told_by_images_and_not_by_findings(tmp_path: Path) -> None:
    config = make_run(tmp_path, 1)
    folder, kind = tmp_path / "seed-0", {"kind": "multilabel", "counts": [5, 7], "train": 9}
    write_json(folder / "sites.json", {"north": site(**kind)})
    write_json(
        folder / "arms.json",
        {m: {"distilled": figures(0.6) | {"map": {"mean": 0.4, "std": 0.1}}} for m in ("convnet", "mlp")},
    )
    write_json(folder / "federated.json", {"north": {"convnet": [[[3, 1], [0, 4]], [[2, 2], [2, 2]]]}})
    summary = summarise(config, tmp_path, [folder])
    assert (summary["data"]["kind"], summary["data"]["train"], summary["data"]["test"]) == ("multilabel", 9, 8)
    assert (summary["sites"][0]["train"], summary["sites"][0]["images"]) == (9, [5, 7])
    assert summary["arms"]["distilled"]["map"]["mean"] == 0.4
    assert summary["federated"]["distilled"]["north"]["accuracy"] == (7 / 8 + 4 / 8) / 2


def test_a_server_without_data_knows_what_counts_tell_of_grades(tmp_path: Path) -> None:
    config = make_run(tmp_path, 1)
    folder = tmp_path / "seed-0"
    write_json(folder / "sites.json", {"north": site(kind="ordinal")})
    (folder / "arms.json").unlink()
    arm = summarise(config, tmp_path, [folder])["arms"]["distilled"]
    assert arm["mae"]["mean"] == 1 / 8
    assert arm["qwk"]["mean"] == pytest.approx(0.75)  # 1 observed and 4 expected by chance
    assert arm["auc"] == {"mean": None, "std": None}


def test_with_one_seed_the_deviation_is_over_networks(tmp_path: Path) -> None:
    config = make_run(tmp_path, 1)
    summary = summarise(config, tmp_path, [tmp_path / "seed-0"])
    assert summary["arms"]["distilled"]["accuracy"] == {"mean": 0.6, "std": 0.5}
    assert summary["arms"]["distilled"]["std_over"] == "networks"


def test_the_command_makes_the_same_configuration_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({
        "preset": "quick", "data": "my scans.npz", "partition": "dirichlet", "alpha": 0.05, "syn_batch": 7, "class_weights": False,
        "iterations": 9, "seeds": 3, "out": "runs/x",
    }).resolved()  # fmt: skip
    seen = []
    monkeypatch.setattr("fedistill.simulation.simulate", lambda c, *a, **k: (seen.append(c.resolved()), sys.exit(0)))
    monkeypatch.setattr(sys, "argv", shlex.split(command_of(config)))
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == [config]


def test_with_real_sites_the_command_is_the_operators() -> None:
    config = make_config({"server_data": "none", "sites": 3, "method": "sketch", "ipc": 4, "out": "/srv/x"}).resolved()
    command, _, job = command_of(config).partition("  # ")
    assert command == "fedistill server run FOLDER JOB.toml"
    found = dict(part.split(" = ") for part in job.split(", "))
    assert (found["sites"], found["method"], found["ipc"]) == ("3", '"sketch"', "4")
    assert "out" not in found
    assert "server_data" not in found
