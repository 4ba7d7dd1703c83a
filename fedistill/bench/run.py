"""Run a benchmark: plan the cells, let the engine work off those that are missing, make tables and plots of what is there."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fedistill.bench.cells import Record
from fedistill.bench.plan import Cell, Choice, cells_of
from fedistill.bench.plots import write_plots
from fedistill.bench.results import collect, finished, read_rows, write_rows
from fedistill.bench.suite import WHOLE, Suite
from fedistill.bench.tables import markdown
from fedistill.config import make_config
from fedistill.errors import FedistillError
from fedistill.events import refuse_foreign
from fedistill.files import read_json, write_bytes, write_json
from fedistill.processes import alone, start_engine, stop_engine, terminate_is_interrupt, tree_with_times
from fedistill.report.tables import duration
from fedistill.simulation import app_folder

POLL_SECONDS = 0.5
WATCH_SECONDS = 5.0  # between looks at the processes below the engine
WRITE_SECONDS = 60.0  # between writing the results of what is finished so far


def plan(suite: Suite, choice: Choice, out: Path) -> tuple[list[Cell], list[Cell]]:
    """All cells, and those that are not finished yet."""
    cells = cells_of(suite, choice)
    return cells, [cell for cell in cells if not finished(out, cell)]


def plan_table(suite: Suite, cells: Sequence[Cell], todo: Sequence[Cell]) -> Table:
    """A row per data set and method: what it is, and how many of its cells are finished."""
    caption = f"{len(cells)} cells, {len(cells) - len(todo)} of them finished"
    table = Table("data", "method", "", "IPC", "finished", box=None, title=suite.title, caption=caption)
    left = Counter((cell.data, cell.method) for cell in todo)
    for (data, method), count in sorted(Counter((cell.data, cell.method) for cell in cells).items()):
        title = f"{suite.data[data].title}: all real images" if method == WHOLE else suite.methods[method].title
        ipcs = sorted({cell.ipc for cell in cells if (cell.data, cell.method) == (data, method) and cell.ipc})
        table.add_row(data, method, title, ", ".join(map(str, ipcs)), f"{count - left[data, method]} of {count}")
    return table


def bench(suite: Suite, choice: Choice, out: Path, console: Console, *, command: str = "") -> dict[str, Any]:
    """Work off the cells that are not finished in `out`, and write its results; returns numbers of cells and the failures.

    command: what the user typed, to be typed again after an interruption.
    Raises `FedistillError` on bad input before any work starts. Ctrl-C and SIGTERM stop the engine and raise `SystemExit` with
    code 130; what is finished is in the results then, too.
    """
    cells, todo = plan(suite, choice, out)
    refuse_foreign(out, "plan.json", "that of a benchmark", ours=(".lock",))
    with alone(out):
        if todo:
            _work(cells, todo, suite, choice, out, console, command)
        write_results(suite, choice, cells, out)
    return _summary(cells, out)


def write_results(
    suite: Suite, choice: Choice, cells: Sequence[Cell], out: Path, marks: dict[str, str] | None = None
) -> None:
    """`results.csv` from the records, and from it the tables and plots. marks: see `collect`."""
    write_rows(out / "results.csv", collect(out, suite, choice, cells, marks))
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
    """Run the engine on `todo` until it ends; whatever ends it, the results hold what is finished."""
    shared = make_config({**suite.settings, **choice.settings})
    plan = {
        "workers": shared.workers,  # 0: as many as there are cores
        "device": shared.device,
        "first_seed": min(cell.seed for cell in cells),
        "cells": [dataclasses.asdict(cell) for cell in todo],
    }
    write_json(out / "plan.json", plan)
    (out / "progress.json").unlink(missing_ok=True)
    below: dict[int, str] = {}
    marks: dict[str, str] = {}
    child = start_engine(app_folder(), "bench.py", out)
    try:
        with terminate_is_interrupt():
            for state in _states(child, below, out, console, before=len(cells) - len(todo), total=len(cells)):
                if state["done"]:
                    write_results(suite, choice, cells, out, marks)
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


def _states(
    child: Popen[bytes], below: dict[int, str], out: Path, console: Console, *, before: int, total: int
) -> Iterator[Record]:
    """Show how far the engine is until it ends (lines where there is no terminal for a bar); yields now and then.

    below: filled with the processes under the engine and their start times. before, total: finished cells at the start, all.
    """
    state: Record = {"done": 0}
    looked = yielded = time.monotonic()
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total, completed=before)
        running = True
        while running:
            running = child.poll() is None
            time.sleep(POLL_SECONDS if running else 0)
            now = time.monotonic()
            if now - looked > WATCH_SECONDS:
                below.update(tree_with_times(child.pid))
                looked = now
            news = read_json(out / "progress.json") if (out / "progress.json").exists() else state
            if news == state:
                continue
            text = _described(news)
            bar.update(task, completed=before + news["done"], description=text)
            if news["done"] > state["done"] and not console.is_terminal:
                console.print(
                    ", ".join([f"{before + news['done']}/{total} cells", *filter(None, [text])]),
                    soft_wrap=True,
                    highlight=False,
                )
            state = news
            if now - yielded > WRITE_SECONDS:
                yield state
                yielded = time.monotonic()


def _described(state: Record) -> str:
    """Failures, a guess of the time that is left, and what is being done."""
    failed = [f"{state['failed']} failed"] if state["failed"] else []
    left = []
    if state["cost_done"] and state["cost_left"]:
        rate = (state["now"] - state["began"]) / state["cost_done"]
        left = [f"about {duration(rate * state['cost_left'])} left"]
    return ", ".join([*failed, *left, *(f"at work: {'; '.join(state['tasks'])}" for _ in state["tasks"][:1])])
