"""A whole federation on this machine, set up and run with the commands that operators and hospitals use.

`Federation` is one as a context: its processes end with it. `rehearse` plays one with phantoms, for people who want to see the
commands before they need them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.processes import end_all, stop_engine, tree_with_times

SECONDS = 120.0  # that a program may take to start, or a command to end
RUN_SECONDS = 240.0
NAMES = ("north", "south", "east", "west", "centre", "harbour", "hill", "lake", "park")
# The data and the job of a rehearsal: enough patients for a little privacy, and seconds of work.
DATA = {"phantom_images": 1800, "phantom_classes": 2, "phantom_size": 16, "partition": "iid"}
JOB = {
    "privacy": "dp", "epsilon": 3.0, "method": "sketch", "ipc": 2, "width": 8, "depth": 2, "iterations": 40,
    "eval_models": "mlp", "eval_nets": 1, "eval_steps": 40, "modality": "generic",
}  # fmt: skip

Show = Callable[[str], None]


class Federation:
    """Use it as a context: its processes end with it, by force. Where a command fails, `FedistillError` says how.

    sites: name -> data. rules: name -> text that takes the place of the policy's tables between [site] and [connection]; without it
    the policy stays as `site init` writes it. show: told of every command before it runs.
    """

    def __init__(
        self, folder: Path, sites: Mapping[str, Path], rules: Mapping[str, str], show: Show = lambda line: None
    ) -> None:
        self.server, self.folder = folder / "server", folder
        self.show = show
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._sites, self._rules = sites, rules
        self._over = threading.Event()  # no command is begun any more

    def policy(self, name: str) -> Path:
        return self.folder / name / "site.toml"

    def __enter__(self) -> Federation:
        try:
            self.begin()
            self.admit()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.kill(name)

    def begin(self) -> None:
        """Set a server up, and run it."""
        self.folder.mkdir(parents=True, mode=0o700)
        port = free_port()
        self.command("server", "init", self.server, "--address", f"127.0.0.1:{port}", "--port", port)
        self.start_server()

    def admit(self) -> None:
        """Set all sites up, and have them take part."""
        pool = ThreadPoolExecutor(2)
        try:
            list(pool.map(self._admit, self._sites))
        except BaseException:
            self._over.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _admit(self, name: str) -> None:
        told = self.command("server", "add-site", self.server, name)
        kit, place, policy = self.server / "kits" / f"{name}.zip", self.folder / name, self.policy(name)
        place.mkdir()
        words = ["--kit", kit, "--data", self._sites[name], "--work", place / "work", "--site", policy]
        heard = self.command("site", "init", *words)
        fingerprint = re.findall(r"[0-9a-f]{4}(?: [0-9a-f]{4}){3}", told)
        if not fingerprint or fingerprint[0] not in heard:
            raise FedistillError("fingerprint", f"{name} and the operator see different fingerprints of the kit.")
        if name in self._rules:
            head, _, rest = policy.read_text().partition("[privacy]")
            policy.write_text("\n".join([head, self._rules[name], rest[rest.index("[connection]") :]]))
        self.command("site", "check", "--site", policy)
        self.command("server", "admit", self.server, name, place / f"{name}.key.pub")
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
        end_all(tree_with_times(process.pid))
        process.wait()

    def stop(self) -> None:
        """In good order: sites say goodbye while the server is there."""
        sites = [process for name, process in self.processes.items() if name != "server"]
        with ThreadPoolExecutor(len(sites) or 1) as pool:  # all at once: every one takes its time
            list(pool.map(lambda site: stop_engine(site, {}), sites))
        if "server" in self.processes:
            stop_engine(self.processes["server"], {})

    def run(self, name: str, settings: Mapping[str, Any], seconds: float) -> Path:
        """Run a job to its end: its folder. Raises `TimeoutError`, with the logs, where it has no summary by then."""
        job = self.folder / f"{name}.toml"
        job.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        self.command("server", "run", self.server, job)
        out, end = self.server / "runs" / name, time.monotonic() + seconds
        while not (out / "summary.json").exists():
            if time.monotonic() > end or (out / "error.json").exists():
                raise TimeoutError("\n".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("*.log"))))
            time.sleep(0.2)
        return out

    def command(self, *words: object) -> str:
        """What a command of fedistill prints. Raises `FedistillError` with its last line where it fails."""
        self._begin(words)
        return fedistill(*words)

    def _begin(self, words: Sequence[object]) -> None:
        if self._over.is_set():
            raise FedistillError("over", "The federation has ended.")
        self.show(_shown(words))

    def _start(
        self, name: str, words: Sequence[object], ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Run a command that lasts, until its log has the words that say it is ready."""
        self._begin(words)
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [_PROGRAM, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for us
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            )
        self.processes[name] = process
        end = time.monotonic() + SECONDS
        while not re.search(ready, log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > end or self._over.is_set():
                raise TimeoutError(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)


def rehearse(folder: Path | None, sites: int, show: Show) -> None:
    """Play a federation of `sites` hospitals in a new folder, or in one that is removed at the end.

    Raises `FedistillError` ("exists", "rehearsal") on a folder that is there, and where a step fails.
    """
    if folder is not None and os.path.lexists(folder):
        raise FedistillError("exists", f"{folder} exists already: choose another folder, or none.")
    place = Path(tempfile.mkdtemp(prefix="fedistill-rehearsal-")) if folder is None else folder.absolute()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    began = time.monotonic()
    try:
        _play(place, NAMES[:sites], show)
    except TimeoutError as error:
        kept = "" if folder is None else f" The logs are in {folder}."
        raise FedistillError("rehearsal", f"The rehearsal did not get on: {_last(str(error))}{kept}") from None
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
    kept = "nothing of it is left" if folder is None else f"all of it is in {folder}"
    show(f"The rehearsal took {time.monotonic() - began:.0f} s; its programs have ended, and {kept}.")


def _play(place: Path, names: Sequence[str], show: Show) -> None:
    def command_line(line: str) -> None:
        show(f"$ {line}")

    files = {name: place / f"{name}.npz" for name in names}
    officer = names[0]
    with _step(show, f"Phantoms for {len(names)} hospitals"):
        whole = make_config(DATA | {"sites": len(names)}).resolved()
        data = load_data(whole)
        for place_of, file in enumerate(files.values()):
            write_npz(file, partition(data, whole).at(data, place_of))
    federation = Federation(place / "federation", files, {}, command_line)
    try:
        with _step(show, "The operator sets up a server"):
            federation.begin()
        with _step(show, "Every hospital gets a kit, makes its key, checks its policy, is admitted, and takes part"):
            federation.admit()
            for name in names[1:]:  # one person is enough for a rehearsal
                policy = federation.policy(name)
                policy.write_text(policy.read_text().replace("manual = true", "manual = false"))
            federation.command("server", "sites", federation.server)
        with _step(show, f"A job; {officer}'s set waits for its officer"), _person(federation, officer):
            federation.run("rehearsal", JOB | {"sites": len(names)}, RUN_SECONDS)
        with _step(show, "What came of it"):
            federation.command("server", "status", federation.server, "rehearsal")
            federation.command("site", "log", "--site", federation.policy(officer))
            federation.command("server", "fetch", federation.server, "rehearsal", "--to", place / "results")
    finally:
        federation.stop()
    show(_result(place / "results"))


def _result(folder: Path) -> str:
    found = json.loads((folder / "summary.json").read_text())
    epsilon = found["privacy"]["epsilon"]
    return f"The merged set protects every image of a site with epsilon={epsilon:.2f}. Of phantoms: it is good for nothing else."


@contextmanager
def _step(show: Show, what: str) -> Iterator[None]:
    show(f"{what}:")
    began = time.monotonic()
    yield
    show(f"({time.monotonic() - began:.0f} s)")


@contextmanager
def _person(federation: Federation, name: str) -> Iterator[None]:
    """Somebody at a site who looks at what waits, and approves it."""
    done = threading.Event()

    def decide() -> None:
        where = ("--site", federation.policy(name))
        while not done.wait(1.0):
            waiting = list((federation.folder / name / "work").glob("site-*/outbox/*/request.json"))
            if not waiting:
                continue
            short = waiting[0].parent.name[:8]
            try:
                federation.command("site", "pending", *where)
                federation.command("site", "show", short, *where)
                federation.command("site", "approve", short, "--reason", "looked at the contact sheet", *where)
            except FedistillError as error:  # the job then waits in vain, and says so
                federation.show(f"The officer could not decide: {error.sentence}")
            return

    person = threading.Thread(target=decide)
    person.start()
    try:
        yield
    finally:
        done.set()
        person.join()


def write_npz(path: Path, data: Dataset) -> None:
    """Images in a file as MedMNIST has it: channels last, grey ones without."""
    arrays: dict[str, Any] = {"class_names": np.array(data.class_names)}
    for part, split in data.splits.items():
        images = split.images.movedim(1, -1).squeeze(-1)
        arrays |= {f"{part}_images": images.numpy(), f"{part}_labels": split.labels[:, None].numpy()}
    np.savez(path, **arrays)


def fedistill(*words: object) -> str:
    """What a command prints. Raises `FedistillError` where it fails."""
    done = subprocess.run(
        [_PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise FedistillError("rehearsal", f"`{_shown(words)}` failed: {_last(done.stdout + done.stderr)}")
    return done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _shown(words: Sequence[object]) -> str:
    return shlex.join(["fedistill", *map(str, words)])


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1].strip()


_PROGRAM = str(Path(sys.executable).parent / "fedistill")
