"""Run a study: the cells that are not finished, a few at a time, each in a process of its own; results after each of them.

Two cells that share experts never run at the same time: the second finds what the first has trained. Simulations in one work folder
are safe beside each other, but both would train what neither finds (as may happen to training on all real images, which cells
of other experts share, too).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedistill.errors import FedistillError
from fedistill.events import refuse_foreign as refuse_foreign_folder
from fedistill.files import write_json
from fedistill.processes import alone, check_cluster, start_python, stop_engine, terminate_is_interrupt, tree_with_times
from fedistill.report.tables import duration
from fedistill.study.cost import Estimate, disk_of, estimates
from fedistill.study.plan import Cell, Study
from fedistill.study.results import defect, finished, log_path, read_plan, record_of, record_path, write_results
from fedistill.study.track import check_tracker, track

POLL_SECONDS = 0.2
WATCH_SECONDS = 5.0  # between looks at the processes below the cells
STOP_SECONDS = 30.0  # a simulation stops its own engine first


@dataclass(frozen=True, kw_only=True)
class Child:
    """A cell at work. below: the processes under it and their start times."""

    cell: Cell
    process: subprocess.Popen[bytes]
    below: dict[int, str]


def run_study(
    study: Study,
    cells: Sequence[Cell],
    out: Path,
    console: Console,
    *,
    jobs: int = 1,
    command: str = "",
    tracker: str = "",
) -> dict[str, Any]:
    """Work off the cells that are not finished in `out`; returns numbers of cells and the failures.

    jobs: cells at the same time, each with its share of the cores. command: what the user typed, to be typed again.
    tracker: one of `study.track`, which is sent every finished cell.
    Raises `FedistillError` on bad input before any work starts. Ctrl-C and SIGTERM stop the cells and raise `SystemExit` with
    code 130; what is finished is in the results then, too.
    """
    if jobs < 1:
        raise FedistillError("bad-value", f"--jobs {jobs} is too small: it must be at least 1.")
    if tracker:
        check_tracker(tracker)
    refuse_foreign(out, study)
    todo = [cell for cell in cells if not finished(out, cell)]
    if todo:
        check_cluster()
    check_data(todo)
    with alone(out):
        share = max(1, (os.cpu_count() or 1) // jobs)
        write_plan(study, cells, out, workers=share, command=command)
        write_results(out, study, cells)
        _send(study, cells, out, console, tracker)
        if todo:
            _work(study, cells, todo, out, console, jobs, command, tracker)
    return outcome(study, cells, out)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Of one cell: its state, and seconds, bytes and experts to train as guessed, or as measured where it is finished."""

    state: str
    seconds: float
    memory: int
    disk: int
    networks: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All cells, and of what is left the seconds, the most memory at any time and the disk.

    measured: finished cells by which the guesses are corrected.
    """

    cells: Sequence[Outlook]
    seconds: float
    memory: int
    disk: int
    measured: int


def forecast(cells: Sequence[Cell], out: Path, *, jobs: int) -> Forecast:
    """Guesses for all cells, corrected by what the finished ones took."""
    guesses = estimates(cells, cores=max(1, (os.cpu_count() or 1) // jobs))
    records = [record_of(out, cell) for cell in cells]
    done = [(r, g) for r, g in zip(records, guesses, strict=True) if r and r["status"] == "ok"]
    slower = _ratio([(r["seconds"], g.seconds) for r, g in done])
    larger = _ratio([(r["peak_memory_bytes"] or g.memory, g.memory) for r, g in done])
    seen = []
    for cell, record, guess in zip(cells, records, guesses, strict=True):
        state = state_of(record, cell, out)
        seconds, memory, disk = guess.seconds * slower, int(guess.memory * larger), guess.disk
        if record and state == "finished":
            seconds, memory = record["seconds"], record["peak_memory_bytes"] or memory
            disk = disk_of(out / "cells" / cell.key)
        seen.append(Outlook(state=state, seconds=seconds, memory=memory, disk=disk, networks=guess.networks))
    left = [one for one in seen if one.state != "finished"]
    return Forecast(
        cells=seen,
        seconds=max([one.seconds for one in left] + [sum(one.seconds for one in left) / jobs]),
        memory=sum(sorted((one.memory for one in left), reverse=True)[:jobs]),
        disk=sum(one.disk for one in left),
        measured=len(done),
    )


def state_of(record: dict[str, Any] | None, cell: Cell, out: Path) -> str:
    if record is not None:
        return "finished" if record["status"] == "ok" else "failed"
    return "begun" if (out / "cells" / cell.key / "config.json").exists() else "to do"


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Measured over guessed; 1 where nothing was measured."""
    return sum(real for real, _ in pairs) / sum(guess for _, guess in pairs) if pairs else 1.0


