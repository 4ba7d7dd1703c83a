"""The last door: what a site made is checked against its policy, waits for a person where the policy says so, and is written down.

    <work>/site-<name>/outbox/<id>/          set/ with its contact sheet, and request.json: the job that made it
    <work>/site-<name>/decisions.jsonl       who let what out, or did not; each line holds the hash of the one before
    <work>/site-<name>/decisions.head        how many lines there are, and the hash of the last

A decision is the line in the log, and nothing else. It is about what leaves, whatever job asks for it: the id is its hash. What
the log cannot show is that somebody rewrote all of it, or put back old copies of both files.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.files import read_json, write_json
from fedistill.privacy.chain import START, BrokenChain, Head, check_head
from fedistill.processes import alone
from fedistill.site.folder import account_name, check_account, site_folder
from fedistill.site.policy import Policy
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set, save_set
from fedistill.wire import encode

POLL_SECONDS = 1.0
BY_POLICY = ""  # nobody's account
MOST_WAITING = 50
LONGEST_REASON = 500
DIGITS = 24  # of an id
CODE_MARK = "app-"  # how the id of code begins, which is decided about in the same log


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One line of the log. who: a person's account, or `BY_POLICY`. previous: SHA-256 of the line before, or `START`."""

    time: str
    id: str
    approved: bool
    who: str
    reason: str
    previous: str


@dataclass(frozen=True)
class Request:
    """A set in the outbox: its id, its folder, the settings that made it, and what was decided."""

    id: str
    folder: Path
    made: str
    job: dict[str, Any]
    decision: Decision | None

    def load(self) -> SyntheticSet:
        """The set. Raises `FedistillError` where its files are not what the id stands for."""
        made = load_set(self.folder / "set")
        if identity(made) != self.id:
            raise FedistillError("bad-set", f"The files in {self.folder} were changed after the set was made.")
        return made


def may_leave(
    policy: Policy, made: SyntheticSet, config: Config, *, run: str, round: int, seconds: float
) -> SyntheticSet | None:
    """The set as it may leave now, or None where it waits for a person, for whom the call waits about `seconds`.

    Raises `FedistillError`: "policy" on a set that must not leave, or where too many wait; "rejected" where a person said no.
    """
    policy.check_set(made)
    settings = {f.name: getattr(config, f.name) for f in fields(Config) if f.metadata["scope"] != "run"}
    job = {"config": settings, "run": run, "round": round}
    folder = site_folder(policy.work, policy.name)
    name = identity(made)
    place = folder / "outbox" / name
    if not (place / "request.json").exists():
        if sum(request.decision is None for request in requests(policy)) >= MOST_WAITING:
            raise FedistillError("policy", f"{MOST_WAITING} sets wait for a decision at this site: no more until then.")
        save_set(made, place / "set")
        write_json(place / "request.json", {"made": now(), "job": job})
    if not policy.manual and decided(folder, name) is None:
        decide(policy, name, approved=True, reason="", who=BY_POLICY)
    end = time.monotonic() + seconds
    while (decision := decided(folder, name)) is None:
        if time.monotonic() >= end:
            return None
        time.sleep(min(POLL_SECONDS, max(end - time.monotonic(), 0.01)))
    if not decision.approved:
        raise FedistillError("rejected", "This site does not let the set leave.")
    return made


def identity(made: SyntheticSet) -> str:
    """A hash over all that would leave."""
    arrays, text = encode(made)
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode() + arrays[name].tobytes())
    return found.hexdigest()[:DIGITS]


def requests(policy: Policy) -> list[Request]:
    """Everything that was ever made to leave, the oldest first."""
    folder = site_folder(policy.work, policy.name)
    last = {decision.id: decision for decision in read_log(folder)}
    found = []
    for file in (folder / "outbox").glob("*/request.json"):
        about, name = read_json(file), file.parent.name
        found.append(Request(name, file.parent, about["made"], about["job"], last.get(name)))
    return sorted(found, key=lambda request: (request.made, request.id))


def request_of(policy: Policy, name: str) -> Request:
    """The request whose id begins with `name`. Raises `FedistillError` where there is none, or more than one."""
    found = [request for request in requests(policy) if name and request.id.startswith(name)]
    if len(found) != 1:
        what = "No set" if not found else "More than one set"
        raise FedistillError("no-request", f"{what} of this site has an id that begins with '{name}'.")
    return found[0]


