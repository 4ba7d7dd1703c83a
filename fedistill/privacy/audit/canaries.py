"""Canaries: images whose presence in the training data is decided by a fair and secret coin, and which are easy to notice.

A canary has a wrong label (Zhao and Zhang, ICLR 2025, arXiv 2502.12976): nothing but the canary itself teaches that label
for that image. One whose coin says "out" is absent, so that two neighbouring data sets differ by one record added or removed,
as the accountants have it.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedistill.data.dataset import Dataset, Split
from fedistill.data.phantoms import phantom_images
from fedistill.errors import FedistillError
from fedistill.files import read_json, write_bytes
from fedistill.seeding import generator

SOURCES = ("own", "phantom")
FEWEST = 8
LARGEST_SHARE = 4  # of this many training images at most one becomes a canary: a rehearsal must resemble the real work


@dataclass(frozen=True)
class Canaries:
    """`m` images with wrong labels, and the positions `(k,)` of the training images whose places they take."""

    images: Split
    taken: Tensor

    def __len__(self) -> int:
        return len(self.images)


def choose(data: Dataset, m: int, source: str, seed: int) -> Canaries:
    """Which images are the canaries; the same seed chooses the same ones (only the coins are secret).

    source: "own" takes training images, which every rehearsal then lacks under their true label; "phantom" draws public ones
    and takes no patient's place, each as a patient of its own. Raises `FedistillError` where there are too
    few images, or for phantoms of volumes.
    """
    if m < FEWEST:
        raise FedistillError(
            "few-canaries", f"canaries={m} is too few to show anything: use {FEWEST} or more (64 is usual)."
        )
    if m > len(data.train) // LARGEST_SHARE:
        raise FedistillError(
            "many-canaries",
            f"canaries={m} is too many for {len(data.train)} training images: use {len(data.train) // LARGEST_SHARE} or fewer.",
        )
    rng = generator(seed, "audit", "canaries")
    if source == "own":
        taken = _spare(data.train, rng)[:m]
        chosen = data.train.take(taken)
    elif source == "phantom":
        if len(data.geometry) != 3:
            raise FedistillError("no-phantoms", "There are no phantom canaries for volumes: take them from the data.")
        pixels, _ = phantom_images(m, data.geometry[0], data.geometry[1], rng, 4)
        like = torch.randint(len(data.train), (m,), generator=rng)
        images = pixels.mul(255).round().to(torch.uint8)
        taken = torch.empty(0, dtype=torch.int64)
        patient = None if data.train.patient is None else data.train.patient.max() + 1 + torch.arange(m)
        chosen = Split(images, data.train.labels[like], data.train.site[like], patient)
    else:
        raise FedistillError("bad-value", f"Canaries come from 'own' images or 'phantom' ones, not from '{source}'.")
    return Canaries(replace(chosen, labels=_wrong(chosen.labels, data.classes, rng)), taken)


def with_canaries(data: Dataset, canaries: Canaries, inside: Tensor) -> Dataset:
    """The data set of a rehearsal: without the images that canaries replace, with the canaries of which `inside (m,)` is true."""
    kept = torch.ones(len(data.train), dtype=torch.bool)
    kept[canaries.taken] = False
    real, added = data.train.take(kept.nonzero().flatten()), canaries.images.take(inside.nonzero().flatten())
    train = Split(
        torch.cat([real.images, added.images]),
        torch.cat([real.labels, added.labels]),
        torch.cat([real.site, added.site]),
        None if real.patient is None or added.patient is None else torch.cat([real.patient, added.patient]),
    )
    return replace(data, train=train)


def toss(file: Path, m: int) -> Tensor:
    """`(m,)` bool from the system's entropy; kept in `file`, which only its owner can read, so that a killed audit goes on."""
    if not file.exists():
        write_secret(file, str([secrets.randbits(1) for _ in range(m)]) + "\n")
    coins = torch.tensor(read_json(file), dtype=torch.bool)
    if len(coins) != m:
        raise FedistillError("other-canaries", f"{file} is of an audit with {len(coins)} canaries: remove its folder.")
    return coins


def write_secret(file: Path, text: str) -> None:
    """As `files.write_bytes`, for the eyes of the owner only (permissions 0600), from the first byte on."""
    before = os.umask(0o077)
    try:
        write_bytes(file, text.encode())
    finally:
        os.umask(before)


def _spare(train: Split, rng: torch.Generator) -> Tensor:
    """Positions of the training images in random order, but for the first one of each group: no class may vanish."""
    order = torch.randperm(len(train), generator=rng)
    groups = train.groups[order]
    first = torch.tensor([int((groups == g).nonzero()[0]) for g in groups.unique()])
    spare = torch.ones(len(order), dtype=torch.bool)
    spare[first] = False
    return order[spare]


def _wrong(labels: Tensor, classes: int, rng: torch.Generator) -> Tensor:
    """Another class or grade, at random `(n,)`; of several findings `(n, K)` the opposite of each."""
    if labels.dim() == 2:
        return 1 - labels
    return (labels + torch.randint(1, classes, labels.shape, generator=rng)) % classes
