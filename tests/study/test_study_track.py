"""Finished cells in the trackers: each once, with its settings and the figures of every seed."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from tinystudy import write_study

from fedistill.errors import FedistillError
from fedistill.files import write_json
from fedistill.study import track as tracking
from fedistill.study.plan import Cell, Study, cells_of, read_study, with_changes
from fedistill.study.results import record_path, write_results
from fedistill.study.run import run_study, write_plan
from fedistill.study.track import check_tracker, track


@pytest.fixture
def half(tmp_path: Path) -> tuple[Study, list[Cell], Path]:
    """A study of which one cell is finished."""
    study = read_study(write_study(tmp_path))
    cells, out = cells_of(study), tmp_path / "out"
    write_plan(study, cells, out, workers=1)
    finish(out, cells[0])
    write_results(out, study, cells)
    return study, cells, out


def finish(out: Path, cell: Cell) -> None:
    row = {"eval_model": "mlp", "trained_on": "distilled", "kind": "multiclass", "upload_bytes": 100}
    rows = [row | {"seed": seed, "auc": 0.5 + seed / 10} for seed in cell.seeds]
    end = {"status": "ok", "code": "", "reason": "", "rows": rows, "seconds": 3.0, "seeds": cell.seeds}
    write_json(record_path(out, cell.key), end)


def test_every_finished_cell_is_sent_once(
    half: tuple[Study, list[Cell], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, cells, out = half
    sent: list[tuple[str, Any]] = []
    record = lambda package, study, cell, figures, out: sent.append((cell.key, figures))  # noqa: E731
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", ("json", record))
    assert track("mlflow", study, cells, out) == 1
    (key, figures), *rest = sent
    assert (key, rest) == (cells[0].key, [])
    assert figures[1]["mlp/distilled/auc"] == 0.6
    assert figures[0]["mlp/distilled/upload_bytes"] == 100
    assert track("mlflow", study, cells, out) == 0
    finish(out, cells[1])
    assert track("mlflow", study, cells, out) == 1
    assert [key for key, _ in sent] == [cells[0].key, cells[1].key]


def test_seeds_that_come_later_are_sent_alone(
    half: tuple[Study, list[Cell], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, cells, out = half
    sent: list[list[int]] = []
    monkeypatch.setitem(tracking.TRACKERS, "wandb", ("json", lambda p, s, c, figures, o: sent.append(sorted(figures))))
    track("wandb", study, cells, out)
    more = cells_of(with_changes(study, {}, 3))
    finish(out, more[0])
    track("wandb", study, more, out)
    assert sent == [[0, 1], [2]]


def test_a_tracker_that_fails_stops_no_study(
    half: tuple[Study, list[Cell], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, cells, out = half
    told = StringIO()

    def refuse(*_: Any) -> None:
        raise ConnectionError("no route to a secret host")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", ("json", refuse))
    for cell in cells[1:]:
        finish(out, cell)
    run_study(study, cells, out, Console(file=told), tracker="mlflow")
    assert told.getvalue() == "mlflow did not take the results (ConnectionError): another try later.\n"
    sent: list[str] = []
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", ("json", lambda p, s, cell, f, o: sent.append(cell.key)))
    run_study(study, cells, out, Console(file=told), tracker="mlflow")
    assert sent == [cell.key for cell in cells]


def test_what_is_not_there_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FedistillError, match=r"Unknown tracker 'mlfow': did you mean 'mlflow'"):
        check_tracker("mlfow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FedistillError, match=r"pip install 'fedistill\[wandb\]'"):
        check_tracker("wandb")


def test_tensorboard_reads_what_was_written(half: tuple[Study, list[Cell], Path]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    study, cells, out = half
    track("tensorboard", study, cells, out)
    found = events.EventAccumulator(str(out / "tensorboard" / cells[0].key)).Reload()
    assert [(e.step, round(e.value, 6)) for e in found.Scalars("mlp/distilled/auc")] == [(0, 0.5), (1, 0.6)]


def test_mlflow_has_a_run_per_cell(half: tuple[Study, list[Cell], Path]) -> None:
    mlflow: ModuleType = pytest.importorskip("mlflow")
    study, cells, out = half
    mlflow.set_tracking_uri(f"sqlite:///{out}/mlflow.db")
    track("mlflow", study, cells, out)
    (run,) = mlflow.search_runs(experiment_names=[study.name], output_format="list")
    assert run.info.run_name == cells[0].name
    assert run.data.params["ipc"] == str(cells[0].config.ipc)
    assert run.data.metrics["mlp/distilled/auc"] == 0.6


def test_wandb_is_told_without_a_network(half: tuple[Study, list[Cell], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    study, cells, out = half
    track("wandb", study, cells, out)
    (run,) = (out / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert json.loads((out / "tracked-wandb.json").read_text()) == {cells[0].key: cells[0].seeds}
