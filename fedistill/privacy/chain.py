"""The chain of a ledger: entries that cannot be changed, removed, put in or moved unnoticed.

Entry i carries

    hash_i = SHA-256(canonical JSON of all other fields of entry i, hash_{i-1} among them),    hash_0 = `START`,

and the head (the number of entries and the last hash) is kept apart from them, so that a chain that lost its newest entries
is noticed too. What cannot be shown is that someone rewrote the whole chain and its head, or put back old copies of both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fedistill.privacy.accounting import Mechanism

START = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One spend.

    position: from 1. time: UTC, ISO 8601. data: a word for the records. unit: what one record is, "image" or "patient".
    what: a short word for the work. key: equal for equal work. delta: that the work was planned at.
    previous, hash: SHA-256, in hexadecimal, of the entry before (`START` of the first one) and of this one.
    """

    position: int
    time: str
    data: str
    unit: str
    what: str
    key: str
    delta: float
    mechanisms: tuple[Mechanism, ...]
    note: str
    previous: str
    hash: str = ""

    @property
    def work(self) -> tuple[object, ...]:
        """What has to be equal where the key is."""
        return self.data, self.unit, self.what, self.delta, self.mechanisms

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mechanisms": [m.to_dict() for m in self.mechanisms]}

    def to_row(self) -> tuple[Any, ...]:
        """The values of `FIELDS` as a database stores them: the mechanisms as JSON."""
        plain = self.to_dict()
        plain["mechanisms"] = _canonical(plain["mechanisms"])
        return tuple(plain[name] for name in FIELDS)


FIELDS = tuple(field.name for field in fields(Entry))


@dataclass(frozen=True)
class Head:
    """The number of entries, and the hash of the last one (`START` where there is none)."""

    count: int
    hash: str


class BrokenChain(Exception):
    """What is wrong with a chain, as the second half of a sentence."""


def sealed(entry: Entry) -> Entry:
    """`entry` with its hash."""
    return replace(entry, hash=_hash_of(entry.to_row()))


def head_of(entries: Sequence[Entry]) -> Head:
    return Head(len(entries), entries[-1].hash if entries else START)


def read_chain(rows: Iterable[tuple[Any, ...]]) -> list[Entry]:
    """The entries in `rows`, which hold `FIELDS` in the order of their positions; raises `BrokenChain`."""
    entries: list[Entry] = []
    for place, row in enumerate(rows, 1):
        found = dict(zip(FIELDS, row, strict=True))
        if found["position"] != place:
            raise BrokenChain(f"entry {place} is missing")
        if found["previous"] != head_of(entries).hash:
            raise BrokenChain(f"entry {place} does not follow the one before it")
        if found["hash"] != _hash_of(row):
            raise BrokenChain(f"entry {place} was changed")
        try:
            mechanisms = tuple(Mechanism(**fields) for fields in json.loads(found["mechanisms"]))
        except (TypeError, ValueError):
            raise BrokenChain(f"the mechanisms of entry {place} cannot be read") from None
        entries.append(Entry(**found | {"mechanisms": mechanisms}))
    return entries


def check_head(hashes: Sequence[str], head: Head) -> None:
    """Raises `BrokenChain` unless the entries of these hashes end where `head` says, or one entry later.

    One later, because the head is stored after the entry, and a process may be killed in between.
    """
    there = len(hashes)
    if head.count > there:
        raise BrokenChain(f"its newest entries are missing: {head.count} were written, {there} are there")
    if head.count < max(there - 1, 0) or head.hash != (START, *hashes)[head.count]:
        raise BrokenChain(f"its head was stored at another state of it, of {head.count} entries")


def _hash_of(row: tuple[Any, ...]) -> str:
    plain = dict(zip(FIELDS, row, strict=True))
    del plain["hash"]
    return hashlib.sha256(_canonical(plain).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)  # repr: a field that became bytes
