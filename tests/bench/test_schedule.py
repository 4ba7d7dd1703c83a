"""Working off cells: each once, experts once for all, failures kept to themselves and tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinysuite import here, write_suite

from fedistill.bench import cells as cells_module
from fedistill.bench import schedule
from fedistill.bench.cells import run_cell, train_experts_of
from fedistill.bench.plan import Cell, Choice, cells_of
from fedistill.bench.results import collect, finished, kind_of, read_rows, record_path
from fedistill.bench.run import write_results
from fedistill.bench.schedule import Engine, tasks_of, work_off
from fedistill.bench.suite import load_suite
from fedistill.errors import FedistillError
from fedistill.files import read_json


def start(folder: Path, out: Path, *, workers: int = 1, **choice: object) -> tuple[list[str], list[Cell]]:
    """Work off what is not finished; returns the functions that ran and all cells."""
    cells, done = cells_of(load_suite(str(folder)), Choice(**choice)), list[str]()  # type: ignore[arg-type]
    todo = [cell for cell in cells if not finished(out, cell)]
    work_off(todo, out, here(done), workers=workers, first_seed=0)
    return done, cells


def test_finished_cells_are_not_done_again(tmp_path: Path) -> None:
    suite, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    done, cells = start(suite, out, ipc=[1], seeds=1)
    assert done == ["train_experts_of", "run_cell", "run_cell", "run_cell"]
    assert all(finished(out, cell) for cell in cells)
    assert len(list(out.rglob("expert-000.safetensors"))) == 1
    assert sorted(p.name for p in (out / "sheets").iterdir()) == ["phantom-ipc1-mtt.png", "phantom-ipc1-ptm.png"]
    assert start(suite, out, ipc=[1], seeds=1)[0] == []
    assert start(suite, out, ipc=[1], seeds=1, methods=["ptm"], settings={"eval_steps": "5"})[0][1:] == ["run_cell"] * 2
    progress = read_json(out / "progress.json")
    assert (progress["done"], progress["failed"], progress["cost_left"], progress["tasks"]) == (2, 0, 0, [])


def test_the_table_holds_figures_of_validation_and_test(tmp_path: Path) -> None:
    suite, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    _, cells = start(suite, out, ipc=[2], seeds=1, settings={"eval_models": "mlp,convnet"})
    write_results(load_suite(str(suite)), Choice(ipc=[2], seeds=1, settings={"eval_models": "mlp,convnet"}), cells, out)
    rows = read_rows(out / "results.csv")
    assert [(r["method"], r["model"]) for r in rows] == [
        (method, model) for method in ("whole", "mtt", "ptm") for model in ("mlp", "convnet")
    ]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("val_balanced_accuracy", "val_auc", "accuracy", "auc"))
    assert [row["images"] for row in rows[::2]] == [90, 6, 6]
    assert [row["iterations"] for row in rows[::2]] == [None, 2, 2]
    assert all(row["seconds_distil"] > 0 and row["seconds_experts"] > 0 for row in rows[2:])
    assert "**" in (out / "tables.md").read_text()
    assert (out / "accuracy-by-images.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(("task", "names"), [("ordinal", ("qwk", "val_qwk")), ("multilabel", ("map", "val_map"))])
def test_the_table_holds_the_figures_of_the_task(tmp_path: Path, task: str, names: tuple[str, ...]) -> None:
    suite, out = write_suite(tmp_path / "suite", data_phantom=f'data = "phantom"\ntask = "{task}"'), tmp_path / "out"
    choice = {"ipc": [2], "seeds": 1, "methods": ["mtt"]}
    _, cells = start(suite, out, **choice)
    write_results(load_suite(str(suite)), Choice(**choice), cells, out)
    rows = read_rows(out / "results.csv")
    assert len(rows) == 2
    assert all(row["status"] == "ok" and row[name] is not None for row in rows for name in names)
    assert kind_of(rows, "phantom") == task


def test_results_hold_what_the_settings_of_now_say(tmp_path: Path) -> None:
    folder, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    suite = load_suite(str(folder))
    start(folder, out, ipc=[1], seeds=1, methods=["mtt"])
    start(folder, out, ipc=[3], seeds=1, methods=["ptm"])  # another choice of the same: both stay
    methods = [row["method"] for row in collect(out, suite, Choice(), [])]
    assert methods == ["whole", "mtt", "ptm"]
    assert collect(out, suite, Choice(settings={"eval_steps": "9"}), []) == []


def test_a_failed_cell_is_kept_to_itself_shown_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    real = cells_module.distill_site

    def broken(config, *arguments, **more):
        if config.method == "ptm":
            raise ZeroDivisionError("what an exception says may quote private data")
        return real(config, *arguments, **more)

    monkeypatch.setattr(cells_module, "distill_site", broken)
    _, cells = start(folder, out, ipc=[1], seeds=1)
    assert [cell.method for cell in cells if not finished(out, cell)] == ["ptm"]
    suite, choice = load_suite(str(folder)), Choice(ipc=[1], seeds=1)
    write_results(suite, choice, cells, out)
    row = next(row for row in read_rows(out / "results.csv") if row["method"] == "ptm")
    assert (row["status"], row["reason"], row["accuracy"]) == ("failed", "defect: ZeroDivisionError", None)
    assert "| ptm | failed |" in (out / "tables.md").read_text()
    assert "ZeroDivisionError: what an exception says" in capsys.readouterr().err  # in the log
    assert "what an exception says" not in "".join(p.read_text() for p in out.rglob("*.json"))

    monkeypatch.undo()
    done, _ = start(folder, out, ipc=[1], seeds=1)
    assert done == ["train_experts_of", "run_cell"]
    assert all(finished(out, cell) for cell in cells)
    write_results(suite, choice, cells, out)
    assert "failed |" not in (out / "tables.md").read_text()


def test_a_budget_that_cannot_be_fails_with_its_sentence_and_alone(tmp_path: Path) -> None:
    folder, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    _, cells = start(folder, out, ipc=[1, 50], seeds=1, methods=["mtt"])
    by_ipc = {cell.ipc: read_json(record_path(out, cell.key)) for cell in cells}
    assert [by_ipc[ipc]["status"] for ipc in (0, 1, 50)] == ["ok", "ok", "failed"]
    assert by_ipc[50]["code"] == "budget"
    assert by_ipc[50]["reason"].startswith("ipc=50 asks for 150 synthetic images")


def test_experts_are_trained_once_and_nothing_is_distilled_before(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path / "suite", methods_plain='method = "ptm"\noverlap = "off"')))
    cells = [c for c in cells_of(suite, Choice(seeds=1, settings={"slice_seconds": "0"})) if c.method != "whole"]
    assert train_experts_of(cells, tmp_path / "out") == {}
    assert [p.name for p in (tmp_path / "out").rglob("*.safetensors")] == ["expert-000.safetensors"]
    before = next(tmp_path.rglob("expert-000.safetensors")).stat().st_mtime_ns
    assert run_cell(cells[0], tmp_path / "out", False)["status"] == "ok"
    assert next(tmp_path.rglob("expert-000.safetensors")).stat().st_mtime_ns == before


def test_experts_that_fail_fail_once_for_all_their_cells(tmp_path: Path) -> None:
    folder, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    done, cells = start(folder, out, seeds=1, settings={"expert_lr": "1e30"})
    assert done == ["train_experts_of", "run_cell"]  # the reference needs no experts
    records = [read_json(record_path(out, cell.key)) for cell in cells]
    assert [r["status"] for r in records] == ["ok", *["failed"] * 4]
    assert {r["reason"] for r in records[1:]} == {
        "An expert diverged (its parameters are not finite): lower expert_lr."
    }


def test_methods_without_experts_do_not_wait_for_any(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite")
    (folder / "methods" / "dm.toml").write_text('method = "dm"\n')
    tasks = tasks_of(cells_of(load_suite(str(folder)), Choice(seeds=1, methods=("dm",))))
    assert not any(task.needs or task.makes for task in tasks)


def test_a_lost_process_fails_what_it_worked_on(tmp_path: Path) -> None:
    (cell,) = (c for c in cells_of(load_suite(str(write_suite(tmp_path))), Choice(seeds=1)) if c.method == "whole")

    def lost(handle: object) -> object:
        raise ConnectionError

    work_off([cell], tmp_path, Engine(submit=lambda *a: a, wait=lambda h: h[0], result=lost), workers=1, first_seed=0)
    assert read_json(record_path(tmp_path, cell.key))["reason"] == "defect: ConnectionError"


def test_experts_come_first_and_workers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of(load_suite(str(write_suite(tmp_path))), Choice())
    assert [bool(task.makes) for task in tasks_of(cells)] == [True] * 2 + [False] * len(cells)
    monkeypatch.setattr(schedule, "run_cell", lambda cell, *a: {"key": cell.key, "status": "ok"})
    monkeypatch.setattr(schedule, "train_experts_of", lambda cells, out: {})
    started, at_once = list[str](), list[int]()
    engine = here(started)

    def wait(handles):
        at_once.append(len(handles))
        return handles[-1]

    work_off(
        cells,
        tmp_path,
        Engine(submit=engine.submit, wait=wait, result=engine.result),
        workers=3,
        first_seed=0,
    )
    assert max(at_once) == 3
    assert len(list((tmp_path / "cells").iterdir())) == len(cells)


def test_a_stopped_cell_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    choice = Choice(ipc=[1], seeds=1, methods=["mtt"], settings={"slice_seconds": "0", "iterations": "6"})
    cell = cells_of(load_suite(str(folder)), choice)[-1]
    whole = run_cell(cell, tmp_path / "uninterrupted", False)
    real, slices = cells_module.distill_site, list[int]()

    def stopped(*arguments, on_progress, **more):
        def tell(progress):
            slices.append(progress.iterations)
            if slices[-1] == 3:
                raise KeyboardInterrupt
            on_progress(progress)

        return real(*arguments, on_progress=tell, **more)

    monkeypatch.setattr(cells_module, "distill_site", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, out, False)
    monkeypatch.undo()
    again = run_cell(cell, out, False)
    assert again["iterations"] == 6
    for model, scores in again["models"].items():
        assert {k: v for k, v in scores.items() if k != "seconds"} == {
            k: v for k, v in whole["models"][model].items() if k != "seconds"
        }


def test_federated_sets_are_merged(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "suite", data_phantom='data = "phantom"\npartition = "site"')
    cell = cells_of(load_suite(str(folder)), Choice(ipc=[1], seeds=1, methods=["mtt"]))[-1]
    record = run_cell(cell, tmp_path / "out", False)
    assert record["status"] == "ok", record
    assert (record["images"], record["iterations"]) == (9, 6)  # three sites


def test_errors_of_users_carry_their_sentence() -> None:
    assert cells_module.failure(FedistillError("budget", "Too much."))["reason"] == "Too much."
