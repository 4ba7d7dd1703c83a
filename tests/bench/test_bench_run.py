"""The command: a real benchmark over Ray, from the plan to tables; stopped, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tinysuite import write_suite

from fedistill import cli
from fedistill.bench.results import read_rows
from fedistill.processes import start_time, tree_with_times
from fedistill.simulation import app_folder


def run(
    *arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fedistill", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, " ".join(err.split())


@pytest.fixture
def bench(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_a_plan_is_no_work(bench, tmp_path: Path) -> None:
    suite, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    code, _, err = bench("--suite", suite, "--out", out, "--plan")
    assert code == 0
    assert "10 cells, 0 of them finished" in err
    code, text, _ = bench("--suite", suite, "--out", out, "--methods", "mtt", "--ipc", "1,3", "--plan", "--json")
    assert json.loads(text)["cells"] == 6
    assert "phantom, mtt, IPC 3, seed 1" in json.loads(text)["todo"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suite", "medicl"], "Unknown suite 'medicl': did you mean 'medical'?"),
        (["--data", "wbc"], "Unknown data set 'wbc': did you mean 'wbc_sites'?"),
        (["--ipc", "1,ten"], "--ipc 1,ten is not a list of whole numbers"),
        (["--seeds", "0"], "0 is not in the range"),
        (["--set", "ipc=3"], "--set ipc does not work here: use --ipc"),
        (["--set", "width"], "--set width has no '='"),
        (["--set", "width=8", "--set", "width=16"], "--set width is given twice"),
        (["--tables"], "run the benchmark first"),
        (["--data-root", "nowhere", "--methods", "mtt"], "there is no file or folder"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(bench, tmp_path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = bench("--out", "out", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_and_kept(bench, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite")
    code, _, err = bench("--suite", suite, "--out", suite)
    assert code == 2
    assert "neither empty nor that of a benchmark" in err


@pytest.mark.flower
def test_a_benchmark_from_plan_to_tables(bench, tmp_path: Path) -> None:
    """One method cannot work: it is shown as failed, and tried again by the next command, which does nothing else."""
    suite, out = (
        write_suite(tmp_path / "suite", methods_bad='method = "mtt"\nimage_lr = 1e30\nskip_above = 0.0'),
        tmp_path / "out",
    )
    command = ("--suite", suite, "--out", out, "--seeds", 1, "--ipc", 1, "--set", "workers=2", "--json")
    code, text, err = bench(*command)
    summary = json.loads(text)
    assert code == 1, err
    assert (summary["cells"], summary["finished"]) == (4, 3), (out / "log.txt").read_text()
    assert [cell["method"] for cell in summary["failed"]] == ["bad"]
    assert "4/4 cells, 1 failed" in err
    rows = read_rows(out / "results.csv")
    assert {row["method"]: row["status"] for row in rows} == {
        "whole": "ok", "mtt": "ok", "ptm": "ok", "bad": "failed"
    }  # fmt: skip
    assert "| bad | failed |" in (out / "tables.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    write_suite(tmp_path / "suite", methods_bad='method = "mtt"\niterations = 3')
    code, text, err = bench(*command)
    assert (code, json.loads(text)["failed"]) == (0, []), err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    (out / "tables.md").unlink()
    assert bench("--out", out, "--tables")[0] == 0
    assert "| bad | " in (out / "tables.md").read_text()


@pytest.mark.flower
def test_a_stopped_benchmark_leaves_no_process(tmp_path: Path) -> None:
    suite, out = write_suite(tmp_path / "suite"), tmp_path / "out"
    arguments = ["--suite", str(suite), "--out", str(out), "--set", "expert_steps=100000", "--set", "workers=1"]
    path = os.pathsep.join([str(app_folder()), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-m", "fedistill.cli", "bench", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not (out / "progress.json").exists():
        time.sleep(0.1)
    below = tree_with_times(child.pid)
    child.terminate()
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "The same command goes on from here: fedistill bench --suite" in said
    time.sleep(0.5)
    assert [pid for pid, started in below.items() if started and start_time(pid) == started] == []
    assert (out / "results.csv").exists()
