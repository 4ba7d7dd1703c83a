"""What was spent on a site's private data, on the site's own disk: written before the data are touched, never changed.

An SQLite database with the entries (`chain.py`), and beside it `PATH.head`, the head of the chain. Copies of a ledger take both.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fedistill.errors import FedistillError, unknown
from fedistill.files import read_json, write_json
from fedistill.privacy.accounting import Accounted, Mechanism, epsilon_of
from fedistill.privacy.chain import FIELDS, START, BrokenChain, Entry, Head, check_head, head_of, read_chain, sealed

UNITS = ("image", "patient")  # the weaker first
PATIENCE = 300.0  # seconds to wait for another process, which may be looking for an epsilon
_MARK, _FORMAT = 0x0FED1ED6, 1  # SQLite's application_id and user_version of a ledger
_SCHEMA = (
    """CREATE TABLE entries (
        position INTEGER PRIMARY KEY, time TEXT NOT NULL, data TEXT NOT NULL, unit TEXT NOT NULL, what TEXT NOT NULL,
        key TEXT NOT NULL UNIQUE, delta REAL NOT NULL, mechanisms TEXT NOT NULL, note TEXT NOT NULL,
        previous TEXT NOT NULL, hash TEXT NOT NULL)""",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'a ledger is never changed'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'a ledger is never changed'); END",
    # INSERT OR REPLACE fires no trigger for the row that it deletes.
    """CREATE TRIGGER only_append BEFORE INSERT ON entries
        WHEN NEW.position IS NOT (SELECT count(*) + 1 FROM entries) OR NEW.key IN (SELECT key FROM entries)
        BEGIN SELECT RAISE(ABORT, 'a ledger is never changed'); END""",
    f"PRAGMA application_id = {_MARK}",
    f"PRAGMA user_version = {_FORMAT}",
)
# SQLite's words for what the surroundings are to blame for, not the file.
_SURROUNDINGS = tuple(f"SQLITE_{word}" for word in ("BUSY", "LOCKED", "READONLY", "CANTOPEN", "FULL", "IOERR", "PERM"))


@dataclass(frozen=True, kw_only=True)
class Cap:
    """The most that may ever be spent on a site's data: `epsilon` at `delta`. Its data-protection officer sets it."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and 0 < self.delta < 1):
            raise FedistillError(
                "bad-cap",
                f"epsilon={self.epsilon:g} at delta={self.delta:g} is no cap: "
                "epsilon must be above 0, and delta between 0 and 1.",
            )


def cap_of(epsilon: float | None, delta: float | None) -> Cap | None:
    """The cap that two settings, which belong together, name. Raises `FedistillError` ("bad-cap")."""
    if epsilon is None and delta is None:
        return None
    if epsilon is None or delta is None:
        raise FedistillError("bad-cap", "lifetime-epsilon and lifetime-delta belong together: give both, or neither.")
    return Cap(epsilon=epsilon, delta=delta)


