"""Real images instead of synthetic ones: what every method must beat. They are patients' images, kept for comparison only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.matching.problem import Matching, draw_like
from fedistill.models.loss import groups_of


def random(matching: Matching, targets: Tensor, rng: torch.Generator) -> Tensor:
    """Positions `(m,)` of random images of the classes in `targets (m, K)`."""
    return draw_like(targets, matching.seen(), rng)


def k_centre(matching: Matching, targets: Tensor, rng: torch.Generator) -> Tensor:
    """Positions `(m,)`: greedy k-centre in the features of the experts (Sener and Savarese, ICLR 2018)."""
    return _per_class(matching, targets, farthest)


def herding(matching: Matching, targets: Tensor, rng: torch.Generator) -> Tensor:
    """Positions `(m,)`: greedy herding in the features of the experts (Welling, ICML 2009)."""
    return _per_class(matching, targets, nearest_mean)


def farthest(features: Tensor, m: int) -> list[int]:
    """The image nearest to the mean of `features (n, D)`, then always the one that is farthest from all that are chosen."""
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    gap = torch.full((len(features),), float("inf"))
    while len(chosen) < m:
        gap = torch.minimum(gap, (features - features[chosen[-1]]).norm(dim=1))
        gap[chosen] = -1.0
        chosen.append(int(gap.argmax()))
    return chosen


def nearest_mean(features: Tensor, m: int) -> list[int]:
    """Always the image that brings the mean of the chosen nearest to the mean of all `features (n, D)`."""
    mean, total = features.mean(0), torch.zeros(features.shape[1])
    chosen: list[int] = []
    for n in range(1, m + 1):
        gap = (mean - (total + features) / n).norm(dim=1)
        gap[chosen] = float("inf")
        chosen.append(int(gap.argmin()))
        total = total + features[chosen[-1]]
    return chosen


def _per_class(matching: Matching, targets: Tensor, of_class: Callable[[Tensor, int], list[int]]) -> Tensor:
    real = matching.seen()
    group = groups_of(targets, real.task.kind)
    chosen = torch.empty(len(targets), dtype=torch.int64)
    for c in group.unique().tolist():
        wanted, pool = torch.nonzero(group == c).flatten(), real.of_group(c)  # no image in two groups
        chosen[wanted] = pool[torch.tensor(of_class(_features(matching, real.batch(pool)), len(wanted)))]
    return chosen


@torch.no_grad()
def _features(matching: Matching, images: Tensor) -> Tensor:
    """Normalised features of the last checkpoints of three experts, side by side."""
    several = list(enumerate(matching.trajectories))[:3]
    parts = [
        torch.cat(
            [
                F.normalize(matching.net_of(e).features(t[-1], x.to(matching.device)), dim=1).cpu()
                for x in images.split(256)
            ]
        )
        for e, t in several
    ]
    return torch.cat(parts, 1)
