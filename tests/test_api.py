from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fedistill
from fedistill.errors import FedistillError

TINY = {
    "experts": 2, "expert_steps": 30, "checkpoint_every": 5, "width": 4, "iterations": 5, "syn_steps": 3, "segment": 2,
    "workers": 1, "image_lr": 5.0, "skip_above": 1000.0,
}  # fmt: skip


def images(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    return (torch.rand((n, 1, 16, 16), generator=rng) * 0.5 + 0.4 * labels[:, None, None, None]), labels


def test_five_lines_distil_tensors() -> None:
    x, y = images()
    synthetic = fedistill.distill(x, y, ipc=2, **TINY)
    loader = torch.utils.data.DataLoader(synthetic, batch_size=2)
    image, label = next(iter(loader))
    assert image.shape == (2, 1, 16, 16)
    assert label.shape == (2, 2)
    assert isinstance(synthetic, fedistill.SyntheticSet)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    x, y = images()
    one, two, other = (fedistill.distill(x, y, ipc=1, seed=seed, **TINY) for seed in (3, 3, 4))
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x, y: (x * float("nan"), y), "NaN or values outside"),
        (lambda x, y: (x * 255, y), "scale it to 0..1"),
        (lambda x, y: (x[:, 0, 0], y), "images has shape"),
        (lambda x, y: (x.repeat(1, 2, 1, 1), y), "images has shape"),
        (lambda x, y: (x, y[:-1]), "must hold 40 whole numbers"),
        (lambda x, y: (x, y.float()), "whole numbers"),
        (lambda x, y: (x, y - 1), "labels run from -1"),
        (lambda x, y: (x, y * 0), "All labels are the same"),
        (lambda x, y: (x[:3], y[:3]), "has only 3 training images"),
        (lambda x, y: (x[:0], y[:0]), "images has shape"),
        (lambda x, y: (x[..., :8], y), "square"),
        (lambda x, y: (x.numpy(), y), "torch.from_numpy"),
        (lambda x, y: (x, y * 2), "No image has label 1"),
    ],
)
def test_bad_tensors_are_one_sentence(spoil, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        fedistill.distill(*spoil(*images()), ipc=2, **TINY)


def test_the_caller_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fedistill.distill(*images(), ipc=1, **TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_fedistill_does_not_import_torch() -> None:
    code = "import sys, fedistill.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
