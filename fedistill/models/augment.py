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
    """Apply `op` with the same parameters to all images `(n, C, H, W)`."""
    return OPERATIONS[op.name](x, *op.u)


def _affine(x: Tensor, a: float, b: float, c: float, d: float) -> Tensor:
    matrix = torch.tensor([[a, b, 0.0], [c, d, 0.0]], dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    return F.grid_sample(
        x, F.affine_grid(matrix, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )


def _rotate(x: Tensor, u: float, _: float) -> Tensor:
    angle = math.radians(15) * (2 * u - 1)
    return _affine(x, math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


def _scale(x: Tensor, u: float, v: float) -> Tensor:
    return _affine(x, 1.2 ** (2 * u - 1), 0.0, 0.0, 1.2 ** (2 * v - 1))


def _crop(x: Tensor, u: float, v: float) -> Tensor:
    h, w = x.shape[2:]
    pad = max(1, round(0.125 * h))
    top, left = (min(int(t * (2 * pad + 1)), 2 * pad) for t in (u, v))
    return F.pad(x, (pad, pad, pad, pad), mode="replicate")[:, :, top : top + h, left : left + w]


def _cutout(x: Tensor, u: float, v: float) -> Tensor:
    h, w = x.shape[2:]
    side_h, side_w = h // 2, w // 2
    top, left = int(u * (h - side_h + 1)), int(v * (w - side_w + 1))
    keep = torch.ones((h, w), dtype=x.dtype, device=x.device)
    keep[top : top + side_h, left : left + side_w] = 0
    return x * keep


def _brightness(x: Tensor, u: float, _: float) -> Tensor:
    return x + (u - 0.5)


def _contrast(x: Tensor, u: float, _: float) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (u + 0.5) + mean


def _saturation(x: Tensor, u: float, _: float) -> Tensor:
    grey = x.mean(1, keepdim=True)
    return (x - grey) * (2 * u) + grey


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "flip": lambda x, u, _: x.flip(3) if u < 0.5 else x,
    "vflip": lambda x, u, _: x.flip(2) if u < 0.5 else x,
    "rot90": lambda x, u, _: x.rot90(min(int(4 * u), 3), (2, 3)),
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
    names = tuple(name.strip() for name in spec.split(",") if name.strip() and name.strip() != "none")
    for name in names:
        if name not in OPERATIONS:
            raise unknown("augmentation", name, OPERATIONS)
    return names
