"""A live view of a run: folds the lines of `events.jsonl` into one line per site.

The run only appends to the file; the view only reads it. So the view can start late, be absent or fail without any
effect on the run.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedistill.report.tables import duration, plain

SERVER = ""  # the site of the server's own events
POLL_SECONDS = 0.2
QUIET_SECONDS = 10.0  # without a terminal: shortest time between two lines on one site's progress
STYLES = {"done": "green", "failed": "bold red", "late": "yellow"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteState:
    """What the last events said about one site: `time` in unix seconds, `eta` in seconds, 0 or None where unknown."""

    phase: str = ""
    status: str = ""
    step: int = 0
    total: int = 0
    loss: float | None = None
    eta: float | None = None
    message: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class State:
    """Every (seed, site) in the order of its first event, and the seed of the last event."""

    sites: Mapping[tuple[int, str], SiteState] = field(default_factory=dict)
    seed: int = 0


def advance(state: State, event: Mapping[str, Any]) -> State:
    """`state` after one event. Missing fields keep their value, except that a new phase starts empty."""
    seed, site = int(_number(event.get("seed"), state.seed)), _word(event.get("site"))
    old = state.sites.get((seed, site), SiteState())
    phase, status = _word(event.get("phase")) or old.phase, _word(event.get("status")) or "progress"
    if status == "note" and old.phase:  # an aside: it does not end or restart what is going on
        phase, status = old.phase, old.status
    if phase != old.phase or event.get("status") == "start":
        old = SiteState(time=old.time)
    new = replace(
        old,
        phase=phase,
        status=status,
        step=int(_number(event.get("step"), old.step)),
        total=int(_number(event.get("total"), old.total)),
        loss=_number(event.get("loss"), old.loss),
        eta=_number(event.get("eta"), None),
        message=_word(event.get("message")) or old.message,
        time=_number(event.get("t"), old.time),
    )
    return State({**state.sites, (seed, site): new}, seed)


def fold(events: Iterable[Mapping[str, Any]], state: State | None = None) -> State:
    state = state or State()
    for event in events:
        state = advance(state, event)
    return state


def render(state: State) -> RenderableType:
    """One line per site of the current seed, then the server's: phase, bar, step, loss, time left, message."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for title in ("Site", "Phase", "", "Step", "Loss", "Left", ""):
        table.add_column(title, no_wrap=True, justify="right" if title in ("Step", "Loss", "Left") else "left")
    current = {site: line for (seed, site), line in state.sites.items() if seed == state.seed}
    server = {SERVER: current.pop(SERVER)} if SERVER in current else {}
    for site, line in (current | server).items():
        style = STYLES.get(line.status, "")
        table.add_row(
            Text(_name(site), style="bold", overflow="ellipsis"),
            Text(f"{line.phase} {line.status}" if line.status in STYLES else line.phase, style=style),
            ProgressBar(total=line.total, completed=min(line.step, line.total), width=20) if line.total > 0 else "",
            _steps(line),
            "" if line.loss is None else f"{line.loss:.3f}",
            duration(line.eta) if line.eta is not None and line.status not in STYLES else "",
            Text(line.message, style=style, overflow="ellipsis"),
        )
    return Group(Text(f"Seed {state.seed}", style="dim"), table) if state.sites else Text("Waiting for the first event")


def describe(site: str, line: SiteState) -> str:
    """One site in one line of plain text, as in `jtsc: distill 120/500, loss 0.610, 33 s left`."""
    status = line.status if line.status not in ("", "progress") else ""
    parts = [" ".join(part for part in (line.phase, status, _steps(line)) if part)]
    if line.loss is not None:
        parts.append(f"loss {line.loss:.3f}")
    if line.eta is not None and line.status not in STYLES:
        parts.append(f"{duration(line.eta)} left")
    return f"{_name(site)}: {', '.join(parts)}" + (f" – {line.message}" if line.message else "")


def worth_a_line(old: SiteState | None, new: SiteState, printed: float) -> bool:
    """Without a terminal: a new phase, its end, or `QUIET_SECONDS` of the events' time since the line at `printed`."""
    if old is None or new.phase != old.phase:
        return True
    return (new.status in STYLES and new.status != old.status) or new.time - printed >= QUIET_SECONDS


class Tail:
    """Reads the events that were appended to a file since the last call; `path` need not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._offset = offset

    def read(self) -> list[dict[str, Any]]:
        """The new events; a last line without its line break waits for the next call, and other lines are skipped."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:  # the file was started again
                    self._offset = 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole[0]) + len(whole[1])
        events = []
        for line in whole[0].splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
        return events


def follow(path: Path, stop: Callable[[], bool], console: Console, *, offset: int = 0) -> None:
    """Show the events of the growing file at `path` from byte `offset` on, until `stop()` is true and all was shown.

    A terminal gets a table that is drawn again in place; anything else gets one line per piece of news. A view that
    cannot be drawn is given up with a warning in the log; the call still lasts until `stop()`.
    """
    try:
        _show(Tail(Path(path), offset), stop, console)
    except Exception as error:
        log.warning("The live view stopped (%s); the run goes on.", type(error).__name__)
        while not stop():
            time.sleep(POLL_SECONDS)


def _show(tail: Tail, stop: Callable[[], bool], console: Console) -> None:
    state = State()
    if console.is_terminal:
        with Live(render(state), console=console, refresh_per_second=4) as live:
            for events in _batches(tail, stop):
                state = fold(events, state)
                live.update(render(state))
        return
    printed: dict[tuple[int, str], float] = {}
    for events in _batches(tail, stop):
        for event in events:
            before, state = state, advance(state, event)
            changed = next(key for key in state.sites if state.sites[key] is not before.sites.get(key))
            new = state.sites[changed]
            if event.get("status") == "note" or worth_a_line(before.sites.get(changed), new, printed.get(changed, 0.0)):
                printed[changed] = new.time
                console.print(Text(describe(changed[1], new)), soft_wrap=True)


def _batches(tail: Tail, stop: Callable[[], bool]) -> Iterable[list[dict[str, Any]]]:
    while True:
        last = stop()  # asked before reading: what was written before the end is still shown
        yield tail.read()
        if last:
            return
        time.sleep(POLL_SECONDS)


def _name(site: str) -> str:
    return site if site != SERVER else "server"


def _steps(line: SiteState) -> str:
    return f"{line.step}/{line.total}" if line.total > 0 else ""


def _word(value: Any) -> str:
    return plain(value.strip().replace("\n", " ")) if isinstance(value, str) else ""


def _number(value: Any, otherwise: Any) -> Any:
    """`value` if it is a finite number, else `otherwise`."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else otherwise
