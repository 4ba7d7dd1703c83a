"""Child processes in good order: start one, see what is below it, end all of it; and one process per folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import fedistill
from fedistill.errors import FedistillError

STOP_SECONDS = 15.0
CLEANING_SECONDS = 5.0
CLUSTER_SECONDS = 10.0  # until a Ray cluster must have answered


def start_engine(app: Path, script: str, out: Path) -> subprocess.Popen[bytes]:
    """Run `simulations/<script> OUT PARENT` of `app` as a child process; what it says goes to `log.txt` in `out`.

    Raises `FedistillError` as `check_cluster` does.
    """
    check_cluster()
    return start_python([str(app / "simulations" / script), str(out), str(os.getpid())], out / "log.txt", str(app))


def check_cluster() -> None:
    """Raise `FedistillError` ("no-cluster") where RAY_ADDRESS names a cluster that does not answer: Ray tries for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", "local" or nothing
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CLUSTER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError):
        sentence = f"RAY_ADDRESS={address}, but no Ray cluster answers there: start it, or unset RAY_ADDRESS."
        raise FedistillError("no-cluster", sentence) from None


def start_python(words: Sequence[str], log: Path, *paths: str) -> subprocess.Popen[bytes]:
    """Run Python with `words` as a child process that finds this library, and `paths`; what it says is added to `log`."""
    found = [*paths, str(Path(fedistill.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in found if p), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for us; we stop the child in good order
        )


def stop_engine(child: subprocess.Popen[bytes], below: dict[int, str]) -> None:
    """End the engine, and what is left of the processes that were seen `below` it: Ray's helpers outlive a crash."""
    below.update(tree_with_times(child.pid))
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    end_all(below)


def end_all(processes: Mapping[int, str]) -> None:
    """End these processes, by number and start time, at once, and return when they are gone: a large one takes a while to die.

    Those that clean up after processes which were killed have a moment for it: images lie in shared memory.
    """
    began_at = time.monotonic()
    while left := [pid for pid, began in processes.items() if began and start_time(pid) == began]:
        waited = time.monotonic() - began_at
        for pid in left:
            if waited > CLEANING_SECONDS or "resource_tracker" not in _text(pid, "cmdline"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if waited > STOP_SECONDS:
            return
        time.sleep(0.01)


@contextmanager
def terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM, and the end of a terminal, raise KeyboardInterrupt as Ctrl-C does; only the main thread may and need ask for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if n is not None]
    before = {n: signal.getsignal(n) for n in numbers}
    try:
        for n in numbers:
            if before[n] is not signal.SIG_IGN:  # as under nohup
                signal.signal(n, interrupt)
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler or signal.SIG_DFL)


@contextmanager
def alone(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder's lock. Raises `FedistillError` ("busy") if another process works in it, unless it is to be waited for."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            raise FedistillError("busy", f"Another process is working in {out}: wait for it, or stop it.") from None
        yield


def process_tree(root: int) -> list[int]:
    """`root` and all processes below it; empty where there is no /proc."""
    parents = {pid: int(fields[1]) for pid, fields in ((p, _stat(p)) for p in _pids()) if fields}
    found = [root] if root in parents else []
    for pid in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def tree_with_times(root: int) -> dict[int, str]:
    """`root` and all processes below it, each with its start time: as long as it matches, the number is of the same process."""
    return {pid: start_time(pid) for pid in process_tree(root)}


def _pids() -> list[int]:
    proc = Path("/proc")
    return [int(p.name) for p in proc.iterdir() if p.name.isdigit()] if proc.is_dir() else []


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on (state, parent, ...); empty if the process is gone."""
    return _text(pid, "stat").rpartition(")")[2].split()


def start_time(pid: int) -> str:
    """The start time, which tells a process from a later one with the same number; empty if it is gone or dead."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


def memory_of(pid: int) -> int:
    """Bytes of a process; pages that it shares are counted in part."""
    lines = _text(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")  # a path may be in any encoding
    except OSError:
        return ""
