"""A site's SuperNode, started again whenever it ends, and what the disk says of it.

    <work>/site-<name>/node.json     the SuperNode's process, whether it is connected, and the last message that came

Flower's SuperNode waits by itself for a server that is away. It ends when it is killed (and the server then refuses it for a
minute), when the server does not take its key, and on what never mends: then so do we, with a sentence.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedistill.errors import FedistillError
from fedistill.files import read_json, write_json
from fedistill.processes import alone, start_time, stop_engine, terminate_is_interrupt
from fedistill.site.connection import CLOCK_WRONG, MENDS, clock_sentence, reach
from fedistill.site.folder import site_folder
from fedistill.site.gate import now
from fedistill.site.policy import Connection, Policy

PAUSE = 10.0  # seconds before another try
PATIENCE = 150.0  # seconds of refusals: a killed node is let in again after 60
STOP_SECONDS = 15.0
LINGER = 5.0  # seconds that a SuperNode may go on after its last words
KEPT = 200  # lines of what the SuperNode said last

CONNECTED = re.compile(r"SuperNode ID: (\d+)")
MESSAGE = re.compile(r"Receiving: (\S+) message")
SENT = re.compile(r"Sending: (\S+) message")
# After this a SuperNode does nothing more, and does not always end: where a connection breaks off in the middle of a
# handshake its main thread ends, and its local server keeps the process.
LAST_WORDS = "SSL/TLS handshake error"
REFUSED = "[code: 2004]"
GRACEFUL = "SuperNode terminated gracefully"
# Flower's exit codes for what is as wrong the next time, and other last words of that kind.
NEVER = {
    "Exit Code: 302": "the site's private key is none that Flower takes: make a new one with `site init` in another folder",
    "Exit Code: 303": "a key needs TLS, and TLS is off",
    "Exit Code: 600": "Flower does not understand server in [connection]",
    "Exit Code: 604": "a file of [connection] cannot be read",
    "Exit Code: 606": "this version of Flower does not fit the server's: install the one that the operator says",
    "address already in use": "another program has the port that is Flower's own here: choose another with --port",
}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Node:
    """The last that was noted. pid, began: of the SuperNode's process, which tell it from a later one with its number.

    state: "starting", "connected", "waiting" (for another try) or "stopped". why: of a wait or an end. message: the last that came;
    answered: whether its answer was sent.
    """

    pid: int = 0
    began: str = ""
    state: str = "stopped"
    since: str = ""
    tries: int = 0
    why: str = ""
    message: str = ""
    message_time: str = ""
    answered: bool = True

    @property
    def alive(self) -> bool:
        return bool(self.began) and start_time(self.pid) == self.began


def node_file(policy: Policy) -> Path:
    return site_folder(policy.work, policy.name) / "node.json"


def read_node(policy: Policy) -> Node | None:
    """What was noted last; None: no SuperNode was ever started, or the note cannot be read."""
    try:
        return Node(**read_json(node_file(policy)))
    except (OSError, ValueError, TypeError):
        return None


def watched(policy: Policy) -> bool:
    """Whether a `site start` looks after this site's SuperNode right now."""
    place = node_file(policy).with_name("node")
    if not (place / ".lock").exists():
        return False
    try:
        with alone(place):
            return False
    except FedistillError:
        return True


def keep_running(policy: Policy, link: Connection, command: Sequence[str], env: Mapping[str, str]) -> None:
    """Run a site's SuperNode until this process is told to stop.

    Raises `FedistillError`: "busy" where another does so for this site, and "node" on what does not mend itself.
    """
    place = node_file(policy)
    with alone(place.with_name("node")), terminate_is_interrupt():
        _end_orphan(read_node(policy))
        note = Node()
        try:
            refused = 0.0  # when a series of refusals began
            while True:
                child = _Child(command, env, place, replace(note, state="starting", why="", tries=note.tries + 1))
                note = child.follow()
                if note.state == "connected":
                    note = replace(note, tries=0)
                said = child.said
                refused = (refused or time.monotonic()) if REFUSED in said else 0.0
                why = _why(said, link, refused_for=time.monotonic() - refused if refused else 0.0)
                note = _keep(place, replace(note, state="waiting", why=why))
                print(f"The SuperNode ended: {why}. Another try in {PAUSE:.0f} s.", file=sys.stderr, flush=True)
                time.sleep(PAUSE)
        except KeyboardInterrupt:
            _keep(place, replace(note, state="stopped", why="it was told to"))
        except FedistillError as error:
            _keep(place, replace(note, state="stopped", why=error.sentence))
            raise


