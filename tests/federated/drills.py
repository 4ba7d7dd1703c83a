"""Things that go wrong between hospitals, done for real to processes on this machine: what is lost, and how long it takes.

    PYTHONPATH=. python tests/federated/drills.py --out drills.csv [NAME ...]

One server with TLS and two sites, set up with the commands that people use. Every drill runs the same job under another seed,
does its harm, and compares the merged set with that of an undisturbed run: `lost` says what had to be done again.
A drill that is in the file already is not done again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.deploy import HERE, environment, make_site_key, read_server, run_words
from fedistill.errors import FedistillError
from fedistill.events import read_events
from fedistill.files import read_json
from fedistill.processes import process_tree
from fedistill.rehearsal import Federation, fedistill, write_npz
from fedistill.simulation import app_folder
from fedistill.site.gate import identity
from fedistill.synthetic.store import load_set

SITES = ("north", "south")
JOB: dict[str, Any] = {
    "sites": 2, "width": 8, "depth": 2, "experts": 1, "expert_steps": 60, "ipc": 1, "segment": 2, "iterations": 400, "syn_steps": 4,
    "eval_nets": 1, "eval_steps": 5, "eval_models": "mlp", "method": "mtt", "skip_above": 1000.0, "modality": "generic",
    "slice_seconds": 3.0,
}  # fmt: skip
DATA = {"phantom_images": 90, "phantom_classes": 2, "phantom_size": 16, "partition": "iid"}
LONGEST = 900.0  # seconds of a run
OUTSIDE = 40.0  # seconds that a site that must not be let in is waited for
CLOCK = """\
import datetime
real = datetime.datetime
class Fast(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(minutes=10)
datetime.datetime = Fast
"""
NEWER = """\
import fedistill.config
fedistill.config.ALGORITHM += 1000
"""


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
    """A way to the server that can be cut: `cut` halves the next large piece that goes up, and lets nothing through for a while."""

    LARGE = 4096  # bytes: more than Flower sends while it asks for work

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.server, self.armed, self.closed_until, self.cuts = port, 0.0, 0.0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])

    def cut(self, seconds: float) -> None:
        self.armed = seconds

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
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Stage:
    """A federation of two sites, north and south, and what an undisturbed run makes for each seed."""

    def __init__(self, folder: Path) -> None:
        whole = make_config(DATA | JOB).resolved()
        data = load_data(whole)
        parts = partition(data, whole)
        self.folder, self.files = folder, {name: folder / f"{name}.npz" for name in SITES}
        for place, file in enumerate(self.files.values()):
            write_npz(file, parts.at(data, place))
        self.federation = Federation(folder / "federation", self.files, dict.fromkeys(SITES, ""))
        self.proxy: Proxy
        self.mend: list[str] = []  # sites that a drill left stopped

    def __enter__(self) -> Stage:
        """South reaches the server through a proxy."""
        self.federation.__enter__()
        policy, server = self.federation.policy("south"), read_server(self.federation.server)
        self.proxy = Proxy(server.port)
        self.proxy.start()
        self.federation.kill("south")
        policy.write_text(policy.read_text().replace(server.address, f"127.0.0.1:{self.proxy.port}"))
        self.back("south")
        return self

    def __exit__(self, *_: object) -> None:
        self.federation.__exit__()

    def site(self, name: str) -> Path:
        return self.federation.folder / name

    def begin(self, name: str, **settings: Any) -> Path:
        """Start a job; its folder."""
        job = self.folder / f"{name}.toml"
        job.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in (JOB | settings).items()))
        self.again(name)
        return self.federation.server / "runs" / name

    def again(self, name: str) -> None:
        """`server run`, until the server takes it: one that was just started may not be ready."""
        end = time.monotonic() + 60
        while True:
            try:
                fedistill("server", "run", self.federation.server, self.folder / f"{name}.toml")
                return
            except FedistillError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def stop(self, site: str) -> None:
        """In good order: it can come back at once."""
        self.federation.processes[site].terminate()
        self.federation.processes[site].wait()

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
        return [f"{e.site}: {e.message}" for e in read_events(out / "events.jsonl")[0] if e.message]

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
            for pid in process_tree(self.federation.processes[name].pid):
                with suppress(OSError):
                    if words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return pid
            time.sleep(0.02)
        raise TimeoutError(f"{name} has no process {words}")

    def refused_start(self, drill: str, site: str, **environment: str) -> Result:
        """Start a site anew, which must not be let in; and then as it was."""
        self.stop(site)
        began = time.monotonic()
        try:
            with patch("fedistill.rehearsal.SECONDS", OUTSIDE):
                self.federation.start_site(site, **environment)
            let_in, seconds = True, time.monotonic() - began
            self.federation.kill(site)
        except TimeoutError:
            let_in, seconds = False, time.monotonic() - began
        lines = (self.federation.folder / f"{site}.log").read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith(("The SuperNode", "Error:"))]
        self.mend.append(site)
        return Result(drill, not let_in, seconds, said[-1] if said else "nothing", "nothing")

    @contextmanager
    def swapped(self, file: Path, content: bytes) -> Iterator[None]:
        """Another content of a file, for a while."""
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            yield
        finally:
            file.write_bytes(before)

    def expected(self, seed: int, **settings: Any) -> str:
        """The merged set of an undisturbed run in one process, from the same data."""
        place = self.folder / f"expected-{seed}"
        place.mkdir()
        nodes = [real_site(name, place / name, str(file)) for name, file in self.files.items()]
        config = make_config(
            JOB | settings | {"seed": seed, "server_data": "none", "out": str(place / "out")}
        ).resolved()
        serve(LocalGrid(client_app, nodes), config)
        return set_of(place / "out", seed)

    def judged(self, drill: str, seed: int, out: Path, harm: float, steps: list[int], **settings: Any) -> Result:
        """Of a run that should end as if nothing had been. steps: of north, before the harm."""
        seconds = time.monotonic() - harm
        after = self.steps(out, "north")[len(steps) :]
        lost = max(max(steps, default=0) - min(after, default=10**9), 0)
        words = f"{lost} iterations" if lost else "at most the slice at work"
        told = [line for line in self.told(out) if "asking again" in line]
        return Result(
            drill,
            set_of(out, seed) == self.expected(seed, **settings),
            seconds,
            "; ".join(dict.fromkeys(told)) or "nothing",
            words,
        )


def before_all(place: Path) -> str:
    return os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])


def set_of(out: Path, seed: int) -> str:
    return identity(load_set(out / f"seed-{seed}" / "merged"))


def disturbed(stage: Stage, name: str, seed: int, harm: Callable[[], float]) -> Result:
    """A run to which something is done while north distils; harm: does it, and says when."""
    out = stage.begin(name, seed=seed)
    stage.wait(out, stage.distils(out))
    steps, when = stage.steps(out, "north"), harm()
    stage.wait(out)
    return stage.judged(name, seed, out, when, steps)


def client_killed(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of the process that works at a site"""

    def harm() -> float:
        client = stage.client_of("north")
        os.kill(client, signal.SIGKILL)
        return time.monotonic()

    return disturbed(stage, name, seed, harm)


def site_killed(stage: Stage, name: str, seed: int, **environment: str) -> Result:
    """kill -9 of everything at a site, which then starts again"""

    def harm() -> float:
        when = time.monotonic()
        stage.federation.kill("north")
        stage.back("north", **environment)
        return when

    return disturbed(stage, name, seed, harm)


def run_killed(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of the server's part of a run; the same command again"""

    def harm() -> float:
        when = time.monotonic()
        os.kill(stage.process("server", "flwr-serverapp"), signal.SIGKILL)
        time.sleep(5)
        stage.again(name)
        return when

    return disturbed(stage, name, seed, harm)


def server_killed(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of everything at the server, which then starts again; the same command again"""

    def harm() -> float:
        when = time.monotonic()
        stage.federation.kill("server")
        stage.federation.start_server()
        stage.again(name)
        return when

    return disturbed(stage, name, seed, harm)


def upload_cut(stage: Stage, name: str, seed: int) -> Result:
    """The network breaks in the middle of an upload, for 20 s"""
    out = stage.begin(name, seed=seed, ipc=20)
    stage.wait(out, stage.distils(out, "south"))
    steps, harm = stage.steps(out, "north"), time.monotonic()
    stage.proxy.cut(20)
    stage.wait(out)
    assert stage.proxy.cuts == 1
    return stage.judged(name, seed, out, harm, steps, ipc=20)


def disk_full(stage: Stage, name: str, seed: int) -> Result:
    """A site's disk is full; then it is not, and the same command again"""
    work = stage.site("south") / "work"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(work)], check=True)
    try:
        out = stage.begin(name, seed=seed, quorum=2)
        stage.wait(out, stage.distils(out, "south"))
        steps, harm = stage.steps(out, "north"), time.monotonic()
        with suppress(OSError), open(work / "filler", "wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        said = stage.wait(out)
        (work / "filler").unlink()
        stage.again(name)
        stage.wait_anew(out)
        result = stage.judged(name, seed, out, harm, steps)
        return replace(result, ok=result.ok and "disk" in said, sees=said)
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)


def work_torn(stage: Stage, name: str, seed: int) -> Result:
    """A site's machine dies and leaves half a file; it is removed, as the site is told, and the same command again"""
    out = stage.begin(name, seed=seed, quorum=2)
    stage.wait(out, stage.distils(out, "south"))
    stage.federation.kill("south")
    steps, harm = stage.steps(out, "north"), time.monotonic()
    torn = max((stage.site("south") / "work").rglob("state.safetensors"), key=lambda file: file.stat().st_mtime)
    torn.write_bytes(torn.read_bytes()[:1000])
    stage.back("south")
    said = stage.wait(out)
    errors = (stage.site("south") / "work" / "errors.log").read_text()
    torn.unlink()
    stage.again(name)
    stage.wait_anew(out)
    result = stage.judged(name, seed, out, harm, steps)
    return replace(result, ok=result.ok and str(torn) in errors and str(torn) not in said, sees=said)


def two_at_once(stage: Stage, name: str, seed: int) -> Result:
    """Two runs on the same sites at the same time"""
    harm = time.monotonic()
    first, second = stage.begin(name, seed=seed), stage.begin(f"{name}-2", seed=seed + 100)
    stage.wait(first)
    stage.wait(second)
    one = stage.judged(name, seed, first, harm, [])
    two = stage.judged(name, seed + 100, second, harm, [])
    return replace(one, ok=one.ok and two.ok, sees="both runs", lost="nothing")


def clock_off(stage: Stage, name: str, seed: int) -> Result:
    """A site's clock is ten minutes fast"""
    place = stage.folder / "late"
    place.mkdir()
    (place / "sitecustomize.py").write_text(CLOCK)
    return stage.refused_start(name, "south", PYTHONPATH=before_all(place))


def wrong_authority(stage: Stage, name: str, seed: int) -> Result:
    """A server that another authority vouches for"""
    other = stage.folder / "other"
    fedistill("server", "init", other, "--address", "127.0.0.1")
    with stage.swapped(stage.site("south") / "south.ca.crt", (other / "pki" / "ca.crt").read_bytes()):
        return stage.refused_start(name, "south")


def unknown_key(stage: Stage, name: str, seed: int) -> Result:
    """A key that was never admitted"""
    place = stage.folder / "stranger"
    make_site_key(place)
    with stage.swapped(stage.site("south") / "south.key", place.read_bytes()):
        return stage.refused_start(name, "south")


def key_twice(stage: Stage, name: str, seed: int) -> Result:
    """A second machine with the key of a site that is connected"""
    with stage.swapped(stage.site("south") / "south.key", (stage.site("north") / "north.key").read_bytes()):
        result = stage.refused_start(name, "south")
    stage.mended()
    out = stage.begin(name, seed=seed)
    stage.wait(out)
    return replace(result, ok=result.ok and set_of(out, seed) == stage.expected(seed))


def never_answers(stage: Stage, name: str, seed: int) -> Result:
    """A site that stops in the middle and does not come back: after `deadline` the run goes on without it"""
    out = stage.begin(name, seed=seed, deadline=240.0, quorum=1)
    stage.wait(out, stage.distils(out, "south"))
    harm = time.monotonic()
    stage.federation.kill("south")
    stage.wait(out)
    made = load_set(out / f"seed-{seed}" / "merged")
    sites = {site["site"]: site for site in read_json(out / "summary.json")["sites"]}
    stage.back("south")
    ok = made.sites == ("north",) and sites["south"]["status"] == "late"
    return Result(name, ok, time.monotonic() - harm, f"south: {sites['south']['reason']}", "that site's part")


def wrong_data(stage: Stage, name: str, seed: int) -> Result:
    """A site whose classes have other names"""
    file, began = stage.files["south"], time.monotonic()
    with np.load(file) as found:
        arrays = dict(found) | {"class_names": np.array(["cat", "dog"])}
    changed = io.BytesIO()
    np.savez(changed, **arrays)
    with stage.swapped(file, changed.getvalue()):
        said = stage.wait(stage.begin(name, seed=seed, quorum=1))
    return Result(name, "class" in said, time.monotonic() - began, said, "nothing: no site had begun")


def policy_refuses(stage: Stage, name: str, seed: int) -> Result:
    """A job that one site's policy does not allow"""
    policy, began = stage.federation.policy("south"), time.monotonic()
    with stage.swapped(policy, policy.read_bytes() + b'[jobs]\nmethod = ["sketch"]\n'):
        out = stage.begin(name, seed=seed, quorum=1)
        stage.wait(out)
    told = [line for line in stage.told(out) if "not allowed" in line]
    ok = bool(told) and load_set(out / f"seed-{seed}" / "merged").sites == ("north",)
    return Result(name, ok, time.monotonic() - began, "; ".join(told), "that site's part")


def other_code(stage: Stage, name: str, seed: int) -> Result:
    """A server that sends other code than the sites installed; one site approves it and the other does not"""
    app, began = stage.folder / "app", time.monotonic()
    shutil.copytree(app_folder() / "client", app / "client", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(app_folder() / "server", app / "server", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(app_folder() / file, app / file)
    with open(app / "client" / "app.py", "a") as code:
        code.write(f"\nPath({str(stage.folder / 'ran')!r}).touch()\n")
    out = stage.federation.server / "runs" / name
    settings = JOB | {"seed": seed, "quorum": 1, "server_data": "none", "out": str(out)}
    server = read_server(stage.federation.server)

    def run() -> None:
        env = environment(server.folder / "flower")
        subprocess.run(
            ["flwr", "run", str(app), HERE, "-c", run_words(settings)], env=env, check=True, capture_output=True
        )

    run()
    said = stage.wait(out)
    refused = not (stage.folder / "ran").exists() and "was not approved" in said
    waiting = json.loads(fedistill("site", "code", "--json", "--site", stage.federation.policy("north")))
    fedistill("site", "approve", waiting[0]["id"], "--site", stage.federation.policy("north"))
    run()
    stage.wait_anew(out)
    ran = (stage.folder / "ran").exists() and load_set(out / f"seed-{seed}" / "merged").sites == ("north",)
    return Result(name, refused and ran, time.monotonic() - began, said, "that site's part")


def upgraded(stage: Stage, name: str, seed: int) -> Result:
    """A site's fedistill changes between two slices so that stored work no longer counts"""
    place = stage.folder / "newer"
    place.mkdir()
    (place / "sitecustomize.py").write_text(NEWER)
    result = site_killed(stage, name, seed, PYTHONPATH=before_all(place))
    stage.federation.kill("north")
    stage.back("north")
    return result


DRILLS: dict[str, Callable[[Stage, str, int], Result]] = {
    "client-killed": client_killed,
    "site-killed": site_killed,
    "run-killed": run_killed,
    "server-killed": server_killed,
    "upload-cut": upload_cut,
    "disk-full": disk_full,
    "work-torn": work_torn,
    "two-at-once": two_at_once,
    "never-answers": never_answers,
    "wrong-data": wrong_data,
    "policy-refuses": policy_refuses,
    "other-code": other_code,
    "upgraded": upgraded,
    "clock-off": clock_off,
    "wrong-authority": wrong_authority,
    "unknown-key": unknown_key,
    "key-twice": key_twice,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drills", nargs="*", default=list(DRILLS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = csv.DictReader(given.out.read_text().splitlines()) if given.out.exists() else ()
    done = {row["drill"] for row in rows}
    wanted = [name for name in given.drills if name not in done]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        for name in wanted:
            stage.mended()
            result = drilled(stage, name)
            append(given.out, result)
            print(result, flush=True)


def drilled(stage: Stage, name: str) -> Result:
    """A drill that goes wrong itself does not stop the others."""
    began = time.monotonic()
    try:
        return DRILLS[name](stage, name, 1 + list(DRILLS).index(name))
    except Exception as error:
        traceback.print_exc()
        stage.mend = list(SITES)
        return Result(name, False, time.monotonic() - began, f"{type(error).__name__}: {error}"[:300], "")


def append(file: Path, result: Result) -> None:
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(f.name for f in fields(Result))
        writer.writerow([result.drill, result.ok, f"{result.seconds:.0f}", result.sees, result.lost])


if __name__ == "__main__":
    main()
