"""The ledger: nothing that was acknowledged is lost, nothing is spent twice or over the cap, and no change goes unnoticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import stat
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.errors import FedistillError
from fedistill.privacy import ledger as module
from fedistill.privacy.accounting import Mechanism, epsilon_of
from fedistill.privacy.chain import FIELDS, START, Entry, sealed
from fedistill.privacy.ledger import Cap, Ledger, so_far

fork = multiprocessing.get_context("fork")  # a child that has torch already starts at once


def mechanism(noise: float = 5.0, steps: int = 1, rate: float = 1.0) -> Mechanism:
    return Mechanism(name="sum", sample_rate=rate, noise_multiplier=noise, steps=steps)


def spend(ledger: Ledger, key: str, *mechanisms: Mechanism, **other) -> Entry:
    given = {"data": "chest", "unit": "image", "what": "experts", "delta": 1e-5} | other
    return ledger.spend(key=key, mechanisms=mechanisms or [mechanism()], **given)


def fails(code: str, text: str = "") -> pytest.RaisesExc:
    return pytest.raises(FedistillError, check=lambda error: error.code == code, match=text or None)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "spent.ledger")


@pytest.fixture
def four(ledger: Ledger) -> Ledger:
    for k in range(4):
        spend(ledger, f"key {k}", mechanism(steps=k + 1), note="Grüße")
    return ledger


def tamper(ledger: Ledger, *statements: str) -> None:
    """What somebody with a database tool can do, who first removes the triggers."""
    with closing(sqlite3.connect(ledger.path)) as base:
        for trigger in ("no_update", "no_delete", "only_append"):
            base.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            base.execute(statement)
        base.commit()


# --- what is written --------------------------------------------------------------------------------------------------


def test_an_entry_says_what_was_spent(ledger: Ledger) -> None:
    work = [mechanism(2.5, 50, 0.2), mechanism(20.0)]
    first = spend(ledger, "a", *work, unit="patient", note="round 1")
    second = spend(ledger, "b", data="derma", what="counts")
    assert (first.position, first.data, first.unit, first.what, first.key) == (1, "chest", "patient", "experts", "a")
    assert (first.delta, first.mechanisms, first.note) == (1e-5, tuple(work), "round 1")
    assert first.time.endswith("+00:00")
    assert (first.previous, second.previous, second.position) == (START, first.hash, 2)
    assert Ledger(ledger.path).entries() == [first, second]
    assert ledger.verify() == module.Head(2, second.hash)


def test_only_the_owner_may_read_it(ledger: Ledger) -> None:
    spend(ledger, "a")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (ledger.path, ledger.head_path)} == {0o600}


def test_the_same_key_spends_once(ledger: Ledger) -> None:
    first = spend(ledger, "a", mechanism(steps=3), cap=Cap(epsilon=2, delta=1e-5))
    assert spend(ledger, "a", mechanism(steps=3), note="again", cap=Cap(epsilon=0.1, delta=1e-5)) == first
    assert ledger.entries() == [first]


@pytest.mark.parametrize("other", [{"data": "derma"}, {"unit": "patient"}, {"what": "sketch"}, {"delta": 1e-6}])
def test_a_key_stands_for_one_work(ledger: Ledger, other: dict) -> None:
    spend(ledger, "a")
    with fails("other-work", "choose a new key"):
        spend(ledger, "a", **other)
    with fails("other-work"):
        spend(ledger, "a", mechanism(steps=2))
    assert len(ledger.entries()) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"unit": "images"}, {"delta": 0.0}, {"delta": 1.0}, {"data": " "}, {"what": ""}, {"note": "two\nlines"}, {"mechanisms": []}],
    ids=str,
)  # fmt: skip
def test_what_is_no_spend_is_refused(ledger: Ledger, wrong: dict) -> None:
    given = {"key": "a", "data": "x", "unit": "image", "what": "y", "delta": 1e-5, "mechanisms": [mechanism()]}
    with pytest.raises(FedistillError):
        ledger.spend(**(given | wrong))
    assert ledger.entries() == []


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (1, 0), (1, 1), (float("nan"), 0.1)])
def test_a_cap_is_checked(epsilon: float, delta: float) -> None:
    with fails("bad-cap"):
        Cap(epsilon=epsilon, delta=delta)


# --- what it comes to -------------------------------------------------------------------------------------------------


def test_spends_compose(ledger: Ledger) -> None:
    assert ledger.spent("chest", 1e-5).epsilon == 0
    parts = [mechanism(5.0, 4), mechanism(3.0, 30, 0.1), mechanism(4.0)]
    for k, part in enumerate(parts):
        spend(ledger, str(k), part)
    spend(ledger, "other", mechanism(0.5), data="derma")
    alone = [epsilon_of([part], 1e-5).epsilon for part in parts]
    whole = ledger.spent("chest", 1e-5)
    assert whole == epsilon_of(parts, 1e-5)
    assert max(alone) + 0.1 < whole.epsilon < sum(alone) - 0.1
    assert [total.epsilon for total in so_far(ledger.entries())] == [
        *(epsilon_of(parts[:k], 1e-5).epsilon for k in (1, 2, 3)),
        epsilon_of([mechanism(0.5)], 1e-5).epsilon,
    ]


def test_the_weaker_unit_is_reported(ledger: Ledger) -> None:
    spend(ledger, "a", unit="patient")
    assert ledger.unit_of("chest") == "patient"
    spend(ledger, "b", unit="image", data="derma")
    assert ledger.unit_of("chest") == "patient"
    spend(ledger, "c", unit="image")
    assert ledger.unit_of("chest") == "image"
    assert ledger.spent("chest", 1e-5) == epsilon_of([mechanism()] * 2, 1e-5)


def test_the_cap_holds_to_the_last_digit(ledger: Ledger) -> None:
    spend(ledger, "a", mechanism(5.0, 4))
    spend(ledger, "other", mechanism(0.3), data="derma")  # spends nothing of chest
    total = epsilon_of([mechanism(5.0, 4), mechanism(5.0, 5)], 1e-6).epsilon
    with fails("over-budget") as refused:
        spend(ledger, "b", mechanism(5.0, 5), cap=Cap(epsilon=total - 1e-9, delta=1e-6))
    spent, asked = (epsilon_of([mechanism(5.0, steps)], 1e-6).epsilon for steps in (4, 5))
    for number in (total, total, spent, total - spent, asked):
        assert f"{number:.3f}" in refused.value.sentence or f"{number:g}" in refused.value.sentence
    assert len(ledger.entries()) == 2
    spend(ledger, "b", mechanism(5.0, 5), cap=Cap(epsilon=total, delta=1e-6))
    assert ledger.spent("chest", 1e-6).epsilon == total


WORK = st.tuples(st.sampled_from([2.0, 5.0, 20.0]), st.integers(1, 6), st.sampled_from([1.0, 0.1]))


@settings(max_examples=10)
@given(st.lists(WORK, min_size=2, max_size=5), st.floats(0.3, 4))
def test_what_is_accepted_never_exceeds_the_cap(works: list[tuple[float, int, float]], epsilon: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger, cap = Ledger(Path(folder) / "l"), Cap(epsilon=epsilon, delta=1e-5)
        accepted = []
        for k, (noise, steps, rate) in enumerate(works):
            asked = mechanism(noise, steps, rate)
            if epsilon_of([*accepted, asked], cap.delta).epsilon > epsilon:
                with fails("over-budget"):
                    spend(ledger, str(k), asked, cap=cap)
            else:
                spend(ledger, str(k), asked, cap=cap)
                accepted.append(asked)
            assert ledger.spent("chest", cap.delta).epsilon <= epsilon
        assert [e.mechanisms[0] for e in ledger.entries()] == accepted


# --- tampering --------------------------------------------------------------------------------------------------------


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


# --- files that are none ----------------------------------------------------------------------------------------------


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


def test_another_process_that_holds_it_is_waited_for_and_then_named(ledger: Ledger, monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as base:
        base.execute("BEGIN IMMEDIATE")
        with fails("unusable-ledger", "no other process holds it"):
            spend(ledger, "a")
        assert ledger.entries() == []  # who only reads need not wait
        base.execute("ROLLBACK")
    spend(ledger, "a")


# --- processes that race, and that are killed -------------------------------------------------------------------------


def race(path: Path, key: str, start, results) -> None:
    ledger = Ledger(path)
    start.wait()
    try:
        spend(ledger, key, cap=Cap(epsilon=0.8, delta=1e-5))  # one sum takes 0.74, two 1.1
        results.put("spent")
    except FedistillError as error:
        results.put(error.code)


def test_of_two_processes_one_spends_what_is_left(tmp_path: Path) -> None:
    epsilon_of([mechanism()] * 2, 1e-5)  # Opacus is imported here, before the fork
    for turn in range(4):
        start, results = fork.Barrier(2), fork.Queue()
        racers = [fork.Process(target=race, args=(tmp_path / str(turn), key, start, results)) for key in "ab"]
        for racer in racers:
            racer.start()
        assert sorted(results.get(timeout=60) for _ in racers) == ["over-budget", "spent"]
        for racer in racers:
            racer.join()
        assert Ledger(tmp_path / str(turn)).verify().count == 1


def spend_forever(path: Path, turn: int, pipe: int) -> None:
    ledger = Ledger(path)
    for k in range(10_000):
        key = f"{turn}.{k}"
        spend(ledger, key)
        os.write(pipe, f"{key}\n".encode())


def test_nothing_acknowledged_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    draw, path, acknowledged = random.Random(0), tmp_path / "l", []
    for turn in range(24):
        reading, writing = os.pipe()
        children = [fork.Process(target=spend_forever, args=(path, 2 * turn + i, writing)) for i in range(1 + turn % 2)]
        for child in children:
            child.start()
        os.close(writing)
        time.sleep(draw.uniform(0.02, 0.2))
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        with os.fdopen(reading) as lines:
            acknowledged += lines.read().split()
        Ledger(path).verify()
    ledger = Ledger(path)
    keys = [entry.key for entry in ledger.entries()]
    assert len(acknowledged) > 24
    assert set(acknowledged) <= set(keys)
    assert len(keys) - len(acknowledged) <= 36  # at most one spend per killed process was not acknowledged yet
    assert len(set(keys)) == len(keys)
    spend(ledger, "last")
    assert ledger.verify().count == len(keys) + 1


class Killed(BaseException):
    pass


def stored(ledger: Ledger) -> int:
    return json.loads(ledger.head_path.read_text())["count"]


def spend_and_die(ledger: Ledger, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed when the entry is durable and its head is not."""
    count, write_json = len(ledger.entries()), module.write_json

    def killed(path: Path, value: dict) -> None:
        if value["count"] > count:
            raise Killed
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", killed)
        pytest.raises(Killed, spend, ledger, key)


def test_a_kill_between_the_entry_and_its_head_is_repaired(ledger: Ledger, monkeypatch) -> None:
    spend(ledger, "a")
    for count, key in ((1, "b"), (2, "c")):  # twice: the head must not fall two behind
        spend_and_die(ledger, key, monkeypatch)
        assert (ledger.verify().count, stored(ledger)) == (count + 1, count)
    assert spend(ledger, "c").position == 3  # the retry finds its entry
    assert stored(ledger) == 3
    tamper(ledger, "DELETE FROM entries WHERE position = 3")
    with fails("broken-ledger", "newest entries are missing"):
        ledger.verify()


def test_a_copy_is_a_ledger(four: Ledger, tmp_path: Path) -> None:
    for path in (four.path, four.head_path):
        shutil.copy(path, tmp_path / path.name)
    assert Ledger(tmp_path / four.path.name, create=False).entries() == four.entries()
