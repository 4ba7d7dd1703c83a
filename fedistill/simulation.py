"""A simulated federation on this machine: check everything, run the engine as a child process, show how it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

import fedistill
from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.events import claim_folder, refuse_foreign
from fedistill.files import read_json, write_json

SAMPLE_SECONDS = 2.0
STOP_SECONDS = 15.0


def simulate(config: Config, console: Console, *, command: str = "") -> dict[str, Any]:
    """Run `config` in its folder, or go on with the run that is there; returns the summary.

    command: what the user typed, to be typed again after an interruption.
    Raises `FedistillError` on bad input before any work starts, and when the run fails. Ctrl-C and SIGTERM stop the
    engine and raise `SystemExit` with code 130.
    """
    config = absolute(config.resolved())
    fingerprint = check(config)
    out = Path(config.out)
    refuse_foreign(out)
    with _alone(out):
        claim_folder(out, config)
        if not _finished(out, config, fingerprint):
            _run_engine(out, console, command)
        return dict(read_json(out / "summary.json"))


def absolute(config: Config) -> Config:
    """Paths made absolute: the processes of the run have other working directories."""

    def path(text: str) -> str:
        return str(Path(text).expanduser().resolve())

    return replace(
        config,
        data=path(config.data) if Path(config.data).expanduser().exists() else config.data,
        partition=path(config.partition) if config.partition.lower().endswith(".json") else config.partition,
        out=path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"),
        work=path(config.work) if config.work else "",
    )


def check(config: Config) -> str:
    """Load and divide the data as every process of the run will; returns the fingerprint of the first seed's sites.

    Raises `FedistillError` on anything that is wrong.
    """
    # torch takes a second to import: only when a run really starts
    from fedistill.data.dataset import combined
    from fedistill.data.partition import partition
    from fedistill.data.sources import load_data
    from fedistill.site.describe import task_of
    from fedistill.site.feasible import check_budget, check_settings

    if config.server_data != "same":
        raise FedistillError(
            "deployment-only", f"server_data={config.server_data} is for real sites: leave it out to simulate."
        )
    data = load_data(config)
    check_settings(config, task_of(data))
    check_budget(config, data)
    parts = partition(data, config)
    sites = [parts.at(data, place) for place in range(len(parts))]
    if data.kind == "multilabel":
        for site in sites:
            check_budget(config, site)
    return combined(site.fingerprint for site in sites)


def _finished(out: Path, config: Config, fingerprint: str) -> bool:
    """Whether the folder holds the summary of this very run. Raises `FedistillError` if the data have changed since."""
    if not (out / "summary.json").exists():
        return False
    summary = read_json(out / "summary.json")
    if summary["data"]["fingerprint"] != fingerprint:
        raise FedistillError("other-run", f"The data have changed since the run in {out}: choose another folder.")
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
    app = app_folder()
    paths = [str(app), str(Path(fedistill.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    with open(out / "log.txt", "ab") as log:
        child = subprocess.Popen(
            [sys.executable, str(app / "simulations" / "engine.py"), str(out), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for us; we stop the engine in good order
        )
    below: dict[int, str] = {}
    meter = threading.Thread(target=_measure, args=(child, below, out / "engine.json", command), daemon=True)
    meter.start()
    try:
        with _terminate_is_interrupt():
            follow(out / "events.jsonl", lambda: child.poll() is not None, console, offset=seen)
            child.wait()
    except KeyboardInterrupt:
        _stop(child, below)
        what = f"Stopped. The same command goes on from here: {command}".removesuffix(": ")
        console.print(what, soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(130) from None
    finally:
        _stop(child, below)
        meter.join(SAMPLE_SECONDS + 1)
    if (out / "error.json").exists():
        error = read_json(out / "error.json")
        raise FedistillError(error["code"], error["sentence"])
    if child.returncode != 0:
        raise FedistillError(
            "engine", f"The simulation ended unexpectedly (exit code {child.returncode}): see {out / 'log.txt'}."
        )


def _stop(child: subprocess.Popen[bytes], below: dict[int, str]) -> None:
    """End the engine, and what is left of the processes that were seen `below` it: Ray's helpers outlive a crash."""
    below.update({pid: _started(pid) for pid in _tree(child.pid)})
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pid, started in list(below.items()):
        if started and _started(pid) == started:  # not another process under the same number
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does; only the main thread may and need ask for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises `FedistillError` ("busy") if another process works in it."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FedistillError("busy", f"Another process is working in {out}: wait for it, or stop it.") from None
        yield


def _measure(child: subprocess.Popen[bytes], below: dict[int, str], path: Path, command: str) -> None:
    """Keep `path` up to date while the engine runs: the summary is written before it ends. Adds to an earlier part.

    below: filled with the processes under the engine and their start times.
    """
    before = read_json(path) if path.exists() else {}
    peak, began, running = int(before.get("peak_memory_bytes") or 0), time.monotonic(), True
    while running:
        running = _wait(child, SAMPLE_SECONDS)
        tree = _tree(child.pid)
        below.update({pid: _started(pid) for pid in tree})
        peak = max(peak, sum(map(_memory, tree)))
        seconds = before.get("seconds", 0.0) + time.monotonic() - began
        write_json(path, {"peak_memory_bytes": peak or None, "seconds": seconds, "command": command})


def _wait(child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Sleep for `seconds` or until the child ends; whether it still runs."""
    end = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    return child.poll() is None


def _tree(root: int) -> list[int]:
    """`root` and all processes below it; empty where there is no /proc."""
    parents = {pid: int(fields[1]) for pid, fields in ((p, _stat(p)) for p in _pids()) if fields}
    found = [root] if root in parents else []
    for pid in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _pids() -> list[int]:
    proc = Path("/proc")
    return [int(p.name) for p in proc.iterdir() if p.name.isdigit()] if proc.is_dir() else []


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on (state, parent, ...); empty if the process is gone."""
    return _text(pid, "stat").rpartition(")")[2].split()


def _started(pid: int) -> str:
    """The start time, which tells a process from a later one with the same number; empty if it is gone or dead."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def _memory(pid: int) -> int:
    """Bytes of a process; pages that it shares are counted in part."""
    lines = _text(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
