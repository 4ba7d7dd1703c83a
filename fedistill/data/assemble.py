"""From labelled images, whatever their source, to a checked `Dataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedistill.data.dataset import Dataset, Split
from fedistill.errors import FedistillError

SPLITS = ("train", "val", "test")
_SHARES = {"train": 7, "val": 1, "test": 2}
# The split of a data set is part of the data set: it must not move with the seed of a run.
_SPLIT_SEED = 70_10_20


@dataclass(frozen=True)
class Part:
    """One split as arrays: images `(n, H, W, C)` or `(n, D, H, W, C)` uint8, labels `(n,)` or 0 and 1 `(n, K)`, sites `(n,)`.

    together: images that share a number `(n,)` are never put in different splits. patient: the patient of each image as a
    number `(n,)`, where all are known; stands in for `together`. row: as in `Split`.
    """

    images: np.ndarray
    labels: np.ndarray
    site: np.ndarray
    together: np.ndarray | None = None
    patient: np.ndarray | None = None
    row: np.ndarray | None = None

    @property
    def groups(self) -> np.ndarray:
        """`(n,)`: the class, or the first finding, K where there is none."""
        if self.labels.ndim == 1:
            return self.labels
        return np.where(self.labels.any(1), self.labels.argmax(1), self.labels.shape[1])

    def counts(self, classes: int) -> np.ndarray:
        """Images of each class, or with each finding, `(K,)`."""
        return np.bincount(self.labels, minlength=classes) if self.labels.ndim == 1 else self.labels.sum(0)

    def take(self, index: np.ndarray) -> Part:
        """The images at `index`, in that order."""
        together, patient, row = (None if a is None else a[index] for a in (self.together, self.patient, self.row))
        return Part(self.images[index], self.labels[index], self.site[index], together, patient, row)


def assemble(
    name: str,
    modality: str,
    class_names: Sequence[str],
    site_names: Sequence[str],
    parts: Mapping[str, Part],
    kind: str = "multiclass",
) -> Dataset:
    """A checked data set. Splits that are missing are cut out of train, stratified by class.

    `parts` holds train and, optionally, val and test. Raises `FedistillError` when there are fewer than two images, or too few
    to cut the missing splits from. Whether every class has images is asked by `check_classes`.
    """
    total = sum(len(part.labels) for part in parts.values())
    if total < 2:
        raise FedistillError("too-few-images", f"{name} holds {total} image(s): at least two are needed.")
    for key, part in parts.items():
        if len(part.labels) == 0:
            what = f"The {key} split of {name} is empty: add images, or leave it out to have it cut from train."
            raise FedistillError("too-few-images", what)
    full = fill_splits(name, parts)
    train, val, test = (_tensors(full[key]) for key in SPLITS)
    return Dataset(name, modality, tuple(map(str, class_names)), tuple(map(str, site_names)), train, val, test, kind)


def check_classes(data: Dataset) -> None:
    """Raises `FedistillError` on fewer than two classes, and on a class without a training image."""
    held = [sum(counts) for counts in zip(*(s.counts(data.classes) for s in data.splits.values()), strict=True)]
    if data.kind != "multilabel" and sum(n > 0 for n in held) < 2:
        only = data.class_names[held.index(max(held))]
        raise FedistillError(
            "one-class", f"All images of {data.name} have the class '{only}': at least two classes are needed."
        )
    counts = data.train.counts(data.classes)
    if 0 in counts:
        raise FedistillError(
            "class-without-images",
            f"{data.name} has no training image of the class '{data.class_names[counts.index(0)]}': "
            "add some, or take the class out.",
        )


def fill_splits(name: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Train, val and test, the missing ones cut out of train so that all three stand as 70 : 10 : 20."""
    missing = [key for key in SPLITS if key not in parts]
    if not missing:
        return dict(parts)
    train = replace(parts["train"], row=np.arange(len(parts["train"].labels)))
    index = _cut(train, {key: _SHARES[key] for key in ("train", *missing)})
    for key, chosen in index.items():
        if len(chosen) == 0:
            raise FedistillError(
                "too-few-images",
                f"{name} has {len(train.labels)} training images, too few to set some aside for {key}: "
                f"add images or give the splits yourself.",
            )
    return {**parts, **{key: train.take(chosen) for key, chosen in index.items()}}


def _cut(part: Part, shares: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Positions of each new split: whole patients, class by class, each to the split that lacks most."""
    n = len(part.labels)
    known = (numbers for numbers in (part.together, part.patient) if numbers is not None)
    patient = next(known, np.arange(n))
    order = np.random.default_rng(_SPLIT_SEED).permutation(n)
    groups: dict[int, list[int]] = {}
    for i in order.tolist():
        groups.setdefault(int(patient[i]), []).append(i)
    label = part.groups
    by_class: list[list[list[int]]] = [[] for _ in range(int(label.max()) + 1)]
    for members in groups.values():
        by_class[int(np.bincount(label[members]).argmax())].append(members)

    whole = sum(shares.values())
    ties = [key for key in ("test", "val", "train") if key in shares]  # the larger lack wins, then this order
    chosen: dict[str, list[int]] = {key: [] for key in shares}
    for stack in by_class:
        stack.sort(key=len, reverse=True)  # stable: equal sizes keep their random order
        size = sum(map(len, stack))
        lack = {key: shares[key] * size for key in ties}
        for place, members in enumerate(stack):
            # The first patient of a class always trains: without one the class cannot be learned.
            key = "train" if place == 0 else max(ties, key=lambda k: lack[k])
            lack[key] -= whole * len(members)
            chosen[key].extend(members)
    return {key: np.sort(np.array(index, dtype=np.int64)) for key, index in chosen.items()}


def _tensors(part: Part) -> Split:
    images = torch.from_numpy(np.ascontiguousarray(part.images)).movedim(-1, 1).contiguous()
    labels = torch.from_numpy(part.labels.astype(np.int64))
    site = torch.from_numpy(part.site.astype(np.int64))
    patient, row = (None if a is None else torch.from_numpy(a.astype(np.int64)) for a in (part.patient, part.row))
    return Split(images, labels, site, patient, row)
