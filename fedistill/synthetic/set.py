"""The synthetic set: what a site releases and the server merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from fedistill.models.enlarge import reduce
from fedistill.models.loss import groups_of


@dataclass(frozen=True)
class SyntheticSet(TorchDataset[tuple[Tensor, Tensor]]):
    """`m` synthetic images of one task, from one site or from several.

    images: `(m, C, H, W)` or volumes `(m, C, D, H, W)` float32, normalised with the public constants `mean` and `std`
        (pixel = image * std + mean, with pixels in 0..1; values outside are allowed, since a distilled image is not a photograph).
    labels: `(m, K)` float32, a distribution per image (one-hot where labels are hard); for multilabel a probability per
        finding (0 or 1 where labels are hard).
    site: `(m,)` int64, the position in `sites` of the site that made the image.
    step_size: the learned step size of each site, in the order of `sites`.
    manifest: method, configuration hash, versions and privacy statement of each site (JSON-compatible).
    kind: of the task, one of `models.loss.KINDS`.
    scale: the images are `models.enlarge.enlarge` of images with this part of their side, which are what is stored and sent.
    """

    images: Tensor
    labels: Tensor
    site: Tensor
    sites: tuple[str, ...]
    class_names: tuple[str, ...]
    mean: float
    std: float
    modality: str
    step_size: tuple[float, ...]
    manifest: dict[str, Any]
    kind: str = "multiclass"
    scale: int = 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(image `(C, H, W)`, its label `(K,)`)."""
        return self.images[index], self.labels[index]

    @property
    def hard_labels(self) -> Tensor:
        """`(m,)` int64: the most likely class, or finding, of each image."""
        return self.labels.argmax(1)

    @property
    def groups(self) -> Tensor:
        """`(m,)` int64: as `hard_labels`, but K for an image without any finding."""
        return groups_of(self.labels, self.kind)

    @property
    def geometry(self) -> tuple[int, ...]:
        """(channels, height, width), or (channels, depth, height, width) of volumes."""
        return tuple(self.images.shape[1:])

    @property
    def stored(self) -> Tensor:
        """The images `(m, C, h, w)` as small as they are stored and sent."""
        return reduce(self.images, self.scale)

    @property
    def per_place(self) -> int:
        """Images of the set that take the bytes of one of the whole size."""
        return int(self.scale ** len(self.geometry[1:]))

    @property
    def pixels(self) -> Tensor:
        """The images as float32 in 0..1, for people to look at."""
        return (self.images * self.std + self.mean).clamp(0, 1)

    @property
    def in_bytes(self) -> Tensor:
        """The images as uint8; what lies outside of 0..255 under the public normalisation is clipped."""
        return (self.pixels * 255).round().byte()

    @property
    def labels_of_data(self) -> Tensor:
        """Labels in the form that those of a data set have: the most likely class `(m,)`, or 1 for findings of at least one half
        `(m, K)`, int64."""
        return (self.labels >= 0.5).long() if self.kind == "multilabel" else self.hard_labels

    def of_site(self, name: str) -> Tensor:
        """Positions of the images that site `name` made."""
        return torch.nonzero(self.site == self.sites.index(name)).flatten()

    def take(self, pick: Tensor) -> SyntheticSet:
        """The images at `pick`, positions or a mask `(m,)`; the sites stay as they are."""
        return replace(self, images=self.images[pick], labels=self.labels[pick], site=self.site[pick])

    def part_of(self, name: str) -> SyntheticSet:
        """The set of site `name` alone."""
        index, place = self.of_site(name), self.sites.index(name)
        return replace(
            self.take(index),
            site=torch.zeros(len(index), dtype=torch.int64),
            sites=(name,),
            step_size=self.step_size[place : place + 1],
        )


def one_hot(labels: Tensor | Sequence[int], classes: int) -> Tensor:
    """`(m,)` class indices to `(m, K)` float32 distributions."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels, dtype=torch.int64), classes).float()
