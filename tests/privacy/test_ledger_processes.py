"""Processes that race for a ledger, wait for it, and are killed over it: nothing acknowledged is lost or spent twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from ledgers import fails, mechanism, spend, tamper

from fedistill.errors import FedistillError
from fedistill.privacy import ledger as module
from fedistill.privacy.accounting import epsilon_of
from fedistill.privacy.ledger import Cap, Ledger

fork = multiprocessing.get_context("fork")  # a child that has torch already starts at once


def test_another_process_that_holds_it_is_waited_for_and_then_named(ledger: Ledger, monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as base:
        base.execute("BEGIN IMMEDIATE")
        with fails("unusable-ledger", "no other process holds it"):
            spend(ledger, "a")
        assert ledger.entries() == []  # who only reads need not wait
        base.execute("ROLLBACK")
    spend(ledger, "a")


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
        with pytest.raises(Killed):
            spend(ledger, key)


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


def test_a_head_that_is_stored_late_is_not_an_old_one(ledger: Ledger, monkeypatch) -> None:
    others, connect = ["b", "c"], sqlite3.connect

    class Overtaken(sqlite3.Connection):
        """Between the entry and its head, other processes spend."""

        def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
            done = super().execute(statement, *values)
            if statement == "COMMIT" and others:
                spend(ledger, others.pop())
            return done

    monkeypatch.setattr(sqlite3, "connect", lambda *about, **how: connect(*about, **how, factory=Overtaken))
    spend(ledger, "a")
    assert not others
    assert (ledger.verify().count, stored(ledger)) == (3, 3)
