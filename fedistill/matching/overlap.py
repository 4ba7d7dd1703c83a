"""Dynamic overlap mitigation: synthetic images of a class that say the same are made afresh.

Yu, Liu and Chen (2024, arXiv 2403.13469) name the module; its measure and threshold are not public. The definitions here are
our own: overlap is the cosine of expert features, and it is too much when it exceeds the 95th percentile of what two *real*
images of the class have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.models.flat import Flat

Fresh = Callable[[int, int], Tensor]  # (how many, instead of which image) -> candidate images (n, C, H, W)


@torch.no_grad()
def similarity(net: Flat, thetas: Sequence[Tensor], images: Tensor) -> Tensor:
    """Cosines `(n, n)` of the L2-normalised penultimate features of several experts, concatenated; -1 on the diagonal."""
    phi = torch.cat([F.normalize(net.features(theta, images), dim=1) for theta in thetas], 1) / len(thetas) ** 0.5
    return (phi @ phi.T).fill_diagonal_(-1.0)


def overlap_limit(net: Flat, thetas: Sequence[Tensor], images: Tensor) -> float:
    """The 95th percentile, over real images of one class, of the similarity to the nearest other (2.0: nothing to compare)."""
    if len(images) < 3:
        return 2.0
    return float(similarity(net, thetas, images).amax(1).quantile(0.95))


def mitigate(
    net: Flat,
    thetas: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    strength: Tensor,
    limit: Sequence[float],
    fresh: Fresh,
) -> list[tuple[int, Tensor]]:
    """New images for those that overlap too much: a list of (position, image `(C, H, W)`).

    From the worst pair of a class, while it is above the class's limit, the image with the smaller recent gradient
    (`strength (m,)`) is replaced by the candidate that is least like the kept images; at most half of a class.
    """
    replaced: list[tuple[int, Tensor]] = []
    for c in labels.unique().tolist():
        members = torch.nonzero(labels == c).flatten()
        kept = images[members].clone()
        for _ in range(len(members) // 2):
            s = similarity(net, thetas, kept)
            if s.max() <= limit[c]:
                break
            i, j = divmod(int(s.argmax()), len(members))
            worse = i if strength[members[i]] <= strength[members[j]] else j
            others = torch.cat([kept[:worse], kept[worse + 1 :]])
            candidates = fresh(8, int(members[worse]))
            nearest = similarity(net, thetas, torch.cat([candidates, others]))[:8, 8:].amax(1)
            kept[worse] = candidates[int(nearest.argmin())]
            replaced = [r for r in replaced if r[0] != int(members[worse])]
            replaced.append((int(members[worse]), kept[worse]))
    return replaced
