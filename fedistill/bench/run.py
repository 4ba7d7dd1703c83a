"""Run a benchmark: plan the cells, let the engine work off those that are missing, make tables and plots of what is there."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fedistill.bench.plan import Cell, Choice, cells_of
from fedistill.bench.plots import write_plots
from fedistill.bench.results import collect, finished, read_rows, write_rows
from fedistill.bench.suite import Suite, load_suite
from fedistill.bench.tables import markdown
from fedistill.config import make_config
from fedistill.errors import FedistillError
from fedistill.files import read_json, write_bytes, write_json
from fedistill.processes import alone, process_tree, start_engine, start_time, stop_engine, terminate_is_interrupt
from fedistill.report.tables import duration
from fedistill.simulation import app_folder

POLL_SECONDS = 0.5
WATCH_SECONDS = 5.0  # between looks at the processes below the engine


def plan(suite: str, choice: Choice, out: Path) -> tuple[list[Cell], list[Cell]]:
    """All cells, and those that are not finished yet."""
    cells = cells_of(load_suite(suite), choice)
    return cells, [cell for cell in cells if not finished(out, cell)]


def plan_table(cells: Sequence[Cell], todo: Sequence[Cell]) -> Table:
    """A row per data set and method: cells that are finished, of how many."""
    table = Table("data", "method", "IPC", "seeds", "finished", box=None)
    left = Counter((cell.data, cell.method) for cell in todo)
    for (data, method), count in Counter((cell.data, cell.method) for cell in cells).items():
        mine = [cell for cell in cells if (cell.data, cell.method) == (data, method)]
        ipcs = ", ".join(str(n) for n in sorted({cell.ipc for cell in mine}) if n)
        seeds = ", ".join(map(str, sorted({cell.seed for cell in mine})))
        table.add_row(data, method, ipcs, seeds, f"{count - left[data, method]} of {count}")
    table.caption = f"{len(cells)} cells, {len(cells) - len(todo)} of them finished"
    return table


def bench(suite: str, choice: Choice, out: Path, console: Console, *, command: str = "") -> dict[str, Any]:
    """Work off the cells that are not finished in `out`, and write its results; returns numbers of cells and the failures.

    command: what the user typed, to be typed again after an interruption.
    Raises `FedistillError` on bad input before any work starts. Ctrl-C and SIGTERM stop the engine and raise `SystemExit` with
    code 130; what is finished is in the results then, too.
    """
    loaded = load_suite(suite)
    cells, todo = plan(suite, choice, out)
    _refuse_foreign(out)
    with alone(out):
        if todo:
            _work(cells, todo, loaded, choice, out, console, command)
        write_results(loaded, choice, cells, out)
    return _summary(cells, out)


def write_results(suite: Suite, choice: Choice, cells: Sequence[Cell], out: Path) -> None:
    """`results.csv` from the records, and from it the tables and plots."""
    write_rows(out / "results.csv", collect(out, suite, choice, cells))
    write_tables(out)


def write_tables(out: Path) -> None:
    """`tables.md` and the plots in `out`, from its `results.csv` alone. Raises `FedistillError` where there is none."""
    rows = read_rows(out / "results.csv")
    write_bytes(out / "tables.md", markdown(rows).encode())
    write_plots(rows, out)


def _summary(cells: Sequence[Cell], out: Path) -> dict[str, Any]:
    records = [read_json(path) for c in cells if (path := out / "cells" / f"{c.key}.json").exists()]
    failed = [{k: r[k] for k in ("data", "method", "ipc", "seed", "code", "reason")} for r in records if r["code"]]
    return {
        "out": str(out),
        "cells": len(cells),
        "finished": len(records) - len(failed),
        "failed": failed,
        "results": str(out / "results.csv"),
        "tables": str(out / "tables.md"),
    }


def _work(
    cells: Sequence[Cell], todo: Sequence[Cell], suite: Suite, choice: Choice, out: Path, console: Console, command: str
) -> None:
    shared = make_config({**suite.settings, **choice.settings})
    seeds = [cell.seed for cell in cells]
    write_json(
        out / "plan.json",
        {
            "workers": shared.workers,  # 0: as many as there are cores
            "device": shared.device,
            "first_seed": min(seeds),
            "cells": [dataclasses.asdict(cell) for cell in todo],
        },
    )
    (out / "progress.json").unlink(missing_ok=True)
    below: dict[int, str] = {}
    child = start_engine(app_folder(), "bench.py", out)
    try:
        with terminate_is_interrupt():
            _follow(child, below, len(cells) - len(todo), len(cells), out, console)
    except KeyboardInterrupt:
        stop_engine(child, below)
        write_results(suite, choice, cells, out)
        what = f"Stopped. The same command goes on from here: {command}".removesuffix(": ")
        console.print(what, soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(130) from None
    finally:
        stop_engine(child, below)
    if child.returncode != 0:
        write_results(suite, choice, cells, out)
        raise FedistillError(
            "engine", f"The benchmark ended unexpectedly (exit code {child.returncode}): see {out / 'log.txt'}."
        )


def _follow(child: Popen[bytes], below: dict[int, str], before: int, total: int, out: Path, console: Console) -> None:
    """A bar until the engine ends. below: filled with the processes under the engine and their start times."""
    columns = (
        TextColumn("cells"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}", style="red"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[now]}"),
    )
    looked = 0.0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("cells", total=total, completed=before, failed="", left="starting", now="")
        running = True
        while running:
            running = child.poll() is None
            if (path := out / "progress.json").exists():
                state = read_json(path)
                failed = f"{state['failed']} failed" if state["failed"] else ""
                bar.update(
                    task,
                    completed=before + state["done"],
                    failed=failed,
                    left=_left(state),
                    now="; ".join(state["now"]),
                )
            if time.monotonic() - looked > WATCH_SECONDS:
                below.update({pid: start_time(pid) for pid in process_tree(child.pid)})
                looked = time.monotonic()
            time.sleep(POLL_SECONDS if running else 0)


def _left(state: Mapping[str, Any]) -> str:
    """The time that is left, by the guessed cost of what is done and of what is not."""
    if not state["cost_done"]:
        return "time left unknown"
    rate = (time.time() - state["began"]) / state["cost_done"]
    return f"about {duration(rate * (state['cost'] - state['cost_done']))} left"


def _refuse_foreign(out: Path) -> None:
    """Raise `FedistillError` ("other-run") if `out` is a file, or a folder with something else in it than a benchmark."""
    if out.exists() and not out.is_dir():
        raise FedistillError("other-run", f"{out} is a file: choose another folder.")
    if out.exists() and not (out / "plan.json").exists() and any(p.name != ".lock" for p in out.iterdir()):
        raise FedistillError(
            "other-run", f"The folder {out} is neither empty nor that of a benchmark: choose another folder."
        )
