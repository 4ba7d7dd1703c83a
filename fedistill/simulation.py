"""A simulated federation on this machine: check everything, run the engine as a child process, show how it goes."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import fedistill
from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.events import claim_folder, refuse_foreign
from fedistill.files import read_json, write_json
from fedistill.processes import (
    alone,
    memory_of,
    start_engine,
    stop_engine,
    terminate_is_interrupt,
    tree_with_times,
)

if TYPE_CHECKING:
    from fedistill.data.dataset import Dataset

SAMPLE_SECONDS = 2.0


def simulate(config: Config, console: Console, *, command: str = "") -> dict[str, Any]:
    """Run `config` in its folder, or go on with the run that is there; returns the summary.

    command: what the user typed, to be typed again after an interruption.
    Raises `FedistillError` on bad input before any work starts, and when the run fails. Ctrl-C and SIGTERM stop the
    engine and raise `SystemExit` with code 130.
    """
    config = absolute(config.resolved())
    sites = check(config)
    out = Path(config.out)
    refuse_foreign(out)
    with alone(out):
        claim_folder(out, config)
        if not _finished(out, config, sites):
            _run_engine(out, console, command)
        return dict(read_json(out / "summary.json"))


def absolute(config: Config) -> Config:
    """Paths made absolute: the processes of the run have other working directories. A name of data stays one."""
    from fedistill.data.sources import place_of

    def path(text: str) -> str:
        return str(Path(text).expanduser().resolve())

    try:
        place = place_of(config.data)
    except FedistillError:  # there is none: whoever loads the data says so
        place = None
    return replace(
        config,
        data=config.data if place is None else str(place.resolve()),
        partition=path(config.partition) if config.partition.lower().endswith(".json") else config.partition,
        out=path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"),
        work=path(config.work) if config.work else "",
    )


def check(config: Config) -> list[Dataset]:
    """Load and divide the data as every process of the run will, for every seed; returns the first seed's sites.

    Raises `FedistillError` on anything that is wrong.
    """
    # torch takes a second to import: only when a run really starts
    from fedistill.data.sources import load_data
    from fedistill.site.describe import task_of
    from fedistill.site.feasible import check_budget, check_quorum, check_settings

    if config.server_data != "same":
        raise FedistillError(
            "deployment-only", f"server_data={config.server_data} is for real sites: leave it out to simulate."
        )
    data = load_data(config)
    check_settings(config, task_of(data))
    check_budget(config, data)
    sites = list(_divided(config, data))
    check_quorum(config, len(sites))
    for seed in range(config.seed + 1, config.seed + config.seeds):  # now, not after the work of those before
        later = config.with_seed(seed)
        try:
            for _ in _divided(later, load_data(later) if config.data.strip() == "phantom" else data):
                pass
        except FedistillError as error:
            raise FedistillError(error.code, f"With seed {seed}: {error.sentence}") from None
    return sites


def _divided(config: Config, data: Dataset) -> Iterator[Dataset]:
    """Each site of one seed. Raises `FedistillError` where the data cannot be divided, and on a site that has too little."""
    from fedistill.data.partition import partition
    from fedistill.privacy.plan import delta_of, records_of
    from fedistill.site.feasible import check_budget

    parts = partition(data, config)
    for place in range(len(parts)):
        site = parts.at(data, place)
        if data.kind == "multilabel":
            check_budget(config, site)
        if config.privacy == "dp":
            delta_of(config, records_of(site.train, config.unit))
        yield site


def _finished(out: Path, config: Config, sites: list[Dataset]) -> bool:
    """Whether the folder holds the summary of this very run. Raises `FedistillError` if the data have changed since."""
    if not (out / "summary.json").exists():
        return False
    from fedistill.data.dataset import combined
    from fedistill.site.describe import keyed_fingerprint
    from fedistill.site.folder import site_folder

    summary, work = read_json(out / "summary.json"), Path(config.work or out / "work")
    if config.privacy == "dp":
        words = [keyed_fingerprint(site, site_folder(work, site.name), config.unit) for site in sites]
    else:
        words = [site.fingerprint for site in sites]
    if summary["data"]["fingerprint"] != combined(words):
        which = "data" if config.privacy == "none" else "data, or the secrets in the work folder,"
        raise FedistillError("other-run", f"The {which} have changed since the run in {out}: choose another folder.")
    return summary["seeds"] == list(range(config.seed, config.seed + config.seeds))


def app_folder() -> Path:
    """Where `client`, `server` and `simulations` lie: beside the package in a checkout, inside it in a wheel."""
    package = Path(fedistill.__file__).resolve().parent
    beside = package.parent
    return beside if (beside / "simulations" / "engine.py").exists() else package / "_app"


def _run_engine(out: Path, console: Console, command: str) -> None:
    from fedistill.report.live import follow

    (out / "error.json").unlink(missing_ok=True)
    events = out / "events.jsonl"
    seen = events.stat().st_size if events.exists() else 0  # what an earlier part of this run has shown already
    child = start_engine(app_folder(), "engine.py", out)
    below: dict[int, str] = {}
    meter = threading.Thread(target=_measure, args=(child, below, out / "engine.json", command), daemon=True)
    meter.start()
    try:
        with terminate_is_interrupt():
            follow(out / "events.jsonl", lambda: child.poll() is not None, console, offset=seen)
            child.wait()
    except KeyboardInterrupt:
        stop_engine(child, below)
        what = f"Stopped. The same command goes on from here: {command}".removesuffix(": ")
        console.print(what, soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(130) from None
    finally:
        stop_engine(child, below)
        meter.join(SAMPLE_SECONDS + 1)
    if (out / "error.json").exists():
        error = read_json(out / "error.json")
        raise FedistillError(error["code"], error["sentence"])
    if child.returncode != 0:
        raise FedistillError(
            "engine", f"The simulation ended unexpectedly (exit code {child.returncode}): see {out / 'log.txt'}."
        )


def _measure(child: subprocess.Popen[bytes], below: dict[int, str], path: Path, command: str) -> None:
    """Keep `path` up to date while the engine runs: the summary is written before it ends. Adds to an earlier part.

    below: filled with the processes under the engine and their start times.
    """
    before = read_json(path) if path.exists() else {}
    peak, began, running = int(before.get("peak_memory_bytes") or 0), time.monotonic(), True
    while running:
        running = _wait(child, SAMPLE_SECONDS)
        tree = tree_with_times(child.pid)
        below.update(tree)
        peak = max(peak, sum(map(memory_of, tree)))
        seconds = before.get("seconds", 0.0) + time.monotonic() - began
        write_json(path, {"peak_memory_bytes": peak or None, "seconds": seconds, "command": command})


def _wait(child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Sleep for `seconds` or until the child ends; whether it still runs."""
    end = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    return child.poll() is None
