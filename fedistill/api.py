"""Distillation without a federation: one site, from Python or from the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split, of_task
from fedistill.data.public import known_modality
from fedistill.data.sources import resized
from fedistill.errors import FedistillError
from fedistill.privacy.ledger import Cap
from fedistill.site.describe import task_of
from fedistill.site.feasible import check_budget, check_settings
from fedistill.site.folder import sites_with_ledgers
from fedistill.site.job import Progress, advance, released_set
from fedistill.synthetic.set import SyntheticSet

# Settings about where images come from, about other sites, and about what is done with a set: `distill` has no use for them.
_ELSEWHERE = {"data", "partition", "sites", "alpha", "quorum", "deadline", "out"}
_ELSEWHERE |= {
    f.name for f in fields(Config) if f.metadata["scope"] in ("eval", "merge") or f.name.startswith("phantom_")
}


def distill(
    images: Tensor,
    labels: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    modality: str = "generic",
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> SyntheticSet:
    """Distil labelled images into a few synthetic ones.

    images: `(n, C, H, W)`, `(n, H, W)` or volumes `(n, C, D, H, W)`, uint8, or floating point in 0..1.
    labels: `(n,)` whole numbers from 0, or `(n, K)` of 0 and 1 where an image may have several of K findings.
    settings: any configuration key, for example `ipc=10, method="datm", preset="quick", seed=0`; `task="ordinal"` says that
        the labels are grades; `image_size=64` makes the images smaller; `privacy="dp", epsilon=3.0, work="work/"` makes it
        private, with the ledger in `work`. Not those of a federation, of data on disk or of evaluation.
    Returns a `torch.utils.data.Dataset` of (normalised image, label `(K,)`). Raises `FedistillError` on bad input.

        synthetic = fedistill.distill(images, labels, ipc=10, preset="quick")
        loader = torch.utils.data.DataLoader(synthetic, batch_size=32, shuffle=True)
    """
    config = make_config(settings)
    for name in sorted(_ELSEWHERE):
        if getattr(config, name) != getattr(Config(), name):
            raise FedistillError(
                "no-use",
                f"{name}={getattr(config, name)} means nothing to fedistill.distill, which makes one set of the images that it is "
                "given: leave it out.",
            )
    config = config.resolved()
    data = of_task(from_tensors(images, labels, class_names=class_names, modality=modality), config.task)
    data = resized(data, config.image_size)
    check_ledger_stays(config)
    with tempfile.TemporaryDirectory(prefix="fedistill-") as temporary:
        return distill_site(config, data, "site", Path(config.work or temporary).expanduser(), on_progress=on_progress)


def check_ledger_stays(config: Config) -> None:
    """Raise `FedistillError` where private work would leave no lasting record of what it spent."""
    if config.privacy == "dp" and not config.work:
        raise FedistillError(
            "no-work",
            "privacy=dp keeps a ledger of what was ever spent on these data: say where with --work, and keep it.",
        )


def check_one_ledger(work: Path, site: str) -> None:
    """Raise `FedistillError` where `work` holds a ledger of another name: a cap would not count what is on it."""
    others = [name for name in sites_with_ledgers(work) if name != site]
    if others:
        raise FedistillError(
            "other-ledger",
            f"{work} holds the ledger of {', '.join(others)}, and these data are called {site}: a lifetime cap would not count "
            "what was spent there. Keep the name of the data's file, or give data of other people a --work of their own.",
        )


def distill_site(
    config: Config,
    data: Dataset,
    site: str,
    work: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cap: Cap | None = None,
) -> SyntheticSet:
    """Run one site's job to its end, slice by slice; `work` makes it resumable. cap: the most that may ever be spent.

    Raises `FedistillError` on settings that need a federation, or that cannot work on these data.
    """
    if config.rounds > 1 or config.seeds > 1:
        raise FedistillError(
            "one-site", "rounds and seeds belong to a federation: use `fedistill simulate`, or leave them at 1."
        )
    check_settings(config, task_of(data))
    check_budget(config, data)
    if cap is not None and config.privacy != "dp":
        raise FedistillError("privacy-off", "A lifetime cap means nothing without privacy=dp: add --privacy dp.")
    if cap is not None:
        check_one_ledger(work, site)
    while True:
        progress = advance(config, data, site, work, seconds=config.slice_seconds, cap=cap)
        if on_progress:
            on_progress(progress)
        if progress.done:
            return released_set(config, data, site, work)


def from_tensors(images: Tensor, labels: Tensor, *, class_names: Sequence[str] | None, modality: str) -> Dataset:
    """Tensors as a data set without validation and test.

    Raises `FedistillError` on shapes, values, labels, names or a modality that make no sense.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise FedistillError(
            "no-tensors", "images and labels must be torch tensors: use torch.from_numpy for numpy arrays."
        )
    if not isinstance(modality, str):
        raise FedistillError("unknown-modality", f"modality={modality!r} is not text: leave it out, or name one.")
    known_modality(modality)
    if class_names is not None:
        words = () if isinstance(class_names, str) else tuple(class_names)
        if not words or not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
            raise FedistillError(
                "bad-names",
                f"class_names={class_names!r}: it must be a list of different texts, one per class or finding.",
            )
    if images.ndim == 3:
        images = images[:, None]
    square = images.ndim in (4, 5) and images.shape[-1] == images.shape[-2]
    if not square or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise FedistillError(
            "bad-images",
            f"images has shape {tuple(images.shape)}: it must be (n, S, S), (n, 1 or 3, S, S) or (n, 1 or 3, D, S, S), "
            "square and n > 0.",
        )
    several = labels.ndim == 2 and labels.shape[1] > 1
    if (
        labels.ndim == 0
        or len(labels) != len(images)
        or labels.is_floating_point()
        or (labels.ndim != 1 and not several)
    ):
        raise FedistillError(
            "bad-labels",
            f"labels has shape {tuple(labels.shape)}: it must hold {len(images)} whole numbers, or 0 or 1 for each of "
            "several findings.",
        )
    if images.is_floating_point():
        if not torch.isfinite(images).all() or images.min() < 0 or images.max() > 1:
            raise FedistillError("bad-images", "images holds NaN or values outside 0..1: scale it to 0..1 first.")
        images = (images * 255).round().to(torch.uint8)
    elif images.dtype != torch.uint8:
        raise FedistillError("bad-images", f"images is {images.dtype}: it must be uint8, or floating point in 0..1.")
    labels = labels.to(torch.int64)
    train = Split(images.cpu(), labels.cpu(), torch.zeros(len(labels), dtype=torch.int64))
    nothing = train.take(torch.empty(0, dtype=torch.int64))
    names, kind = (_findings if several else _classes)(train, class_names)
    return Dataset("tensors", modality, names, ("site",), train, nothing, nothing, kind)


