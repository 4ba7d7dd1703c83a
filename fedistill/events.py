"""The event log of a run and the claim on its folder: what the server writes, and everything that watches reads."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.files import read_json, write_json

PHASES = ("describe", "experts", "distill", "release", "collect", "evaluate", "report")
STATUSES = ("start", "progress", "done", "failed", "late", "note")


@dataclass(frozen=True)
class Event:
    """One line of `events.jsonl`. `site` is empty for what concerns the whole run; times are seconds."""

    t: float
    seed: int
    site: str
    phase: str
    status: str
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    eta: float | None = None
    message: str = ""


@dataclass(frozen=True)
class EventLog:
    """Appends to an event log; a line that a killed writer left unfinished stays a line of its own."""

    path: Path

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def add(self, seed: int, site: str, phase: str, status: str, **more: Any) -> Event:
        """Write one event, in one system call: other threads and readers see whole lines.

        Raises `ValueError` on a phase or status that readers do not know.
        """
        if phase not in PHASES or status not in STATUSES:
            raise ValueError(f"unknown event {phase}/{status}")
        event = Event(round(time.time(), 3), seed, site, phase, status, **more)
        line = json.dumps(dataclasses.asdict(event), ensure_ascii=False) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode(errors="replace"))
        return event


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Events from byte `offset` on, and the offset to go on from; a line still being written is left for next time."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            raw = file.read()
    except FileNotFoundError:
        return [], offset
    whole = raw[: raw.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        try:
            events.append(Event(**json.loads(line)))
        except (ValueError, TypeError):  # the stump that a killed writer left
            continue
    return events, offset + len(whole)


def claim_folder(folder: Path, config: Config) -> None:
    """Make `folder` the run folder of `config`, or go on with the run that it holds.

    Keys of scope "run" may differ, so that a run can go on with more seeds or another deadline. A key that is younger than the
    run had its default.
    Raises `FedistillError` ("other-run") if the folder belongs to a run with other settings or to something else, and if its
    report is about more seeds, which one about fewer would take the place of.
    """
    path = folder / "config.json"
    if path.exists():
        try:
            before = dict(read_json(path))
        except (ValueError, TypeError):
            raise FedistillError("other-run", f"{path} is not the configuration of a run.") from None
        known = {f.name: f for f in dataclasses.fields(Config)}
        before, now = {k: f.default for k, f in known.items()} | before, config.to_dict()
        differs = sorted(k for k, f in known.items() if f.metadata["scope"] != "run" and before[k] != now[k])
        if differs:
            what = ", ".join(f"{k} was {before.get(k)!r} and is now {now[k]!r}" for k in differs[:3])
            raise FedistillError(
                "other-run", f"The folder {folder} holds a run with other settings ({what}): choose another folder."
            )
        summary = folder / "summary.json"
        done = len(read_json(summary)["seeds"]) if summary.exists() else 0
        if done > config.seeds:
            raise FedistillError(
                "other-run",
                f"The folder {folder} holds the report of a run of {done} seeds: say --seeds {done}, or choose another folder.",
            )
    refuse_foreign(folder)
    write_json(path, config.to_dict())


def refuse_foreign(
    folder: Path, mark: str = "config.json", what: str = "a run", ours: Sequence[str] = ("log.txt", ".lock")
) -> None:
    """Raise `FedistillError` ("other-run") if `folder` is a file or below one, or holds something else than `what`, which has a
    file `mark`.

    ours: what may lie there before that file does.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise FedistillError("other-run", f"{there} is a file: choose another folder.")
    begun = (folder / mark).exists() or not folder.exists()
    if not begun and any(p.name not in ours for p in folder.iterdir()):
        raise FedistillError("other-run", f"The folder {folder} is neither empty nor {what}: choose another folder.")
