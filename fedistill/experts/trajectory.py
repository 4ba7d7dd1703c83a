"""Trajectories on disk: the first checkpoint in float32, every later one as a scaled float16 step.

Step t is the difference to the *decoded* checkpoint t-1, so rounding never accumulates; the error of every checkpoint
stays below a thousandth of the step that led to it, which is checked when a step is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedistill.errors import FedistillError
from fedistill.files import whole

TOLERANCE = 1e-3  # of the length of a step; matching compares differences of checkpoints, not checkpoints


def begin(theta: Tensor) -> dict[str, Tensor]:
    """A trajectory of one checkpoint `theta (P,)`: `first (P,)`, `steps (0, P)` float16, `scale (0,)`."""
    return {"first": theta, "steps": torch.zeros((0, len(theta)), dtype=torch.float16), "scale": torch.zeros(0)}


def extend(parts: Mapping[str, Tensor], checkpoints: list[Tensor]) -> dict[str, Tensor]:
    """The trajectory with more checkpoints `(P,)` at its end.

    Where float16 cannot hold a step within the tolerance, all steps are kept in float32 from then on. Raises
    `FedistillError` on a checkpoint that is not finite.
    """
    here, steps, scales = decode(parts)[-1], [parts["steps"]], [parts["scale"]]
    dtype = parts["steps"].dtype
    for target in checkpoints:
        if not torch.isfinite(target).all():
            raise FedistillError(
                "expert-diverged", "An expert diverged (its parameters are not finite): lower expert_lr."
            )
        step = target - here
        scale = step.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        small = (step / scale).to(dtype)
        if (here + small.float() * scale - target).norm() > TOLERANCE * step.norm():
            dtype = torch.float32
            small = step / scale
        here = here + small.float() * scale
        steps.append(small[None])
        scales.append(scale[None])
    return {"first": parts["first"], "steps": torch.cat([s.to(dtype) for s in steps]), "scale": torch.cat(scales)}


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """The checkpoints `(T+1, P)` float32, added up in the order in which they were written."""
    path = [parts["first"]]
    for small, scale in zip(parts["steps"], parts["scale"], strict=True):
        path.append(path[-1] + small.float() * scale)
    return torch.stack(path)


def read(file: Path, last: int) -> Tensor:
    """Checkpoints 0 to `last` of a trajectory on disk, `(last+1, P)` float32; what comes after is not read."""
    with whole(file), safe_open(file, "pt") as stored:
        parts = {"first": stored.get_tensor("first")}
        parts |= {name: stored.get_slice(name)[:last] for name in ("steps", "scale")}
    return decode(parts)


def check_moves(path: Tensor, about: Mapping[str, Any]) -> None:
    """Raise `FedistillError` when two neighbouring checkpoints of `path` `(T+1, P)` are equal: nothing to match."""
    if ((path[1:] - path[:-1]).norm(dim=1) == 0).any():
        raise FedistillError(
            "expert-stuck",
            f"An expert did not move between two checkpoints ({dict(about)}): raise expert_lr or checkpoint_every.",
        )
