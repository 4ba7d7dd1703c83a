"""What a site tells the server before work starts."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any

from fedistill.data.dataset import Dataset
from fedistill.experts.train import Task
from fedistill.files import write_once


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


def describe_privately(data: Dataset, site: str, folder: Path, records: int, unit: str = "image") -> dict[str, Any]:
    """As `describe`, but of the images only what is declared public: how many records there are.

    folder: of the site's work, where the secret lies under which its data have a fingerprint.
    """
    word = keyed_fingerprint(data, folder, unit)
    return describe(data, site) | {"train": records, "counts": None, "fingerprint": word}


def keyed_fingerprint(data: Dataset, folder: Path, unit: str = "image") -> str:
    """A word that changes with the data, and with which nobody can confirm a guess of them: HMAC under the site's secret."""
    secret = write_once(folder / "secret", secrets.token_bytes(32))
    return hmac.new(secret, data.fingerprint_by(unit).encode(), hashlib.sha256).hexdigest()[:32]
