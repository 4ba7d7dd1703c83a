"""Trajectories on disk: the first checkpoint in float32, every later one as a scaled float16 step.

Step t is the difference to the *decoded* checkpoint t-1, so rounding never accumulates; the error of every checkpoint
stays below a thousandth of the step that led to it, which is checked when the trajectory is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedistill.errors import FedistillError

TOLERANCE = 1e-3  # of the length of a step; matching compares differences of checkpoints, not checkpoints


def encode(path: Tensor) -> dict[str, Tensor]:
    """Checkpoints `(T+1, P)` float32 to `first (P,)` float32, `steps (T, P)` float16 and `scale (T,)` float32.

    Steps that float16 cannot hold within the tolerance make the whole trajectory stay in float32. Raises
    `FedistillError` on a checkpoint that is not finite.
    """
    if not torch.isfinite(path).all():
        raise FedistillError("expert-diverged", "An expert diverged (its parameters are not finite): lower expert_lr.")
    here, steps, scales = path[0], [], []
    for target in path[1:]:
        step = target - here
        scale = step.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        small = (step / scale).half()
        here = here + small.float() * scale
        if (here - target).norm() > TOLERANCE * step.norm():
            return {"path": path}
        steps.append(small)
        scales.append(scale)
    return {"first": path[0], "steps": torch.stack(steps), "scale": torch.stack(scales)}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """The checkpoints `(T+1, P)` float32 of `encode`, added up in the same order."""
    if "path" in parts:
        return parts["path"]
    path = [parts["first"]]
    for small, scale in zip(parts["steps"], parts["scale"], strict=True):
        path.append(path[-1] + small.float() * scale)
    return torch.stack(path)


def check_moves(path: Tensor, about: Mapping[str, Any]) -> None:
    """Raise `FedistillError` when two neighbouring checkpoints of `path` `(T+1, P)` are equal: nothing to match."""
    if ((path[1:] - path[:-1]).norm(dim=1) == 0).any():
        raise FedistillError(
            "expert-stuck",
            f"An expert did not move between two checkpoints ({dict(about)}): raise expert_lr or checkpoint_every.",
        )
