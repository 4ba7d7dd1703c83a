"""Does a set hold copies of training images? Distances to the nearest real image, against those to images it never saw.

A red flag where it does; no guarantee where it does not: distances of this kind have given false comfort before (Ganev and
De Cristofaro, arXiv 2312.05114). What is computed here is about patients and stays at the site unless the site decides otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.experts.train import Task
from fedistill.privacy.audit.rates import share
from fedistill.seeding import generator
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import contact_sheet

SAME = 1.5 / 255  # largest pixel difference of an exact copy: a released pixel is rounded to one of 256 values
PAIRS = 10  # in the picture
FEWEST = 8  # images that the set never saw, without which nothing can be compared
PICTURE = "copies.png"
PICTURE_NOTE = f"{PICTURE} shows patients' images beside the synthetic ones: it must not leave the site."
_CHUNK = 32  # synthetic images at a time: bounds the memory


def copies(
    config: Config, task: Task, made: SyntheticSet, train: Split, unseen: Split, *, folder: Path | None
) -> dict[str, Any]:
    """Copy metrics of `made` against its training images `train` and real images `unseen` of the same source.

    Per metric (pixel: root mean square difference on a 0..1 scale; ssim: 1 - SSIM; feature: distance in a network with public
    random parameters), against training and unseen images, equally many of each class: `closer_to_training` is the share of
    synthetic images that are nearer to a training image (ties do not count), and `neighbours` the share of training images
    among the distinct real images that are nearest to some synthetic one, with its 95 % interval. One half is expected of
    both. The interval is of the neighbours since synthetic images are not independent: one smooth real image can be nearest to
    all of them, whichever side it is on. `exact` counts synthetic images over all training images.
    folder: where the picture of the closest pairs goes, for its owner only.
    """
    real, pixels = train.images.float() / 255, made.pixels
    gap = torch.cat([torch.cdist(x, real.flatten(1), p=torch.inf) for x in pixels.flatten(1).split(_CHUNK)])
    found: dict[str, Any] = {
        "images": len(made),
        "exact": int((gap.amin(1) <= SAME).sum()),
        "compared": 0,
        "picture": None,
    }
    if folder is not None:
        found["picture"] = PICTURE
        _draw_pairs(pixels, real, folder / PICTURE)
    seen_part, unseen_part = _equally_many(train, unseen, generator(config.seed, "audit", "copies"))
    found["compared"] = len(seen_part)
    found["red_flag"] = found["exact"] > 0
    if len(seen_part) < FEWEST:
        return found
    for name, measure in (("pixel", rmse), ("ssim", dissimilarity), ("feature", _features_of(config, task))):
        near, far = (_nearest(measure, pixels, part.images.float() / 255) for part in (seen_part, unseen_part))
        found[name] = _compared(near, far)
        found["red_flag"] |= found[name]["neighbours"]["low"] > 0.5
    return found


def rmse(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square differences `(m, n)` of images `(m, C, ..., H, W)` and `(n, C, ..., H, W)`."""
    return torch.cdist(x.flatten(1), y.flatten(1), compute_mode="donot_use_mm_for_euclid_dist") / x[0].numel() ** 0.5


def dissimilarity(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM `(m, n)` of images on a 0..1 scale (Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 2004, eq. 13).

        SSIM = (2 mu_x mu_y + c1) (2 s_xy + c2) / ((mu_x^2 + mu_y^2 + c1) (s_x^2 + s_y^2 + c2)),   c1 = 0.01^2, c2 = 0.03^2

    Moments under a Gaussian window of 11 pixels and deviation 1.5 (the largest odd window where images are smaller), averaged
    over its positions inside the image, over channels and over slices.
    """
    c1, c2 = 0.01**2, 0.03**2
    x, y = x.flatten(1, -3), y.flatten(1, -3)  # slices as channels
    mu_x, mu_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mu_x.square(), _blurred(y * y) - mu_y.square()
    rows = []
    for i in range(len(x)):
        covariance = _blurred(x[i] * y) - mu_x[i] * mu_y
        above = (2 * mu_x[i] * mu_y + c1) * (2 * covariance + c2)
        below = (mu_x[i].square() + mu_y.square() + c1) * (var_x[i] + var_y + c2)
        rows.append(1 - (above / below).flatten(1).mean(1))
    return torch.stack(rows)


def _blurred(images: Tensor) -> Tensor:
    """Gaussian means `(n, C, H', W')` at the positions of the window inside the image."""
    n, channels, height, width = images.shape
    size = min(11, (min(height, width) - 1) // 2 * 2 + 1)
    line = torch.exp(-(torch.arange(size) - size // 2).square() / (2 * 1.5**2))
    line = (line / line.sum()).to(images)
    flat = images.reshape(n * channels, 1, height, width)
    out = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    return out.view(n, channels, *out.shape[2:])


def _features_of(config: Config, task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Distances of normalised features in a ConvNet with random parameters that everybody can draw."""
    net = task.network("convnet", config)
    theta = net.initial(generator(0, "audit", "features")).to(net.device)

    @torch.no_grad()
    def distances(x: Tensor, y: Tensor) -> Tensor:
        f, g = (
            torch.cat([net.features(theta, (part - 0.5).to(net.device)).cpu() for part in images.split(256)])
            for images in (x, y)
        )
        return torch.cdist(F.normalize(f, dim=1), F.normalize(g, dim=1), compute_mode="donot_use_mm_for_euclid_dist")

    return distances


def _compared(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What is said of one metric. near, far: distances to the nearest training and unseen images `(m,)`, and their positions."""
    closer, farther = near[0] < far[0], near[0] > far[0]
    trained, others = (len(part[1][won].unique()) for part, won in ((near, closer), (far, farther)))
    apart = int(closer.sum() + farther.sum())
    return {
        "closer_to_training": int(closer.sum()) / apart if apart else None,
        "neighbours": {"distinct": trained + others} | share(trained, trained + others),
        "median_to_training": float(near[0].median()),
        "median_to_unseen": float(far[0].median()),
    }


def _nearest(measure: Callable[[Tensor, Tensor], Tensor], made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    found = [measure(x, real).min(1) for x in made.split(_CHUNK)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _equally_many(train: Split, unseen: Split, rng: torch.Generator) -> tuple[Split, Split]:
    """As many images of each class from both, as many as the scarcer has: else the nearer side is the larger one."""
    ours, theirs = [], []
    for g in train.groups.unique():
        a, b = ((part.groups == g).nonzero().flatten() for part in (train, unseen))
        a, b = (i[torch.randperm(len(i), generator=rng)] for i in (a, b))
        k = min(len(a), len(b))
        ours.append(a[:k])
        theirs.append(b[:k])
    return train.take(torch.cat(ours)), unseen.take(torch.cat(theirs))


def _draw_pairs(made: Tensor, real: Tensor, file: Path) -> None:
    """The closest pairs, a synthetic image above its nearest training image, in a file that only its owner can read."""
    distance = torch.cat([rmse(x, real) for x in made.split(_CHUNK)])
    closest = distance.amin(1).argsort(stable=True)[:PAIRS]
    both = torch.cat([made[closest], real[distance[closest].argmin(1)]])
    sheet = contact_sheet(both, torch.arange(2).repeat_interleave(len(closest)), ("synthetic", "nearest real"), 3)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(mode=0o600)
    os.chmod(file, 0o600)
    sheet.save(file)
