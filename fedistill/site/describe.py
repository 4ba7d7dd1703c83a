"""What a site tells the server before work starts."""

from __future__ import annotations

from typing import Any

from fedistill.data.dataset import Dataset
from fedistill.experts.train import Task


def task_of(data: Dataset) -> Task:
    return Task(data.geometry, data.class_names, data.modality, data.kind)


def describe(data: Dataset, site: str) -> dict[str, Any]:
    """Public facts about the task, and the site's training images, in all and per class.

    Counts leave the site: a policy may forbid it.
    """
    return {
        "site": site,
        "class_names": list(data.class_names),
        "train": len(data.train),
        "counts": data.train.counts(data.classes),
        "geometry": list(data.geometry),
        "modality": data.modality,
        "kind": data.kind,
        "fingerprint": data.fingerprint,
    }
