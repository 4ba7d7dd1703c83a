"""The order of the work: experts first, once for all cells that share them, then the cells; each ending is stored at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.bench.cells import Record, about, failure, run_cell, train_experts_of
from fedistill.bench.plan import Cell
from fedistill.bench.results import record_path
from fedistill.files import write_json


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where the work runs. submit: function and arguments to a handle. wait: handles to one whose work has ended. result:
    handle to what the function returned; raises where the process was lost."""

    submit: Callable[..., Any]
    wait: Callable[[Sequence[Any]], Any]
    result: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work for one process: a cell, or the experts that several cells share."""

    name: str
    cells: tuple[Cell, ...]
    cost: float
    needs: str = ""  # the experts that must be there
    makes: str = ""


def tasks_of(cells: Sequence[Cell]) -> list[Task]:
    """Experts first, then the cells in their order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.needs_experts:
            groups.setdefault(cell.experts, []).append(cell)
    experts = [
        Task(
            name=f"{group[0].data}, experts, seed {group[0].seed}",
            cells=tuple(group),
            cost=group[0].config.experts * group[0].config.expert_steps,
            makes=word,
        )
        for word, group in groups.items()
    ]
    return experts + [
        Task(name=c.name, cells=(c,), cost=c.cost, needs=c.experts if c.needs_experts else "") for c in cells
    ]


def work_off(cells: Sequence[Cell], out: Path, engine: Engine, *, workers: int, first_seed: int) -> None:
    """Work off `cells`, at most `workers` tasks at a time; the record of each ends in `out/cells`, failures among them.

    first_seed: the seed of which contact sheets are written. How far it is stands in `progress.json` (see `bench.run`).
    """
    waiting = tasks_of(cells)
    began, cost_done, done, failed = time.time(), 0.0, 0, 0
    trained: set[str] = {""}
    settled: set[str] = set()
    running: dict[Any, Task] = {}

    def tell() -> None:
        progress = {"began": began, "now": time.time(), "cost_done": cost_done, "done": done, "failed": failed}
        progress["cost_left"] = sum(task.cost for task in (*waiting, *running.values()))
        write_json(out / "progress.json", progress | {"tasks": [task.name for task in running.values()]})

    while waiting or running:
        ready = [task for task in waiting if task.needs in trained][: workers - len(running)]
        waiting = [task for task in waiting if task not in ready]
        for task in ready:
            if task.makes:
                running[engine.submit(train_experts_of, task.cells, out)] = task
            else:
                (cell,) = task.cells
                running[engine.submit(run_cell, cell, out, cell.seed == first_seed)] = task
        tell()
        handle = engine.wait(list(running))
        task = running.pop(handle)
        records = _records(task, engine, handle)
        for record in records:
            _store(record, out)
        settled |= {record["key"] for record in records}
        waiting = [t for t in waiting if t.makes or t.cells[0].key not in settled]
        trained.add(task.makes)
        cost_done += task.cost
        done += len(records)
        failed += sum(record["status"] == "failed" for record in records)
    tell()


def _records(task: Task, engine: Engine, handle: Any) -> list[Record]:
    """What a task has settled: its cell; or, of experts, the cells that cannot go on."""
    try:
        result = engine.result(handle)
    except Exception as error:  # the process was killed, or its machine was lost
        return [about(cell) | failure(error) for cell in task.cells]
    return list(result.values()) if task.makes else [result]


def _store(record: Record, out: Path) -> None:
    trace = record.pop("trace", "")
    if trace:
        print(f"{record['data']}, {record['method']}, seed {record['seed']}:\n{trace}", file=sys.stderr, flush=True)
    write_json(record_path(out, record["key"]), record)
