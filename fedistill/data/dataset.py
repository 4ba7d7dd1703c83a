"""Labelled images in memory, as every source delivers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedistill.errors import FedistillError
from fedistill.models.loss import groups_of


@dataclass(frozen=True)
class Split:
    """Images `(n, C, H, W)` or volumes `(n, C, D, H, W)` uint8, labels int64, and the site of each image `(n,)` int64.

    labels: a class or grade `(n,)`, or 0 and 1 per finding `(n, K)` where an image may have several.
    patient: where every image's patient is known, a number per patient `(n,)` int64, the same at all sites. It stands for a
        patient within this split alone, and never leaves the site.
    row: where this split was cut out of the source's training images, the position of each image `(n,)` among all of those.
    """

    images: Tensor
    labels: Tensor
    site: Tensor
    patient: Tensor | None = None
    row: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Split:
        """The images at `index` `(k,)` int64, in that order."""
        patient, row = (None if known is None else known[index] for known in (self.patient, self.row))
        return Split(self.images[index], self.labels[index], self.site[index], patient, row)

    def counts(self, classes: int) -> list[int]:
        """Images of each class, or with each finding."""
        if self.labels.dim() == 2:
            return self.labels.sum(0).tolist()
        return torch.bincount(self.labels, minlength=classes).tolist()

    @property
    def groups(self) -> Tensor:
        """One class per image `(n,)`, where only one can be used: of several findings the first, K where there is none."""
        return groups_of(self.labels, "multilabel") if self.labels.dim() == 2 else self.labels


def combined(fingerprints: Iterable[str]) -> str:
    """One fingerprint for the data of several sites, whatever their order."""
    return hashlib.sha256("".join(sorted(fingerprints)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    """Three splits of one task. `modality` selects the public normalisation and the augmentations that are safe.

    kind: what is asked of an image, one of `models.loss.KINDS`.
    """

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
    def geometry(self) -> tuple[int, ...]:
        """(channels, height, width), or (channels, depth, height, width) of volumes."""
        return tuple(self.train.images.shape[1:])

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @cached_property
    def fingerprint(self) -> str:
        """A hash over every pixel and label: the same images in the same order, of one modality and task, give the same word."""
        about = (self.class_names, self.geometry, self.modality, self.kind)
        digest = hashlib.sha256(repr(about).encode())
        for split in self.splits.values():
            for tensor in (split.images, split.labels):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def fingerprint_by(self, unit: str) -> str:
        """`fingerprint`, and for unit "patient" a hash that also knows whose image each one is: what was done for other
        patients is not what these are promised."""
        if unit != "patient":
            return self.fingerprint
        digest = hashlib.sha256(self.fingerprint.encode())
        for split in self.splits.values():
            digest.update(b"" if split.patient is None else split.patient.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def at(self, index: dict[str, Tensor], name: str) -> Dataset:
        """What one site holds: `index` maps train, val and test to positions in this data set."""
        train, val, test = (split.take(index[key]) for key, split in self.splits.items())
        return replace(self, name=name, train=train, val=val, test=test)


def of_task(data: Dataset, task: str) -> Dataset:
    """`data` as the kind of task that the setting `task` names. Raises `FedistillError` where its labels do not fit."""
    if task in ("auto", data.kind):
        return data
    if data.kind == "multilabel":
        raise FedistillError(
            "task-unfit",
            f"task={task} needs one label per image, but {data.name} has several findings: use multilabel.",
        )
    if task == "multilabel":
        raise FedistillError(
            "task-unfit",
            f"task=multilabel needs 0 or 1 for every finding of an image, but {data.name} has one label per image.",
        )
    return replace(data, kind=task)
