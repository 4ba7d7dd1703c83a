"""Randomness that protects people: fresh from the operating system, and never recorded."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from fedistill.privacy.accounting import Mechanism


def secret_generator(device: torch.device | None = None) -> torch.Generator:
    """A generator that nobody can start again. A known seed would let anyone subtract the noise.

    Torch's generators are no cryptographic ones, and floating-point noise has gaps (Mironov, CCS 2012): a release says so.
    """
    return torch.Generator(device or torch.device("cpu")).manual_seed(secrets.randbits(63))


def noisy(sums: Tensor, mechanism: Mechanism) -> Tensor:
    """`sums` plus Gaussian noise for contributions of at most `mechanism.clip_norm` in L2 norm, over all of `sums`."""
    deviation = mechanism.noise_multiplier * mechanism.clip_norm
    return sums + deviation * torch.randn(sums.shape, generator=secret_generator()).to(sums)