def outcome(study: Study, cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    """How the cells stand."""
    records = [(cell, record_of(out, cell)) for cell in cells]
    failed = [
        {"cell": cell.key, "name": cell.name, "code": record["code"], "reason": record["reason"]}
        for cell, record in records
        if record and record["status"] == "failed"
    ]
    return {
        "out": str(out),
        "study": study.name,
        "cells": len(cells),
        "finished": sum(record is not None for _, record in records) - len(failed),
        "failed": failed,
        "results": str(out / "results.csv"),
    }


def write_plan(study: Study, cells: Sequence[Cell], out: Path, *, workers: int, command: str = "") -> None:
    """`study.json`: what tells the cells apart, the configuration of each, with its folders, and what repeats the study."""
    configs = {}
    for cell in cells:
        place = {"out": str(out / "cells" / cell.key), "work": str(out / "work")}
        configs[cell.key] = replace(cell.config, **place, workers=cell.config.workers or workers).to_dict()  # type: ignore[arg-type]
    about = {
        "study": study.name,
        "title": study.title,
        "arms": list(study.arms),
        "varied": study.varied,
        "columns": study.columns,
        "command": command,
    }
    write_json(out / "study.json", about | {"names": {c.key: c.name for c in cells}, "configs": configs})


def refuse_foreign(out: Path, study: Study) -> None:
    """Raise `FedistillError` ("other-run") if `out` is a file, or a folder with something else in it than this study."""
    plan = out / "study.json"
    refuse_foreign_folder(out, plan.name, "that of a study", ours=(".lock",))
    if plan.exists() and (before := read_plan(out, "study")["study"]) != study.name:
        raise FedistillError("other-run", f"The folder {out} holds the study {before}: choose another folder.")


def check_data(todo: Sequence[Cell]) -> None:
    """Raise `FedistillError` where no cell at all can run, as with data that are not there. One bad cell is no reason."""
    from fedistill.simulation import check

    first: FedistillError | None = None
    for cell in todo:
        try:
            check(cell.config)
            return
        except FedistillError as error:
            first = first or FedistillError(error.code, f"The cell '{cell.name}' cannot run: {error.sentence}")
    if first is not None:
        raise first


def _work(
    study: Study,
    cells: Sequence[Cell],
    todo: Sequence[Cell],
    out: Path,
    console: Console,
    jobs: int,
    command: str,
    tracker: str,
) -> None:
    costs = dict(zip([c.key for c in todo], estimates(todo, cores=max(1, (os.cpu_count() or 1) // jobs)), strict=True))
    waiting, running, ended = list(todo), list[Child](), list[Cell]()
    began = looked = time.monotonic()
    try:
        with terminate_is_interrupt():
            while waiting or running:
                while len(running) < jobs and (cell := next_cell(waiting, [child.cell for child in running])):
                    waiting.remove(cell)
                    running.append(_start(cell, out))
                    _tell(console, f"{cell.name}: started", cells, out)
                time.sleep(POLL_SECONDS)
                if time.monotonic() - looked > WATCH_SECONDS:
                    looked = time.monotonic()
                    for child in running:
                        child.below.update(tree_with_times(child.process.pid))
                for child in [c for c in running if c.process.poll() is not None]:
                    running.remove(child)
                    record = _ended(child, out)
                    ended += [child.cell] * (
                        record["status"] == "ok"
                    )  # a failure says nothing of the time that others take
                    write_results(out, study, cells)
                    _send(study, cells, out, console, tracker)
                    how = "done" if record["status"] == "ok" else f"failed: {record['reason']}"
                    how += f" in {duration(record['seconds'])}"
                    left = _left(time.monotonic() - began, ended, [*waiting, *(c.cell for c in running)], costs)
                    _tell(console, f"{child.cell.name}: {how}{left}", cells, out)
    except KeyboardInterrupt:
        _stop(running)
        write_results(out, study, cells)
        what = f"Stopped. The same command goes on from here: {command}".removesuffix(": ")
        console.print(what, soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(130) from None
    finally:
        _stop([child for child in running if child.process.poll() is None])


def next_cell(waiting: Sequence[Cell], running: Sequence[Cell]) -> Cell | None:
    """The first cell that shares no experts with one that is running; None where there is none."""
    busy = {cell.experts for cell in running}
    return next((cell for cell in waiting if cell.experts not in busy), None)


def _start(cell: Cell, out: Path) -> Child:
    path = record_path(out, cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an attempt that failed, or of fewer seeds
    words = ["-m", "fedistill.study.cell", str(out), cell.key, str(os.getpid())]
    process = start_python(words, log_path(out, cell.key))
    return Child(cell=cell, process=process, below={})


def _ended(child: Child, out: Path) -> dict[str, Any]:
    """The record of a cell whose process has ended; one is made where the process was lost."""
    record = record_of(out, child.cell)
    if record is None:
        what = f"exit code {child.process.returncode}"
        record = {"key": child.cell.key, "seeds": child.cell.seeds, "rows": [], "status": "failed", "code": "lost"}
        record |= {"reason": defect(out, child.cell.key, what), "seconds": 0.0}
        stop_engine(child.process, child.below)
        write_json(record_path(out, child.cell.key), record)
    return record


def _stop(children: Sequence[Child]) -> None:
    """End the cells, each in good order, all at the same time."""
    for child in children:
        child.process.terminate()
    until = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop_engine(child.process, child.below)


def _left(seconds: float, ended: Sequence[Cell], left: Sequence[Cell], costs: dict[str, Estimate]) -> str:
    """A guess of the time that is left, by what the cells so far took."""
    done = sum(costs[cell.key].seconds for cell in ended)
    if not left or not done:
        return ""
    return f", about {duration(seconds / done * sum(costs[cell.key].seconds for cell in left))} left"


def _send(study: Study, cells: Sequence[Cell], out: Path, console: Console, tracker: str) -> None:
    """A tracker that cannot be reached stops no study: what it was not sent, it is sent next time."""
    if not tracker:
        return
    try:
        track(tracker, study, cells, out)
    except Exception as error:  # it is a program of others, and mostly a network
        console.print(f"{tracker} did not take the results ({type(error).__name__}): another try later.", markup=False)


def _tell(console: Console, what: str, cells: Sequence[Cell], out: Path) -> None:
    done = sum(finished(out, cell) for cell in cells)
    console.print(f"{done}/{len(cells)} cells. {what}", soft_wrap=True, highlight=False, markup=False)
