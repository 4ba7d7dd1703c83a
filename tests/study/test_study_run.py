"""The work itself: which cells run when, what is left of those that fail or are stopped; and one real study on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tinystudy import STUDY, write_study

from fedistill import cli
from fedistill.files import read_json
from fedistill.study import run as running
from fedistill.study.plan import Cell, cells_of, read_study
from fedistill.study.results import read_results

# Instead of a simulation: says when it began and ended, and fails, dies or waits as it is told.
CELL = """
import json, os, sys, time
out, key, told = sys.argv[1:]
config, told = json.load(open(f"{out}/study.json"))["configs"][key], json.loads(told)
how = told.get(str(config["ipc"]), "")
began = time.time()
time.sleep(30 if how == "wait" else 0.4)
if how == "die":
    sys.exit(9)
row = {"seed": 0, "eval_model": "mlp", "trained_on": "distilled", "kind": "multiclass", "auc": 0.5}
end = {"status": "failed", "code": "odd", "reason": "Odd.", "rows": []} if how == "fail" else {
    "status": "ok", "code": "", "reason": "", "rows": [row], "peak_memory_bytes": None}
seeds = [config["seed"] + i for i in range(config["seeds"])]
with open(f"{out}/records/{key}.tmp", "w") as file:
    json.dump({"key": key, "seeds": seeds, "seconds": 0.4, "span": [began, time.time()], **end}, file)
os.replace(f"{out}/records/{key}.tmp", f"{out}/records/{key}.json")
"""
TEXT = STUDY.replace("seeds = 2", "seeds = 1").replace("ipc = [1, 2]", "alpha = [0.1, 1.0]\nipc = [1, 2, 3]")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What cells of an `ipc` do: "fail", "die" or "wait"; others end well."""
    said: dict[str, str] = {}

    def start(cell: Cell, out: Path) -> running.Child:
        (out / "records").mkdir(exist_ok=True)
        (out / "records" / f"{cell.key}.json").unlink(missing_ok=True)
        command = [sys.executable, "-c", CELL, str(out), cell.key, json.dumps(said)]
        process = subprocess.Popen(command, start_new_session=True)
        return running.Child(cell=cell, process=process, below={})

    monkeypatch.setattr(running, "_start", start)
    return said


def work(tmp_path: Path, jobs: int = 1) -> tuple[dict[str, Any], str]:
    study, screen = read_study(write_study(tmp_path, TEXT)), StringIO()
    out, console = tmp_path / "out", Console(file=screen, width=200)
    return running.run_study(study, cells_of(study), out, console, jobs=jobs, command="again"), screen.getvalue()


def spans(tmp_path: Path) -> dict[str, tuple[float, float]]:
    records = [read_json(path) for path in (tmp_path / "out" / "records").glob("*.json")]
    return {record["key"]: tuple(record["span"]) for record in records}


