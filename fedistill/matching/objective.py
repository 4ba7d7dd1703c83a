"""How far the student ended from the expert, and which parameters count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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


def shape_difference(student: Sequence[Tensor], expert: Sequence[Tensor]) -> Tensor:
    """Smooth L1 between the angles of two triangles in parameter space: start, middle and end of each path, `(P,)` vectors.

    The "shape-wise potential" of HoP-TM (Bian et al., MICCAI 2025), after its public code: cosines of the angle at each
    corner, from normalised differences. Points that coincide count as a right angle.
    """
    return F.smooth_l1_loss(_angles(student), _angles(expert))


def _angles(points: Sequence[Tensor]) -> Tensor:
    corners = []
    for i in range(3):
        a, b = (F.normalize(points[j] - points[i], dim=0) for j in range(3) if j != i)
        corners.append(a @ b)
    return torch.stack(corners)


def keep_all(theta: Tensor, start: Tensor, target: Tensor, *, keep: float, progress: float) -> Tensor:
    return torch.ones_like(theta)


def keep_easy(theta: Tensor, start: Tensor, target: Tensor, *, keep: float, progress: float) -> Tensor:
    """1 for the share `keep` of parameters that are easiest to match, else 0: pruning of parameters that are hard to match.

    Inspired by Li et al. (AAAI-23 workshop; arXiv 2209.14603), whose own similarity measure and threshold could not be
    read: here difficulty is how far the student still is, relative to the way it had to go,
    |theta - target| / |start - target|, and the hardest 1 - keep are dropped. At least 1 % always stay.
    """
    difficulty = (theta - target).abs() / (start - target).abs().clamp_min(1e-12)
    return _lowest(difficulty, keep)


def keep_growing(theta: Tensor, start: Tensor, target: Tensor, *, keep: float, progress: float) -> Tensor:
    """Easy to complex: the share of the parameters with the smallest squared error, growing from `keep` to all.

    After HoP-TM (MICCAI 2025), whose threshold on the error grows by a factor; a share needs no unit. `progress` is the
    share of the iterations that are done: all parameters count from half way on. Nothing is latched: a parameter that has
    become hard leaves again.
    """
    return _lowest((theta - target).square(), keep + (1 - keep) * min(1.0, 2 * progress))


def drop_easy(theta: Tensor, start: Tensor, target: Tensor, *, keep: float, progress: float) -> Tensor:
    """The share `keep` with the largest squared error (EDF, Wang et al., CVPR 2025: patterns that all images share drop out)."""
    return _lowest(-(theta - target).square(), keep)


def _lowest(difficulty: Tensor, keep: float) -> Tensor:
    count = min(max(int(keep * difficulty.numel()), difficulty.numel() // 100, 1), difficulty.numel())
    return (difficulty <= difficulty.kthvalue(count).values).to(difficulty.dtype)


MASKS = {"none": keep_all, "prune": keep_easy, "grow": keep_growing, "drop-easy": drop_easy}
