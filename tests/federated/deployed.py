"""A server and its sites on this machine, set up and run with the commands that operators and hospitals use."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedistill.processes import process_tree

PROGRAM = str(Path(sys.executable).parent / "fedistill")
SECONDS = 120.0  # that a program may take to start


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fedistill(*words: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [PROGRAM, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Federation:
    """Use it as a context: its processes end with it. sites: name -> data; rules: name -> text that takes the place of the
    policy's tables after [site], but for [connection]."""

    def __init__(self, folder: Path, sites: Mapping[str, Path], rules: Mapping[str, str]) -> None:
        self.server, self.folder = folder / "server", folder
        self._sites, self._rules = sites, rules
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def policy(self, name: str) -> Path:
        return self.folder / name / "site.toml"

    def __enter__(self) -> Federation:
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        self.folder.mkdir()
        port = free_port()
        fedistill("server", "init", self.server, "--address", f"127.0.0.1:{port}", "--port", port)
        self.start_server()
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._admit, self._sites))

    def _admit(self, name: str) -> None:
        told = fedistill("server", "add-site", self.server, name)
        kit, place, policy = self.server / "kits" / f"{name}.zip", self.folder / name, self.policy(name)
        place.mkdir()
        heard = fedistill(
            "site", "init", "--kit", kit, "--data", self._sites[name], "--work", place / "work", "--site", policy
        )
        fingerprint = re.findall(r"[0-9a-f]{4}(?: [0-9a-f]{4}){3}", told)
        assert fingerprint
        assert fingerprint[0] in heard
        head, _, rest = policy.read_text().partition("[privacy]")
        policy.write_text("\n".join([head, self._rules[name], rest[rest.index("[connection]") :]]))
        fedistill("site", "check", "--site", policy)
        fedistill("server", "admit", self.server, name, place / f"{name}.key.pub")
        self.start_site(name)

    def start_server(self) -> None:
        self._start("server", ["server", "start", self.server], "startup complete")

    def start_site(self, name: str, **environment: str) -> None:
        """Raises `TimeoutError` where the site ends, or does not connect."""
        words = ["site", "start", "--site", self.policy(name), "--port", free_port()]
        self._start(name, words, "SuperNode ID", environment)

    def kill(self, name: str) -> None:
        """The server or a site, with all that it started, at once."""
        process = self.processes[name]
        for pid in process_tree(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name)

    def run(self, name: str, settings: Mapping[str, Any], seconds: float) -> Path:
        """Run a job to its end: its folder. Raises `TimeoutError`, with the logs, where it has no summary by then."""
        job = self.folder / f"{name}.toml"
        job.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        fedistill("server", "run", self.server, job)
        out, end = self.server / "runs" / name, time.monotonic() + seconds
        while not (out / "summary.json").exists():
            if time.monotonic() > end or (out / "error.json").exists():
                raise TimeoutError("\n".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("*.log"))))
            time.sleep(0.2)
        return out

    def _start(self, name: str, words: Sequence[object], ready: str, more: Mapping[str, str] | None = None) -> None:
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [PROGRAM, *map(str, words)],
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(more or {}),
            )
        self.processes[name] = process
        end = time.monotonic() + SECONDS
        while not re.search(ready, log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > end:
                raise TimeoutError(f"{name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
