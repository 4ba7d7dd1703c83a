"""Labelled images in memory, as every source delivers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images `(n, C, H, W)` uint8, labels `(n,)` int64, and the site of each image `(n,)` int64."""

    images: Tensor
    labels: Tensor
    site: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Split:
        """The images at `index` `(k,)` int64, in that order."""
        return Split(self.images[index], self.labels[index], self.site[index])

    def counts(self, classes: int) -> list[int]:
        """Images of each class."""
        return torch.bincount(self.labels, minlength=classes).tolist()


def combined(fingerprints: Iterable[str]) -> str:
    """One fingerprint for the data of several sites, whatever their order."""
    return hashlib.sha256("".join(sorted(fingerprints)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    """Three splits of one task. `modality` selects the public normalisation and the augmentations that are safe."""

    name: str
    modality: str
    class_names: tuple[str, ...]
    site_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    kind: str = "multiclass"

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.train.images.shape[1:]
        return int(c), int(h), int(w)

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @cached_property
    def fingerprint(self) -> str:
        """A hash over every pixel and label: the same images in the same order, of the same modality, give the same word."""
        digest = hashlib.sha256(repr((self.class_names, self.geometry, self.modality)).encode())
        for split in self.splits.values():
            for tensor in (split.images, split.labels):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def at(self, index: dict[str, Tensor], name: str) -> Dataset:
        """What one site holds: `index` maps train, val and test to positions in this data set."""
        train, val, test = (split.take(index[key]) for key, split in self.splits.items())
        return replace(self, name=name, train=train, val=val, test=test)