class Ledger:
    """The ledger at `path`, which is made, for its owner's eyes alone, where there is none and `create` allows it.

    Raises `FedistillError` where the file is no ledger or cannot be used. Each call opens the database anew, so that threads
    and processes may share a ledger; the file system has to know locks (one on the site's own disk does).
    """

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        self.path = Path(path)
        self.head_path = self.path.with_name(f"{self.path.name}.head")
        if create:
            self._make()
        elif not self.path.is_file():
            raise FedistillError("no-ledger", f"There is no ledger {self.path}.")
        with self._open() as base:
            mark, form = (base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if mark != _MARK:
            raise FedistillError("broken-ledger", f"The file {self.path} is no ledger: choose another path.")
        if form != _FORMAT:
            raise FedistillError(
                "other-format",
                f"The ledger {self.path} has format {form}, not {_FORMAT}: use the fedistill that wrote it.",
            )

    def spend(
        self,
        *,
        key: str,
        data: str,
        unit: str,
        what: str,
        delta: float,
        mechanisms: Sequence[Mechanism],
        cap: Cap | None = None,
        note: str = "",
    ) -> Entry:
        """Write down that `mechanisms` are about to be applied to `data`: to be called before the data are touched.

        key: names the work; the same key with the same work returns the entry that is there, and spends nothing more.
        data: a word for the records. unit: what one record is, "image" or "patient". what: a short word for the work.
        delta: that the work was planned at. note: one line for people.

        When it returns, the entry survives a killed process and a loss of power. Raises `FedistillError`, with nothing
        written: "over-budget" where the work, composed with everything that is on this ledger, would pass `cap`;
        "other-work" where the key was used for something else; "bad-spend" for arguments that are none; "broken-ledger".
        """
        asked = Entry(
            position=0,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            data=data,
            unit=unit,
            what=what,
            key=key,
            delta=float(delta),
            mechanisms=tuple(mechanisms),
            note=note,
            previous=START,
        )
        _check(asked)
        with self._open() as base:
            # Locked before anything is read: of two processes only one can spend what is left.
            base.execute("BEGIN IMMEDIATE")
            entries = self._entries(base)
            self._store_head(head_of(entries))  # one behind where a process was killed between its two writes
            for entry in entries:
                if entry.key == key:
                    return self._same(entry, asked)
            if cap is not None:
                # Whatever data they name: splits are cut anew when data grow, and a person may have been in each of them.
                _check_cap([m for e in entries for m in e.mechanisms], asked, cap)
            entry = sealed(_after(asked, head_of(entries)))
            base.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(FIELDS))})", entry.to_row())
            base.execute("COMMIT")
            # Locked again: two processes that store the head after their commits could do so in the wrong order.
            base.execute("BEGIN IMMEDIATE")
            last = base.execute("SELECT position, hash FROM entries ORDER BY position DESC LIMIT 1").fetchone()
            self._store_head(Head(*last))
        return entry

    def entries(self) -> list[Entry]:
        """All entries, oldest first. Raises `FedistillError` "broken-ledger" with the first one that does not hold."""
        with self._open() as base:
            base.execute("BEGIN")  # no other process commits before the head is read as well
            return self._entries(base)

    def verify(self) -> Head:
        """The head of a chain that holds: who quotes it in a release shows later that nothing before it was rewritten.

        Raises `FedistillError` "broken-ledger" with the first entry that was changed, removed, put in or moved.
        """
        return head_of(self.entries())

    def spent(self, data: str, delta: float) -> Accounted:
        """Epsilon at `delta` of everything that was ever spent on `data`, in one composition.

        Of units that differ: a spend per patient hides all images of a patient, so it composes with spends per image, and
        the whole is said of the weaker unit (`unit_of`).
        """
        return epsilon_of([m for entry in _of(self.entries(), data) for m in entry.mechanisms], delta)

    def unit_of(self, data: str) -> str:
        """What `spent` is said of: "image" where something was spent per image, else "patient"."""
        return weakest(entry.unit for entry in _of(self.entries(), data))

    def _make(self) -> None:
        """An empty ledger, unless there is a file with something in it."""
        with self._open(make=True) as base:
            base.execute("BEGIN IMMEDIATE")
            if base.execute("PRAGMA schema_version").fetchone()[0]:
                return
            head = self._stored_head()
            if head is not None and head.count:
                raise self._broken(f"it is empty, but {head.count} entries were written")
            self._store_head(Head(0, START))  # before the table: entries without a head are an error
            for statement in _SCHEMA:
                base.execute(statement)
            base.execute("COMMIT")

    @contextmanager
    def _open(self, make: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection whose transaction, unless it is committed, is rolled back; what fails becomes one sentence."""
        try:
            if make:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))  # SQLite's journal takes its mode
            address = f"{self.path.resolve().as_uri()}?mode=rw"
            with closing(sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)) as base:
                base.text_factory = lambda text: text.decode(errors="surrogateescape")  # the hash finds what is no text
                # More than FULL, with which a commit can be undone by a loss of power right after it.
                base.execute("PRAGMA synchronous = EXTRA")
                yield base
        except (sqlite3.Error, UnicodeDecodeError) as error:  # damaged bytes reach even SQLite's own messages
            if getattr(error, "sqlite_errorname", "").startswith(_SURROUNDINGS):
                raise FedistillError(
                    "unusable-ledger",
                    f"The ledger {self.path} cannot be used ({error}): see that it and its folder may be written, that the "
                    "disk is not full, and that no other process holds it.",
                ) from None
            raise FedistillError(
                "broken-ledger",
                f"The file {self.path} is no ledger, or a damaged one ({' '.join(str(error).split())}): "
                "put back a copy of it and of its head.",
            ) from None
        except OSError as error:
            raise FedistillError(
                "unusable-ledger", f"The ledger {self.path} cannot be used ({error.strerror}): see who may write there."
            ) from None

    def _entries(self, base: sqlite3.Connection) -> list[Entry]:
        """All entries, once they and the head are checked."""
        rows = base.execute(f"SELECT {', '.join(FIELDS)} FROM entries ORDER BY position").fetchall()
        head = self._stored_head()
        if head is None:
            raise self._broken("its head is missing")
        try:
            entries = read_chain(rows)
            check_head([entry.hash for entry in entries], head)
        except BrokenChain as broken:
            raise self._broken(str(broken)) from None
        return entries

    def _stored_head(self) -> Head | None:
        try:
            found = read_json(self.head_path)
            return Head(int(found["count"]), str(found["hash"]))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            raise self._broken("its head is damaged") from None

    def _store_head(self, head: Head) -> None:
        if self._stored_head() != head:
            write_json(self.head_path, asdict(head))
            self.head_path.chmod(0o600)

    def _same(self, entry: Entry, asked: Entry) -> Entry:
        if entry.work != asked.work:
            raise FedistillError(
                "other-work",
                f"Entry {entry.position} of the ledger {self.path} has the key {entry.key} and other work: choose a new key.",
            )
        return entry

    def _broken(self, what: str) -> FedistillError:
        return FedistillError(
            "broken-ledger",
            f"The ledger {self.path} (head: {self.head_path.name}) does not hold: {what}; find out who touched it.",
        )


def so_far(entries: Sequence[Entry]) -> list[Accounted]:
    """Of each entry: epsilon, at its delta, of everything that was spent on its data up to it."""
    return [
        epsilon_of([m for e in _of(entries[:place], entry.data) for m in e.mechanisms], entry.delta)
        for place, entry in enumerate(entries, 1)
    ]


def weakest(units: Iterable[str]) -> str:
    """What a composition of spends of these units is said of."""
    return min(units, key=UNITS.index, default=UNITS[0])


def _of(entries: Sequence[Entry], data: str) -> list[Entry]:
    return [entry for entry in entries if entry.data == data]


def _after(entry: Entry, head: Head) -> Entry:
    return replace(entry, position=head.count + 1, previous=head.hash)


def _check(asked: Entry) -> None:
    for name in ("key", "data", "what", "note"):
        word = getattr(asked, name)
        if not word.isprintable() or (not word.strip() and name != "note"):
            raise FedistillError("bad-spend", f"{name}={word!r} cannot be written down: give a word in one line.")
    if asked.unit not in UNITS:
        raise unknown("unit", asked.unit, UNITS)
    if not 0 < asked.delta < 1:
        raise FedistillError("bad-spend", f"delta={asked.delta:g} is none: it must be between 0 and 1.")
    if not asked.mechanisms:
        raise FedistillError("bad-spend", f"{asked.what} on {asked.data} names no mechanism: name what is to be spent.")


def _check_cap(past: Sequence[Mechanism], asked: Entry, cap: Cap) -> None:
    """Raises `FedistillError` where `asked`, composed with all the `past`, passes `cap`.

    One composition of everything bounds what is told of any one record: a mechanism on a split that the record was not in tells
    nothing of it, so that to count it can only be too much. It is less than the sum of each split's epsilon, which would be
    said at the sum of their deltas.
    """
    total = epsilon_of([*past, *asked.mechanisms], cap.delta).epsilon
    if total <= cap.epsilon:
        return
    spent, alone = epsilon_of(past, cap.delta).epsilon, epsilon_of(asked.mechanisms, cap.delta).epsilon
    raise FedistillError(
        "over-budget",
        f"{asked.what} on {asked.data} would bring epsilon to {total:.3f} at delta={cap.delta:g}, over the lifetime cap of "
        f"{cap.epsilon:g}: {spent:.3f} is spent on this site's data, {max(cap.epsilon - spent, 0):.3f} is left, "
        f"and this work alone asks for {alone:.3f}; give it more noise or fewer steps.",
    )
