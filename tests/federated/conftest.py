"""What all federated tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from server import collect, stages


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that does not wait long, and torch's threads as they were."""
    monkeypatch.setattr(collect, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(stages, "WAIT_SIMULATED", 0.5)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