def together(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_cells_at_the_same_time_share_no_experts(told, tmp_path: Path) -> None:
    summary, said = work(tmp_path, jobs=2)
    assert (summary["finished"], summary["failed"]) == (6, [])
    assert "6/6 cells. alpha 1, ipc 3: done in 0.4 s" in said
    assert "left" in said
    found, cells = spans(tmp_path), cells_of(read_study(tmp_path / "tiny.toml"))
    pairs = [(a, b) for a in cells for b in cells if a.key < b.key and together(found[a.key], found[b.key])]
    assert pairs
    assert all(a.experts != b.experts for a, b in pairs)


def test_a_bad_cell_does_not_stop_the_others_and_is_tried_again(told, tmp_path: Path) -> None:
    told |= {"1": "fail", "2": "die"}
    summary, said = work(tmp_path)
    assert (summary["finished"], len(summary["failed"])) == (2, 4)
    assert {cell["code"] for cell in summary["failed"]} == {"odd", "lost"}
    assert "alpha 0.1, ipc 1: failed: Odd." in said
    assert "It ended unexpectedly (exit code 9): see" in said
    rows = read_results(tmp_path / "out" / "results.csv")
    assert sorted(row["status"] for row in rows) == ["failed"] * 4 + ["ok"] * 2
    before = spans_of_good(tmp_path)
    told.clear()
    assert work(tmp_path)[0]["finished"] == 6
    after = spans(tmp_path)
    assert all(after[key] == span for key, span in before.items())


def spans_of_good(tmp_path: Path) -> dict[str, tuple[float, float]]:
    records = [read_json(path) for path in (tmp_path / "out" / "records").glob("*.json")]
    return {record["key"]: tuple(record["span"]) for record in records if record["status"] == "ok"}


def test_a_stopped_study_goes_on(told, tmp_path: Path) -> None:
    told["2"] = "wait"

    def stop() -> None:
        while len(list((tmp_path / "out").glob("records/*.json"))) < 1:
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        work(tmp_path)
    assert ended.value.code == 130
    assert time.monotonic() - began < 20
    assert len(read_results(tmp_path / "out" / "results.csv")) == 1
    before = spans(tmp_path)
    told.clear()
    summary, _ = work(tmp_path)
    assert summary["finished"] == 6
    assert before.items() <= spans(tmp_path).items()


def fedistill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["fedistill", "study", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nothing", "--out", "out"], "Unknown study 'nothing'"),
        (["plan", "budget", "--out", "out", "--set", "icp=3"], "Unknown option 'icp': did you mean 'ipc'?"),
        (["plan", "budget", "--out", "out", "--data", "a", "--set", "data=b"], "data is given twice"),
        (
            ["run", "budget", "--out", "out", "--data", "nowhere.npz"],
            "The cell 'method cf, ipc 1' cannot run: data=nowhere.npz: there is no",
        ),
        (["run", "budget", "--out", "out", "--jobs", "0"], "'--jobs'"),
        (["show", "out"], "run the study first"),
        (["plot", "out"], "run the study first"),
        (["show", "file"], "run the study first"),
        (["plan", "budget", "--out", "file/out"], "file is a file: choose another folder."),
        (["run", "budget", "--out", "file/out"], "file is a file: choose another folder."),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, out, err = fedistill(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_plan_says_which_data_are_not_here(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = write_study(tmp_path, "[settings]\nsites = 2\n[grid]\ndata = ['phantom', 'nowhere.npz']")
    code, _, err = fedistill(monkeypatch, capsys, "plan", path, "--out", tmp_path / "out")
    assert code == 0
    assert "Cells that cannot run here: data=nowhere.npz: there is no file or folder" in err
    assert err.count("cannot run here") == 1


@pytest.mark.flower
def test_a_real_study_trains_no_expert_twice(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path, out = write_study(tmp_path, STUDY.replace("[1, 2]", "[1, 2, 500]")), tmp_path / "out"
    code, text, err = fedistill(monkeypatch, capsys, "run", path, "--out", out, "--jobs", 2, "--json")
    assert code == 1, err
    summary = json.loads(text)
    assert (summary["cells"], summary["finished"]) == (3, 2)
    assert [(c["name"], c["code"]) for c in summary["failed"]] == [("ipc 500", "budget")]

    experts = list((out / "work").rglob("expert-*.safetensors"))
    assert len(experts) == 2 * 2  # sites and seeds
    first, second = sorted((out / "cells").glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    assert all(first.stat().st_mtime < file.stat().st_mtime < second.stat().st_mtime for file in experts)

    rows = [row for row in read_results(out / "results.csv") if row["status"] == "ok"]
    assert len(rows) == 2 * 2 * 4  # cells, seeds and arms
    for cell in {row["cell"] for row in rows}:
        arms = read_json(out / "cells" / cell / "summary.json")["arms"]
        for arm in arms:
            mine = [row for row in rows if (row["cell"], row["trained_on"]) == (cell, arm)]
            assert [row["seed"] for row in mine] == [0, 1]
            mean = sum(row["balanced_accuracy"] for row in mine) / 2
            assert mean == pytest.approx(arms[arm]["balanced_accuracy"]["mean"], abs=1e-5)
            judged = sum(row["val_balanced_accuracy"] for row in mine) / 2
            assert judged == pytest.approx(arms[arm]["validation"]["balanced_accuracy"], abs=1e-5)
            assert mine[0]["upload_bytes"] == pytest.approx(arms[arm]["upload_bytes"], rel=0.1)
    assert all((row["seconds_experts"] or 0) > 0 for row in rows if row["trained_on"] == "distilled")
    assert {row["seconds_experts"] for row in rows if row["trained_on"] != "distilled"} == {None}

    before = {path: path.stat().st_mtime for path in out.rglob("*") if path.is_file() and "work" in path.parts}
    code, text, _ = fedistill(monkeypatch, capsys, "plan", path, "--out", out, "--json")
    assert [cell["state"] for cell in json.loads(text)["plan"]] == ["finished", "finished", "failed"]
    code, _, err = fedistill(monkeypatch, capsys, "show", out)
    assert code == 0
    code, text, err = fedistill(monkeypatch, capsys, "show", out, "--markdown", "--metric", "val_auc")
    assert "AUC on validation of a" in text
    assert "| 500 | failed | failed | failed | failed | – | 0 |" in text
    code, text, err = fedistill(monkeypatch, capsys, "plot", out, "--x", "ipc", "--by", "trained_on", "--json")
    assert [Path(file).suffix for file in json.loads(text)["files"]] == [".svg", ".pdf", ".html"]
    page = (out / "study.html").read_text()
    assert f"<code>fedistill study run {path} --out {out} --jobs 2 --json</code>" in page
    assert "not private and never sent: Random real images, Local only, Centralised." in page
    code, text, err = fedistill(monkeypatch, capsys, "show", out, "--against", "ipc=1", "--json", "--metric", "auc")
    told = json.loads(text)
    lines = told["pairs"]
    assert told["metrics"] == ["auc"]
    ours = {(row["ipc"], row["seed"]): row["auc"] for row in rows if row["trained_on"] == "distilled"}
    assert [(line["ipc"], line["AUC"][-4:]) for line in lines] == [("2 − 1", " (2)")]
    mean = sum(ours[2, seed] - ours[1, seed] for seed in (0, 1)) / 2
    assert float(lines[0]["AUC"].split()[0].replace("−", "-")) == pytest.approx(mean, abs=6e-4)
    assert all(path.stat().st_mtime == time for path, time in before.items())
