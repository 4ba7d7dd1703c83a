from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ledgers import mechanism, spend

from fedistill.privacy.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "site" / "spent.ledger")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    ledger = Ledger(tmp_path_factory.mktemp("made") / "spent.ledger")
    for k in range(4):
        spend(ledger, f"key {k}", mechanism(steps=k + 1), note="Grüße")
    return ledger


@pytest.fixture
def four(made: Ledger, tmp_path: Path) -> Ledger:
    """A ledger with four entries: a copy of it and of its head is as good as itself."""
    for path in (made.path, made.head_path):
        shutil.copy(path, tmp_path / path.name)
    return Ledger(tmp_path / made.path.name, create=False)
