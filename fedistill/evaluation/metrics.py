"""What a set of predictions is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

POINTS = 0.02  # scores closer than this are the same to a user
NAMES = ("accuracy", "balanced_accuracy", "macro_f1", "auc")


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts `(K, K)` int64: rows are true classes, columns predicted ones. Confusions of several sites add up."""
    return torch.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def from_confusion(counts: Tensor) -> dict[str, Any]:
    """Accuracy, balanced accuracy (over the classes that occur), macro-F1 (likewise) and recall per class (None: absent)."""
    counts = counts.double()
    diagonal, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    there = truth > 0
    if not there.any():
        return {"accuracy": None, "balanced_accuracy": None, "macro_f1": None, "per_class_recall": [None] * len(counts)}
    recall = diagonal / truth.clamp_min(1)
    f1 = 2 * diagonal / (truth + predicted).clamp_min(1)
    return {
        "accuracy": float(diagonal.sum() / truth.sum()),
        "balanced_accuracy": float(recall[there].mean()),
        "macro_f1": float(f1[there].mean()),
        "per_class_recall": [float(r) if t else None for r, t in zip(recall, there, strict=True)],
    }


def score(probabilities: Tensor, truth: Tensor) -> dict[str, Any]:
    """All metrics of `probabilities (n, K)` against `truth (n,)`. AUC: mean one-against-rest over the classes that occur."""
    classes = probabilities.shape[1]
    result = from_confusion(confusion(truth, probabilities.argmax(1), classes))
    y, p = truth.numpy(), probabilities.double().numpy()
    columns = [1] if classes == 2 else range(classes)
    aucs = [roc_auc_score(y == c, p[:, c]) for c in columns if 0 < (y == c).sum() < len(y)]
    return result | {"auc": float(np.mean(aucs)) if aucs else None}


def mean_std(values: list[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation (None for one value) of the values that exist."""
    there = [v for v in values if v is not None]
    if not there:
        return {"mean": None, "std": None}
    return {"mean": float(np.mean(there)), "std": float(np.std(there, ddof=1)) if len(there) > 1 else None}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `n >= 2` repetitions."""

    mean: float
    std: float
    n: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(self.n)


def spread_of(values: list[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)), len(values))


def noise(one: Spread, other: Spread) -> float:
    """A difference of two means up to this is none: two points, or its standard error if that is larger."""
    return max(POINTS, math.hypot(one.error, other.error))