def _why(said: str, link: Connection, *, refused_for: float) -> str:
    """Why a SuperNode ended, where another try may help. Raises `FedistillError` ("node") where none will."""
    for words, sentence in NEVER.items():
        if words.lower() in said.lower():
            raise FedistillError("node", f"The SuperNode cannot run: {sentence}.")
    if refused_for > PATIENCE:
        raise FedistillError(
            "node",
            f"{link.server} has refused this site for {refused_for:.0f} s: its key is not admitted (any more), or "
            f"another SuperNode runs with it. Send {link.key}.pub to the operator, and start again once it is admitted.",
        )
    if REFUSED in said:
        return "the server does not let it in yet (after a SuperNode was killed that takes a minute; else its key is not admitted)"
    try:
        found = reach(link)
    except FedistillError as error:
        if error.code not in MENDS:
            raise FedistillError("node", f"The SuperNode cannot run: {error.sentence}") from None
        return error.sentence.rstrip(".")
    if abs(found.clock) >= CLOCK_WRONG:
        raise FedistillError("node", f"The SuperNode cannot run: {clock_sentence(found)}")
    if GRACEFUL in said:
        return "the server took its signature for no good one, or somebody stopped it"
    return "it was killed, or broke off"


class _Child:
    """One SuperNode: what it says goes on to our own output, and into the note."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], place: Path, note: Node) -> None:
        self._place, self._lines = place, deque[str](maxlen=KEPT)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,  # Ctrl-C is for us: a second signal would keep it from saying goodbye to the server
        )
        self._note = _keep(place, replace(note, pid=self._process.pid, began=start_time(self._process.pid)))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def follow(self) -> Node:
        """Until it ends: the last note. A KeyboardInterrupt ends it in good order."""
        try:
            self._process.wait()
        finally:
            if self._process.poll() is None:
                stop_engine(self._process, {})  # with a client process that hangs
            self._reader.join(1.0)  # its own children may hold the pipe a little longer
        return self._note

    @property
    def said(self) -> str:
        """Before it was connected: afterwards a server's words are among its own, and are not taken for them."""
        return "\n".join(self._lines)

    def _read(self) -> None:
        pipe = self._process.stdout
        if pipe is None:
            return
        for raw in pipe:
            line = "".join(
                c if c.isprintable() else " " for c in _COLOUR.sub("", raw.decode(errors="replace"))
            ).rstrip()
            with suppress(OSError, ValueError):  # nobody may look any more
                print(line, file=sys.stderr, flush=True)
            if self._note.state != "connected":
                self._lines.append(line)
            if LAST_WORDS in line:
                end = threading.Timer(LINGER, self._process.kill)
                end.daemon = True
                end.start()
            if CONNECTED.search(line):
                self._note = _keep(self._place, replace(self._note, state="connected"))
            elif found := MESSAGE.search(line):
                came = replace(self._note, message=found[1], message_time=now(), answered=False)
                self._note = _keep(self._place, came)
            elif SENT.search(line):
                self._note = _keep(self._place, replace(self._note, answered=True))


def _end_orphan(left: Node | None) -> None:
    """End the SuperNode of an earlier `site start` that was killed: two with one key shut each other out."""
    if left is None or not left.alive:
        return
    print(f"Ending the SuperNode that an earlier start left behind (process {left.pid}).", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError):
        os.kill(left.pid, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        while left.alive and time.monotonic() < end:
            time.sleep(0.1)
        if left.alive:
            os.kill(left.pid, signal.SIGKILL)


def _keep(place: Path, note: Node) -> Node:
    """Note what changed. That it cannot be noted is no reason to stop."""
    note = replace(note, since=now())
    with suppress(OSError):
        write_json(place, asdict(note))
    return note