def _findings(train: Split, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Names of the findings, and the kind of task."""
    findings = train.labels.shape[1]
    names = tuple(class_names) if class_names is not None else tuple(f"finding {c}" for c in range(findings))
    if len(names) != findings or train.labels.min() < 0 or train.labels.max() > 1:
        raise FedistillError(
            "bad-labels", f"labels must hold 0 or 1 for each of {len(names)} findings, one column per finding."
        )
    if 0 in train.counts(findings):
        raise FedistillError("absent-class", f"No image shows '{names[train.counts(findings).index(0)]}': take it out.")
    return names, "multilabel"


def _classes(train: Split, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """Names of the classes, and the kind of task."""
    labels = train.labels
    classes = len(class_names) if class_names is not None else int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= classes:
        raise FedistillError(
            "bad-labels", f"labels run from {int(labels.min())} to {int(labels.max())}: valid are 0 to {classes - 1}."
        )
    counts = torch.bincount(labels, minlength=classes)
    if (counts > 0).sum() < 2:
        raise FedistillError("one-class", "All labels are the same: there is nothing to tell apart.")
    if (counts == 0).any():
        raise FedistillError(
            "absent-class", f"No image has label {int(counts.argmin())}: number the classes without gaps."
        )
    return tuple(class_names) if class_names is not None else tuple(f"class {c}" for c in range(classes)), "multiclass"
