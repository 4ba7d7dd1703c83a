"""Small private problems."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.privacy.accounting import Mechanism
from fedistill.seeding import generator

EPSILON = 3.0


def settings(**more: object) -> Config:
    tiny = {
        "privacy": "dp", "epsilon": EPSILON, "method": "ptm", "experts": 1, "expert_steps": 20, "checkpoint_every": 5,
        "width": 4, "workers": 1, "ipc": 2, "iterations": 6, "syn_steps": 3, "segment": 2, "image_lr": 5.0,
        "skip_above": 1e9, "sketch_networks": 2, "sketch_frequencies": 16, "sketch_augmentations": 2, "augment": "none",
    }  # fmt: skip
    return make_config(tiny | more).resolved()


def labelled(n: int = 40, kind: str = "multiclass", channels: int = 1, patients: int = 0, seed: int = 0) -> Dataset:
    """`n` images of noise, 3 classes, 16 pixels; `patients`: of whom each has images of every class."""
    rng = generator(seed, "private test")
    images = torch.randint(256, (n, channels, 16, 16), generator=rng, dtype=torch.uint8)
    labels = torch.randint(3, (n,), generator=rng)
    if kind == "multilabel":
        labels = torch.randint(2, (n, 3), generator=rng)
    patient = torch.arange(n) % patients * 7 if patients else None
    split = Split(images, labels, torch.zeros(n, dtype=torch.int64), patient)
    return Dataset("private", "generic", ("a", "b", "c"), ("here",), split, split, split, kind)


def gaussian(noise: float = 1e-12, rate: float = 0.5, clip: float = 1e6, steps: int = 1000) -> Mechanism:
    return Mechanism(name="dp-sgd", sample_rate=rate, noise_multiplier=noise, steps=steps, clip_norm=clip)


def norm(a: Tensor) -> float:
    return float(a.double().norm())
