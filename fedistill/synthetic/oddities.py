"""What is odd about a site's set beside the sets of the others: figures that need no real image and no training.

Every figure is relative to the other sets, since what a distilled image looks like depends on the method, its settings and
the data. Nothing is learned, so that the figures cost seconds and can be had in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.models.flat import Flat
from fedistill.models.nets import build
from fedistill.seeding import generator
from fedistill.synthetic.set import SyntheticSet

NEAR = 0.25  # images closer than this share of what lies between two images of most sets are copies
SAME = 0.15  # windows, likewise, are the same
GAP = 3.0  # windows up to this many times farther apart are nearly the same
FEW = 3  # images that a patch must be in, besides the one they are compared with: two may agree by chance
FLOOR = 0.25  # of the typical distance: where all sites have black corners, a corner says nothing
WINDOW = 8  # a window's side is this part of an image's, and at least 3 pixels
MOST = 128  # images of a set that all others are compared with
NETWORKS, WIDTH = 8, 32  # public random networks, whose features the agreement is measured in
SHRINK = 0.1  # of a feature's scale towards that of all
TINY = 1e-6


def copies(sets: Sequence[SyntheticSet]) -> list[float]:
    """Of each set the share of images that have a near-copy in it, whatever their labels."""
    typical = _typical(sets)
    return [float(_near(one, typical).any(1).float().mean()) for one in sets]


def triggers(sets: Sequence[SyntheticSet]) -> list[float]:
    """Of each set the largest share of images that have one window and one label in common, above that of any other set.

    Images with the window and another label count against it: what a scanner writes on all images is no trigger. Sets of real
    images, or started from them, have such windows too (a saturated background): they hide a patch.
    """
    typical = _typical(sets)
    place = torch.stack([_spread(one.images) for one in sets]).quantile(0.5, dim=0)
    limit = (SAME * place.clamp_min(FLOOR * typical)) ** 2
    most = [_pasted(one, limit, _near(one, typical)) for one in sets]
    return [max(0.0, m - max(most[:i] + most[i + 1 :], default=m)) for i, m in enumerate(most)]


def excess(own: SyntheticSet, budget: Sequence[int]) -> float:
    """The share of images by which classes are over their budget `(K,)`: soft labels are free to be, as far as `check_set` goes.

    0 where an image may have several findings: there is no budget per class.
    """
    if own.kind == "multilabel":
        return 0.0
    made = torch.bincount(own.hard_labels, minlength=len(budget))
    return float((made - torch.tensor(list(budget))).clamp_min(0).sum() / len(own))


def features(sets: Sequence[SyntheticSet]) -> list[Tensor]:
    """Features `(m, P)` of every set's images: pixels and those of public random networks, standardised set by set.

    Centre and scale are those of the set itself, every class counting the same in the centre, so that another scanner is no
    other class. A set of one class has no such centre, and gets the mean of the others'.
    """
    geometry, classes = sets[0].geometry, len(sets[0].class_names)
    net = Flat(build("convnet", geometry, classes, width=WIDTH, depth=_depth(geometry)))
    thetas = [net.initial(generator(0, "oddities", e)) for e in range(NETWORKS)]
    raw = [_raw(net, thetas, one.images) for one in sets]
    centres = []
    for found, one in zip(raw, sets, strict=True):
        groups = one.groups.unique()
        centres.append(
            torch.stack([found[one.groups == g].mean(0) for g in groups]).mean(0) if len(groups) > 1 else None
        )
    known = [c for c in centres if c is not None]
    common = torch.stack(known).mean(0) if known else torch.cat(raw).mean(0)
    return [
        (found - (common if centre is None else centre)) / (found.std(0, correction=0) + SHRINK * found.std() + TINY)
        for found, centre in zip(raw, centres, strict=True)
    ]


@torch.no_grad()
def _raw(net: Flat, thetas: Sequence[Tensor], images: Tensor) -> Tensor:
    """Pixels without the scanner's brightness and contrast, and the networks' features of them: both count the same."""
    axes = [0, *range(2, images.dim())]
    even = (images - images.mean(axes, keepdim=True)) / (images.std(axes, keepdim=True) + TINY)
    parts = [torch.cat([net.features(theta, even) for theta in thetas], 1), even.flatten(1)]
    return torch.cat([part / (part.std() + TINY) / math.sqrt(part.shape[1]) for part in parts], 1)


def agreement(
    place: int, others: Sequence[int], found: Mapping[int, Tensor], labels: Mapping[int, Tensor]
) -> float | None:
    """How far the labels of set `place` are what sets `others` would have given, in deviations above chance.

    Each image is given the class whose mean feature over `others` is nearest in angle; the recall of its own labels, averaged
    over its classes, is compared with chance. found, labels: `features` and classes `(m,)` by the place of a set.
    None where the others know fewer than two classes, or none of those here.
    """
    known = sorted({int(c) for j in others for c in labels[j].unique()})
    here = [c for c in known if (labels[place] == c).any()]
    if len(known) < 2 or not here:
        return None
    means = torch.stack(
        [
            torch.stack([found[j][labels[j] == c].mean(0) for j in others if (labels[j] == c).any()]).mean(0)
            for c in known
        ]
    )
    said = (F.normalize(found[place], dim=1) @ F.normalize(means, dim=1).T).argmax(1)
    chance = 1 / len(known)
    hits = [(said[labels[place] == c] == known.index(c)).float() for c in here]
    recall = sum(float(h.mean()) for h in hits) / len(hits)
    deviation = math.sqrt(sum(chance * (1 - chance) / len(h) for h in hits)) / len(hits)
    return (recall - chance) / deviation


def _typical(sets: Sequence[SyntheticSet]) -> float:
    """The median distance (root mean square over pixels) between two images of one set, over sets the median again."""
    found = []
    for one in sets:
        flat = one.images.flatten(1)
        pairs = torch.pdist(flat) if len(flat) > 1 else torch.zeros(1)
        found.append(float(pairs.median()) / math.sqrt(flat.shape[1]))
    return float(torch.tensor(found).quantile(0.5))


def _near(own: SyntheticSet, typical: float) -> Tensor:
    """`(m, m)` bool: the pairs of different images that are near-copies."""
    flat = own.images.flatten(1)
    near = torch.cdist(flat, flat) / math.sqrt(flat.shape[1]) < NEAR * typical
    return near.fill_diagonal_(False)


def _windows(squared: Tensor) -> Tensor:
    """Means of `(n, C, [D,] H, W)` over channels and over every window: `(n, windows)`."""
    sides = [min(side, max(3, side // WINDOW)) for side in squared.shape[2:]]
    pool = F.avg_pool3d if squared.dim() == 5 else F.avg_pool2d
    return pool(squared.mean(1, keepdim=True), sides, stride=1).flatten(1)


def _spread(images: Tensor) -> Tensor:
    """The typical distance `(windows,)` of two images in every window: root of twice the variance."""
    return (2 * _windows((images - images.mean(0)).square()).mean(0)).sqrt()


def _pasted(own: SyntheticSet, limit: Tensor, near: Tensor) -> float:
    """The largest share of images that are within `limit (windows,)` of one of them in a window and have its label.

    Less the share that nearly are, since a pasted patch is there or not, while backgrounds shade into each other, and less the
    share with another label. Near-copies `(m, m)` do not count.
    """
    images, groups, best = own.images, own.groups, 0.0
    for i in range(0, len(images), max(1, math.ceil(len(images) / MOST))):
        other = ~near[i]
        other[i] = False
        distance, mine = _windows((images[other] - images[i]).square()), groups[other] == groups[i]
        same, almost = distance < limit, distance < GAP**2 * limit
        count = 2 * same[mine].sum(0) - almost[mine].sum(0) - same[~mine].sum(0)
        if (most := int(count.max())) >= FEW:
            best = max(best, most / len(images))
    return best


def _depth(geometry: tuple[int, ...]) -> int:
    """Blocks of a network whose last features still have a place: 2 pixels at least, 3 blocks at most."""
    return max(1, min(3, int(math.log2(min(geometry[1:]))) - 1))
