"""How far the student ended from the expert, and which parameters count."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.errors import FedistillError


def mismatch(theta: Tensor, start: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """|m (theta - target)|^2 / |m (start - target)|^2 (Cazenavette et al., CVPR 2022, eq. 2, on masked parameters).

    All vectors `(P,)`. Raises `FedistillError` when the expert hardly moved, since the ratio would be noise.
    """
    length = (mask * (start - target)).square().sum()
    if length <= 1e-12 * mask.sum():
        raise FedistillError(
            "segment-too-short", "An expert segment has no length: raise segment, checkpoint_every or expert_lr."
        )
    return (mask * (theta - target)).square().sum() / length


def keep_all(theta: Tensor, start: Tensor, target: Tensor, *, keep: float) -> Tensor:
    return torch.ones_like(theta)


def keep_easy(theta: Tensor, start: Tensor, target: Tensor, *, keep: float) -> Tensor:
    """1 for the share `keep` of parameters that are easiest to match, else 0: pruning of parameters that are hard to match.

    Inspired by Li et al. (AAAI-23 workshop; arXiv 2209.14603), whose own similarity measure and threshold could not be
    read: here difficulty is how far the student still is, relative to the way it had to go,
    |theta - target| / |start - target|, and the hardest 1 - keep are dropped. At least 1 % always stay.
    """
    count = max(int(keep * theta.numel()), theta.numel() // 100, 1)
    difficulty = (theta - target).abs() / (start - target).abs().clamp_min(1e-12)
    return (difficulty <= difficulty.kthvalue(count).values).to(theta.dtype)


MASKS = {"none": keep_all, "prune": keep_easy}
