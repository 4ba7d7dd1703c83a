"""Differentiable siamese augmentation (DSA; Zhao and Bilen, ICML 2021): one random operation for the whole batch.

Every operation is a differentiable function of the images, so that matching can pull gradients back through it. Which
operations may be used is public knowledge about the modality (a chest X-ray must not be flipped), see `data.public`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import listed
from fedistill.errors import unknown


@dataclass(frozen=True)
class Draw:
    """One operation and its random numbers in 0..1: everything that is needed to apply it again."""

    name: str
    u: tuple[float, ...] = ()


def draw(names: Sequence[str], generator: torch.Generator) -> Draw:
    """A random operation of `names` (the identity where there is none) and its parameters."""
    if not names:
        return Draw("none")
    pick = int(torch.randint(len(names), (1,), generator=generator))
    return Draw(names[pick], tuple(torch.rand(2, generator=generator).tolist()))


def augment(x: Tensor, op: Draw) -> Tensor:
    """Apply `op` with the same parameters to all images `(n, C, H, W)`, or volumes `(n, C, D, H, W)`.

    Rotations and flips turn a volume in the plane of its slices; everything else acts along its depth too.
    """
    return OPERATIONS[op.name](x, *op.u)


def _affine(x: Tensor, a: float, b: float, c: float, d: float, depth: float = 1.0) -> Tensor:
    """Coordinates (x, y) times [[a, b], [c, d]], and z times `depth`."""
    rows = [[a, b, 0.0], [c, d, 0.0]]
    if x.dim() == 5:
        rows = [[a, b, 0.0, 0.0], [c, d, 0.0, 0.0], [0.0, 0.0, depth, 0.0]]
    matrix = torch.tensor(rows, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    return F.grid_sample(
        x, F.affine_grid(matrix, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )


def _third(u: float, v: float) -> float:
    """A third random number out of two: uniform, and independent of either. The depth of a volume uses it."""
    return (u + v) % 1.0


def _rotate(x: Tensor, u: float, _: float) -> Tensor:
    angle = math.radians(15) * (2 * u - 1)
    return _affine(x, math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


def _scale(x: Tensor, u: float, v: float) -> Tensor:
    return _affine(x, 1.2 ** (2 * u - 1), 0.0, 0.0, 1.2 ** (2 * v - 1), 1.2 ** (2 * _third(u, v) - 1))


def _crop(x: Tensor, u: float, v: float) -> Tensor:
    size = x.shape[2:]
    pads = [max(1, round(0.125 * side)) for side in size]
    drawn = (_third(u, v), u, v)[-len(size) :]
    starts = [min(int(t * (2 * pad + 1)), 2 * pad) for t, pad in zip(drawn, pads, strict=True)]
    wide = F.pad(x, [pad for pad in reversed(pads) for _ in range(2)], mode="replicate")
    for axis, (start, side) in enumerate(zip(starts, size, strict=True), 2):
        wide = wide.narrow(axis, start, side)
    return wide


def _cutout(x: Tensor, u: float, v: float) -> Tensor:
    size = x.shape[2:]
    drawn = (_third(u, v), u, v)[-len(size) :]
    starts = [int(t * (side - side // 2 + 1)) for t, side in zip(drawn, size, strict=True)]
    keep = torch.ones(size, dtype=x.dtype, device=x.device)
    keep[tuple(slice(start, start + side // 2) for start, side in zip(starts, size, strict=True))] = 0
    return x * keep


def _brightness(x: Tensor, u: float, _: float) -> Tensor:
    return x + (u - 0.5)


def _contrast(x: Tensor, u: float, _: float) -> Tensor:
    mean = x.mean(tuple(range(1, x.dim())), keepdim=True)
    return (x - mean) * (u + 0.5) + mean


def _saturation(x: Tensor, u: float, _: float) -> Tensor:
    grey = x.mean(1, keepdim=True)
    return (x - grey) * (2 * u) + grey


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "flip": lambda x, u, _: x.flip(-1) if u < 0.5 else x,
    "vflip": lambda x, u, _: x.flip(-2) if u < 0.5 else x,
    "rot90": lambda x, u, _: x.rot90(min(int(4 * u), 3), (-2, -1)),
    "rotate": _rotate,
    "scale": _scale,
    "crop": _crop,
    "cutout": _cutout,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
}


def parse_operations(spec: str) -> tuple[str, ...]:
    """The operations of a comma list ("none": no augmentation). Raises `FedistillError` on an unknown one."""
    names = tuple(name for name in listed(spec) if name != "none")
    for name in names:
        if name not in OPERATIONS:
            raise unknown("augmentation", name, OPERATIONS)
    return names
