"""Images that are kept smaller than they are used (the multi-formation of IDC; Kim et al., ICML 2022, arXiv 2205.14959)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def enlarge(small: Tensor, scale: int) -> Tensor:
    """`(n, C, h, w)`, or volumes `(n, C, d, h, w)`, to `scale` times the side: straight lines between neighbours along each axis.

    Every pixel of `small` stands in the result unchanged, at each `scale`-th place, so that `reduce` is an exact inverse; the last
    one is repeated. Differentiable.
    """
    for axis in range(2, small.dim()) if scale > 1 else ():
        last = small.shape[axis] - 1
        following = torch.cat([small.narrow(axis, 1, last), small.narrow(axis, last, 1)], axis)
        between = [(1 - k / scale) * small + k / scale * following for k in range(1, scale)]
        small = torch.stack([small, *between], axis + 1).flatten(axis, axis + 1)
    return small


def reduce(images: Tensor, scale: int) -> Tensor:
    """What `enlarge` was given to make `images`: every `scale`-th pixel along each axis."""
    for axis in range(2, images.dim()) if scale > 1 else ():
        images = images.index_select(axis, torch.arange(0, images.shape[axis], scale, device=images.device))
    return images


def shrink(images: Tensor, scale: int) -> Tensor:
    """Small versions of images that `enlarge` did not make: means of `scale` pixels along each axis."""
    if scale == 1:
        return images
    return F.avg_pool2d(images, scale) if images.dim() == 4 else F.avg_pool3d(images, scale)
