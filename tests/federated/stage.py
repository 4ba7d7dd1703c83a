"""What drills are played on: a federation of two sites, a way to the server that can be disturbed, and what should come of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.deploy import read_server
from fedistill.errors import FedistillError
from fedistill.events import read_events
from fedistill.files import read_json
from fedistill.processes import process_tree
from fedistill.rehearsal import Federation, free_port, write_npz
from fedistill.site.gate import identity
from fedistill.synthetic.store import load_set

SITES = ("north", "south")
JOB: dict[str, Any] = {
    "sites": 2, "width": 8, "depth": 2, "experts": 1, "expert_steps": 60, "ipc": 1, "segment": 2, "iterations": 200, "syn_steps": 4,
    "eval_nets": 1, "eval_steps": 5, "eval_models": "mlp", "method": "mtt", "skip_above": 1000.0, "modality": "generic",
    "slice_seconds": 3.0,
}  # fmt: skip
DATA = {"phantom_images": 90, "phantom_classes": 2, "phantom_size": 16, "partition": "iid"}
LONGEST = 1800.0  # seconds of a run
AGAIN = 240.0  # seconds in which the server takes a run again


@dataclass(frozen=True)
class Result:
    """ok: the result is as it should be, or the refusal that should come came. seconds: from the harm to the end of the run, or to
    the refusal. sees: what the operator, or else the site, is told. lost: what had to be done again."""

    drill: str
    ok: bool
    seconds: float
    sees: str
    lost: str


class Proxy(threading.Thread):
    """A way to the server that can be disturbed.

    `cut` halves the next large piece that goes up, and lets nothing through for a while. `hold` keeps every large piece that goes
    up, with all that follows it, until `release`.
    """

    LARGE = 4096  # bytes: more than Flower sends while it asks for work

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.server, self.armed, self.closed_until, self.cuts, self.held = port, 0.0, 0.0, 0, 0
        self.free = threading.Event()
        self.free.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])

    def cut(self, seconds: float) -> None:
        self.armed = seconds

    def hold(self) -> None:
        self.free.clear()

    def release(self) -> None:
        self.free.set()

    def run(self) -> None:
        while True:
            below, _ = self.listener.accept()
            try:
                if time.monotonic() < self.closed_until:
                    raise ConnectionRefusedError
                above = socket.create_connection(("127.0.0.1", self.server))
            except OSError:
                below.close()
                continue
            for pair in ((below, above, True), (above, below, False)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                if up and self.armed and len(piece) >= self.LARGE:
                    self.closed_until, self.armed, self.cuts = time.monotonic() + self.armed, 0.0, self.cuts + 1
                    target.sendall(piece[: len(piece) // 2])
                    break
                if time.monotonic() < self.closed_until:
                    break
                if up and len(piece) >= self.LARGE and not self.free.is_set():
                    self.held += 1
                    self.free.wait()
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Stage:
    """A federation of two sites, north and south, and what an undisturbed run makes for each seed."""

    def __init__(self, folder: Path, kind: type[Federation] = Federation) -> None:
        whole = make_config(DATA | JOB).resolved()
        data = load_data(whole)
        parts = partition(data, whole)
        folder.mkdir(exist_ok=True)
        self.folder, self.files = folder, {name: folder / f"{name}.npz" for name in SITES}
        for place, file in enumerate(self.files.values()):
            write_npz(file, parts.at(data, place))
        self.federation = kind(folder / "federation", self.files, dict.fromkeys(SITES, ""))
        self.proxy: Proxy
        self.mend: list[str] = []  # sites that a drill left stopped

    def __enter__(self) -> Stage:
        self.federation.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.federation.__exit__()

    def proxied(self, site: str) -> None:
        """From now on this site reaches the server through a proxy."""
        policy, server = self.federation.policy(site), read_server(self.federation.server)
        self.proxy = Proxy(server.port)
        self.proxy.start()
        policy.write_text(policy.read_text().replace(server.address, f"127.0.0.1:{self.proxy.port}"))
        self.stop(site)
        self.back(site)

    def site(self, name: str) -> Path:
        return self.federation.folder / name

    def begin(self, name: str, **settings: Any) -> Path:
        """Start a job; its folder."""
        job = self.folder / f"{name}.toml"
        job.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in (JOB | settings).items()))
        self.again(name)
        return self.federation.server / "runs" / name

    def again(self, name: str) -> None:
        """`server run`, until the server takes it: Flower takes a minute or two to notice that a run has ended."""
        end = time.monotonic() + AGAIN
        while True:
            try:
                self.federation.command("server", "run", self.federation.server, self.folder / f"{name}.toml")
                return
            except (FedistillError, subprocess.TimeoutExpired):
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def stop(self, name: str) -> None:
        """A site, or the server, in good order: it can come back at once."""
        self.federation.processes[name].terminate()
        self.federation.processes[name].wait()

    def mended(self) -> None:
        """What a drill left stopped is started."""
        while self.mend:
            site = self.mend.pop()
            self.stop(site)
            self.back(site)

    def back(self, site: str, **environment: str) -> None:
        """Start a site every ten seconds until it stays, as systemd does."""
        end = time.monotonic() + LONGEST
        while True:
            try:
                self.federation.start_site(site, **environment)
                return
            except TimeoutError:
                if time.monotonic() > end:
                    raise
                time.sleep(10)

    @contextmanager
    def kept(self, out: Path) -> Iterator[threading.Event]:
        """Server and sites start again ten seconds after they ended, as under systemd. An operator says `server run` again where
        that is needed: where the event is set, and where the run has ended with an error."""
        over, needed = threading.Event(), threading.Event()

        def keep(name: str) -> None:
            while not over.wait(1):
                if self.federation.processes[name].poll() is not None and not over.wait(10):
                    with suppress(TimeoutError):
                        self.federation.start_server() if name == "server" else self.federation.start_site(name)

        def operate() -> None:
            while not over.wait(5):
                if (out / "summary.json").exists() or not (needed.is_set() or (out / "error.json").exists()):
                    continue
                needed.clear()
                try:
                    self.federation.command("server", "run", self.federation.server, self.folder / f"{out.name}.toml")
                except (FedistillError, subprocess.TimeoutExpired):
                    needed.set()

        threads = [threading.Thread(target=keep, args=(name,)) for name in ("server", *SITES)]
        threads.append(threading.Thread(target=operate))
        for thread in threads:
            thread.start()
        try:
            yield needed
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def wait(self, out: Path, until: Callable[[], bool] = lambda: False) -> str:
        """Until something is the case, or the run has ended: the sentence of its error, if it has one."""
        end = time.monotonic() + LONGEST
        while not until():
            if (out / "summary.json").exists():
                return ""
            if (out / "error.json").exists():
                return str(read_json(out / "error.json")["sentence"])
            if time.monotonic() > end:
                raise TimeoutError(f"{out.name}: {self.told(out)[-6:]}")
            time.sleep(0.1)
        return ""

    def wait_anew(self, out: Path) -> str:
        """`wait`, of a run that ended with an error and was started again."""
        end = time.monotonic() + LONGEST
        while (out / "error.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        return self.wait(out)

    def told(self, out: Path) -> list[str]:
        """What the operator can read of a run."""
        events, _ = read_events(out / "events.jsonl")
        return [": ".join(filter(None, (e.site, e.message))) for e in events if e.message]

    def steps(self, out: Path, site: str) -> list[int]:
        """How far a site was in its distillation, every time that it said so."""
        events, _ = read_events(out / "events.jsonl")
        return [e.step for e in events if e.site == site and e.phase == "distill" and e.step is not None]

    def distils(self, out: Path, site: str = "north") -> Callable[[], bool]:
        """Whether a site is in the middle of its distillation."""
        return lambda: bool(self.steps(out, site))

    def client_of(self, site: str) -> int:
        """The process that works for a run at a site, soon after it has begun."""
        before = self.process(site, "guard.py")
        while (found := self.process(site, "guard.py")) == before:
            time.sleep(0.02)
        time.sleep(1)
        return found

    def process(self, name: str, words: str) -> int:
        """A process below the server or a site with these words in its command line."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if (found := self.find(name, words)) is not None:
                return found
            time.sleep(0.02)
        raise TimeoutError(f"{name} has no process {words}")

    def find(self, name: str, words: str) -> int | None:
        """`process`, where there is one now."""
        for pid in process_tree(self.federation.processes[name].pid):
            with suppress(OSError):
                if words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def refused_start(self, drill: str, site: str, **environment: str) -> Result:
        """Start a site anew, which must not be let in; and then as it was."""
        self.stop(site)
        self.mend.append(site)
        began, words = (
            time.monotonic(),
            ["site", "start", "--site", self.federation.policy(site), "--port", free_port()],
        )
        self.federation._start(site, words, "SuperNode ID|The SuperNode ended:|Error:", environment)
        let_in = "SuperNode ID" in (self.federation.folder / f"{site}.log").read_text(errors="replace")
        return Result(drill, not let_in, time.monotonic() - began, self.said(site), "nothing")

    def said(self, name: str) -> str:
        """The last sentence of `site start` or `server start` on what is wrong."""
        lines = (self.federation.folder / f"{name}.log").read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith(("The SuperNode ended:", "Error:"))]
        return said[-1].replace(f"{self.federation.folder}/", "") if said else "nothing"

    @contextmanager
    def swapped(self, file: Path, content: bytes) -> Iterator[None]:
        """Another content of a file, for a while."""
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            yield
        finally:
            file.write_bytes(before)

    def expected(self, seed: int, **settings: Any) -> Path:
        """The folder of an undisturbed run in one process, from the same data."""
        place = self.folder / f"expected-{seed}"
        if not place.exists():
            place.mkdir()
            nodes = [real_site(name, place / name, str(file)) for name, file in self.files.items()]
            more = {"seed": seed, "server_data": "none", "out": str(place / "out")}
            serve(LocalGrid(client_app, nodes), make_config(JOB | settings | more).resolved())
        return place / "out"

    def judged(self, drill: str, seed: int, out: Path, harm: float, steps: list[int], **settings: Any) -> Result:
        """Of a run that should end as if nothing had been. steps: of north, before the harm."""
        seconds = time.monotonic() - harm
        after = self.steps(out, "north")[len(steps) :]
        lost = max(max(steps, default=0) - min(after, default=10**9), 0)
        words = f"{lost} iterations" if lost else "at most the slice at work"
        told = [line for line in self.told(out) if "asking again" in line]
        return Result(
            drill,
            set_of(out, seed) == set_of(self.expected(seed, **settings), seed),
            seconds,
            "; ".join(dict.fromkeys(told)) or "nothing",
            words,
        )


def before_all(place: Path) -> str:
    return os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])


def set_of(out: Path, seed: int, site: str = "") -> str:
    """Of a run's merged set, or of that of one site: a hash."""
    return identity(load_set(out / f"seed-{seed}" / (f"round-1/site-{site}" if site else "merged")))


def about(out: Path, name: str) -> dict[str, Any]:
    """What the summary of a run says of a site."""
    return next(site for site in read_json(out / "summary.json")["sites"] if site["name"] == name)


def disturbed(stage: Stage, name: str, seed: int, harm: Callable[[], float], **settings: Any) -> Result:
    """A run to which something is done while north distils; harm: does it, and says when."""
    out = stage.begin(name, seed=seed, **settings)
    stage.wait(out, stage.distils(out))
    steps, when = stage.steps(out, "north"), harm()
    stage.wait(out)
    return stage.judged(name, seed, out, when, steps, **settings)