def decide(policy: Policy, name: str, *, approved: bool, reason: str, who: str | None = None) -> Decision:
    """Write a decision down, durably. Raises `FedistillError` on one that was taken before: nothing that left comes back. Only
    approval of code can be taken back: it is about what is still to run."""
    if len(reason) > LONGEST_REASON or "\n" in reason:
        raise FedistillError("bad-reason", f"A reason is one line of at most {LONGEST_REASON} characters.")
    check_account(policy.work, policy.name)
    folder = site_folder(policy.work, policy.name)
    try:
        return _decide(folder, name, approved, reason, who)
    except PermissionError as error:
        raise FedistillError(
            "not-allowed",
            f"{error.filename} belongs to another account: decide with the one that `site start` runs under.",
        ) from None


def _decide(folder: Path, name: str, approved: bool, reason: str, who: str | None) -> Decision:
    with alone(folder / "outbox", wait=True):
        log = read_log(folder)
        file = folder / "decisions.jsonl"
        _store_head(file)  # one behind where a process was killed between its two writes
        before = _last(log, name)
        taken_back = before is not None and before.approved and not approved and name.startswith(CODE_MARK)
        if before is not None and not taken_back:
            word = "approved" if before.approved else "rejected"
            by = before.who or "the policy"
            raise FedistillError("decided", f"{name} was {word} by {by} on {before.time}: that stands.")
        decision = Decision(
            time=now(),
            id=name,
            approved=approved,
            who=_account() if who is None else who,
            reason=reason,
            previous=_now_head(file).hash,
        )
        with open(os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0) as out:
            torn = file.read_bytes().rpartition(b"\n")[2]
            out.truncate(out.tell() - len(torn))  # a line that a killed process did not finish decided nothing
            out.write(_line(decision))
            os.fsync(out.fileno())
        _store_head(file)
    return decision


def decided(folder: Path, name: str) -> Decision | None:
    return _last(read_log(folder), name)


def _last(log: Sequence[Decision], name: str) -> Decision | None:
    return next((decision for decision in reversed(log) if decision.id == name), None)


def read_log(folder: Path) -> list[Decision]:
    """The decisions in a site's folder, the oldest first. Raises `FedistillError` ("broken-log") where a line was changed,
    removed, put in or moved."""
    for _ in range(2):
        with suppress(FedistillError):  # a decision may be written right now
            return _read_log(folder)
        time.sleep(0.1)
    return _read_log(folder)


def _read_log(folder: Path) -> list[Decision]:
    file = folder / "decisions.jsonl"
    try:
        head, lines = _head(file), _lines(file)  # in this order: a decision may be written right now
    except PermissionError as error:  # of another account that decided before it was refused
        raise FedistillError(
            "not-allowed", f"{error.filename} belongs to another account: chown it to the owner of {folder}."
        ) from None
    found: list[Decision] = []
    hashes: list[str] = []
    for place, line in enumerate(lines, 1):
        try:
            decision = Decision(**json.loads(line))
        except (ValueError, TypeError):
            decision = None
        if decision is None or decision.previous != (hashes or [START])[-1] or _line(decision) != line:
            raise FedistillError("broken-log", f"Line {place} of {file} is not as it was written: nothing leaves.")
        found.append(decision)
        hashes.append(_hash(line))
    try:
        check_head(hashes, head)
    except BrokenChain:
        raise FedistillError(
            "broken-log", f"{file} is not as it was when it was last written: nothing leaves."
        ) from None
    return found


def _lines(file: Path) -> Sequence[bytes]:
    whole = file.read_bytes() if file.exists() else b""
    return whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)


def _head(file: Path) -> Head:
    """What was stored after a line was last written."""
    path = file.with_suffix(".head")
    if not path.exists():
        return Head(0, START)
    try:
        found = read_json(path)
        return Head(int(found["count"]), str(found["hash"]))
    except (ValueError, KeyError, TypeError):
        raise FedistillError("broken-log", f"{path} is not as it was written: nothing leaves.") from None


def _now_head(file: Path) -> Head:
    lines = _lines(file)
    return Head(len(lines), _hash(lines[-1]) if lines else START)


def _store_head(file: Path) -> None:
    write_json(file.with_suffix(".head"), asdict(_now_head(file)))


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _line(decision: Decision) -> bytes:
    return json.dumps(asdict(decision), sort_keys=True).encode() + b"\n"


def _account() -> str:
    return account_name(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
