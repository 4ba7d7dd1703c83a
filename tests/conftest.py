from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.data.sources import load_data
from fedistill.memory import keep_freed_memory

torch.set_num_threads(1)  # tests run in parallel processes
keep_freed_memory()
settings.register_profile("fedistill", deadline=None, max_examples=50)
settings.load_profile("fedistill")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Tests that draw from torch's global generator see the same numbers every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real medical images beside the checkout."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real images are not installed: there is no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    """A small phantom set: 3 classes, 3 scanners, grey, 16 pixels."""
    values = {"phantom_images": 120, "phantom_classes": 3, "phantom_size": 16}
    return load_data(make_config(values))
