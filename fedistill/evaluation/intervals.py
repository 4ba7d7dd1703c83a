"""How sure a share is that was counted on few images: Wilson's interval (Journal of the American Statistical Association, 1927)."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

LEVEL = 0.95


def wilson(right: float, of: float, level: float = LEVEL) -> tuple[float, float] | None:
    """The shares `q` in the light of which `right` of `of` is no surprise; None where nothing was counted.

        |right / of - q| <= z sqrt(q (1 - q) / of)

    Solved for q. Unlike the textbook interval it stays within 0 and 1, and is not empty where all or none are right.
    """
    if of <= 0:
        return None
    z, share = NormalDist().inv_cdf((1 + level) / 2), right / of
    shrink = 1 + z * z / of
    middle = (share + z * z / (2 * of)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def recognised(counts: Tensor, kind: str) -> list[tuple[int, int]]:
    """(recognised images, images) of each class or finding, from counts as `evaluation.metrics` has them."""
    if kind == "multilabel":
        right, of = counts[:, 1, 1], counts[:, 1].sum(1)
    else:
        right, of = counts.diagonal(), counts.sum(1)
    return list(zip(right.tolist(), of.tolist(), strict=True))
