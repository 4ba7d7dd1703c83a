"""Ledgers that several tests need."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from fedistill.errors import FedistillError
from fedistill.privacy.accounting import Mechanism
from fedistill.privacy.chain import Entry
from fedistill.privacy.ledger import Ledger


def mechanism(noise: float = 5.0, steps: int = 1, rate: float = 1.0) -> Mechanism:
    return Mechanism(name="sum", sample_rate=rate, noise_multiplier=noise, steps=steps)


def spend(ledger: Ledger, key: str, *mechanisms: Mechanism, **other) -> Entry:
    given = {"data": "chest", "unit": "image", "what": "experts", "delta": 1e-5} | other
    return ledger.spend(key=key, mechanisms=mechanisms or [mechanism()], **given)


def fails(code: str, text: str = "") -> pytest.RaisesExc:
    return pytest.raises(FedistillError, check=lambda error: error.code == code, match=text or None)


def tamper(ledger: Ledger, *statements: str) -> None:
    """What somebody with a database tool can do, who first removes the triggers."""
    with closing(sqlite3.connect(ledger.path)) as base:
        for trigger in ("no_update", "no_delete", "only_append"):
            base.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            base.execute(statement)
        base.commit()
