"""No change of a ledger goes unnoticed, and no file makes a traceback."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from ledgers import fails, mechanism, spend, tamper

from fedistill.errors import FedistillError
from fedistill.privacy.chain import FIELDS, START, sealed
from fedistill.privacy.ledger import Ledger


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET note = 'x'",
        "DELETE FROM entries WHERE position = 4",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE position = 4",
        "INSERT OR REPLACE INTO entries SELECT 5, time, data, unit, what, key, delta, mechanisms, note, previous, hash "
        "FROM entries WHERE position = 1",
        "INSERT INTO entries SELECT 9, time, data, unit, what, 'new', delta, mechanisms, note, previous, hash "
        "FROM entries WHERE position = 1",
    ],
)
def test_the_database_itself_refuses_changes(four: Ledger, statement: str) -> None:
    before = four.entries()
    with closing(sqlite3.connect(four.path)) as base, pytest.raises(sqlite3.IntegrityError, match="never changed"):
        base.execute(statement)
    assert four.entries() == before


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "position"])
@pytest.mark.parametrize(
    ("value", "place"), [("'x'", 2), ("'x'", 4), ("7", 2), ("x'ff00'", 2), ("CAST(x'ff' AS TEXT)", 2)]
)
def test_a_changed_field_is_found(four: Ledger, field: str, value: str, place: int) -> None:
    tamper(four, f"UPDATE entries SET {field} = {value} WHERE position = {place}")
    with fails("broken-ledger", f"entry {place} (was changed|does not follow)"):
        four.verify()
    with fails("broken-ledger"):  # nothing more is admitted
        spend(four, "next")
    with fails("broken-ledger"):
        four.spent("chest", 1e-5)


@pytest.mark.parametrize(
    ("statements", "text"),
    [
        (["DELETE FROM entries WHERE position = 1"], "entry 1 is missing"),
        (["DELETE FROM entries WHERE position = 2"], "entry 2 is missing"),
        (["DELETE FROM entries WHERE position = 2", "UPDATE entries SET position = position - 1 WHERE position > 2"],
         "entry 2 does not follow"),
        (["DELETE FROM entries WHERE position = 4"], "newest entries are missing: 4 were written, 3 are there"),
        (["DELETE FROM entries"], "newest entries are missing: 4 were written, 0 are there"),
        (["UPDATE entries SET position = 9 WHERE position = 2", "UPDATE entries SET position = 2 WHERE position = 3",
          "UPDATE entries SET position = 3 WHERE position = 9"], "entry 2 does not follow"),
        (["INSERT INTO entries SELECT 5, time, data, unit, what, 'new', delta, mechanisms, note, hash, hash FROM entries "
          "WHERE position = 4"], "entry 5 was changed"),
        (["DROP TABLE entries"], "no such table"),
    ],
)  # fmt: skip
def test_a_removed_moved_or_added_entry_is_found(four: Ledger, statements: list[str], text: str) -> None:
    tamper(four, *statements)
    with fails("broken-ledger", text):
        four.verify()


def test_a_last_entry_that_is_sealed_anew_is_found(four: Ledger) -> None:
    forged = sealed(replace(four.entries()[-1], mechanisms=(mechanism(1e4),)))
    tamper(
        four,
        "DELETE FROM entries WHERE position = 4",
        f"INSERT INTO entries VALUES ({', '.join(repr(value) for value in forged.to_row())})",
    )
    with fails("broken-ledger", "head was stored at another state"):
        four.verify()


def test_a_head_of_another_state_is_found(four: Ledger) -> None:
    now = four.head_path.read_bytes()
    for content, text in (
        (b"", "head is damaged"),
        (b"[]", "head is damaged"),
        (json.dumps({"count": "many", "hash": START}).encode(), "head is damaged"),
        (json.dumps({"count": 2, "hash": four.entries()[1].hash}).encode(), "another state of it, of 2"),
        (json.dumps({"count": 3, "hash": START}).encode(), "another state of it, of 3"),
        (json.dumps({"count": -1, "hash": START}).encode(), "another state"),
    ):
        four.head_path.write_bytes(content)
        with fails("broken-ledger", text):
            four.verify()
    four.head_path.unlink()
    with fails("broken-ledger", "head is missing"):
        four.verify()
    four.head_path.write_bytes(now)
    four.verify()
    four.path.unlink()
    with fails("broken-ledger", "is empty, but 4 entries were written"):
        Ledger(four.path)


def test_a_foreign_file_is_one_sentence(tmp_path: Path) -> None:
    text, foreign = tmp_path / "notes.txt", tmp_path / "other.db"
    text.write_text("not a database at all\n" * 100)
    with closing(sqlite3.connect(foreign)) as base:
        base.execute("CREATE TABLE entries (a)")
    for path in (text, foreign):
        before = path.read_bytes()
        for create in (True, False):
            with fails("broken-ledger", "is no ledger"):
                Ledger(path, create=create)
        assert path.read_bytes() == before
    with fails("no-ledger"):
        Ledger(tmp_path / "none", create=False)
    with fails("unusable-ledger"):
        Ledger(tmp_path)
    with fails("unusable-ledger"):
        Ledger(text / "below a file")
    with closing(sqlite3.connect(Ledger(tmp_path / "newer").path)) as base:
        base.execute("PRAGMA user_version = 2")
    with fails("other-format", "format 2"):
        Ledger(tmp_path / "newer")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seed", range(24))
def test_damage_is_one_sentence(four: Ledger, seed: int) -> None:
    """Bytes that flip or are cut off are either noticed or change no entry."""
    draw, before = random.Random(seed), four.entries()
    content = bytearray(four.path.read_bytes())
    if seed % 4 == 0:
        del content[draw.randrange(1, len(content)) :]
    else:
        for _ in range(draw.choice([1, 20, 400])):
            content[draw.randrange(len(content))] = draw.randrange(256)
    four.path.write_bytes(content)
    try:
        found = Ledger(four.path, create=False).entries()
    except FedistillError as error:
        found = error
    if isinstance(found, FedistillError):
        assert found.code in ("broken-ledger", "other-format", "unusable-ledger")
        assert "\n" not in found.sentence
    else:
        assert found == before
