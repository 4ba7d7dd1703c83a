"""What a set of predictions is worth.

Counts of true against predicted labels add up over sites, so all but the areas under curves can be had without an image:

    multiclass, ordinal   (K, K)      rows are true classes, columns predicted ones
    multilabel            (K, 2, 2)   the same for each finding: absent, present; predicted present from one half on
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

POINTS = 0.02  # scores closer than this are the same to a user
NAMES = {
    "multiclass": ("accuracy", "balanced_accuracy", "macro_f1", "auc"),
    "ordinal": ("accuracy", "balanced_accuracy", "macro_f1", "auc", "qwk", "mae"),
    "multilabel": ("accuracy", "balanced_accuracy", "macro_f1", "auc", "map"),
}
# What a learning rate is chosen by: the first figure, then the others where it is the same, or unknown as in counts.
_MERIT = {
    "multiclass": ("balanced_accuracy", "auc"),
    "ordinal": ("qwk", "auc"),
    "multilabel": ("auc", "map", "balanced_accuracy"),
}


def merit(scores: Mapping[str, Any], kind: str) -> tuple[float, ...]:
    """What to compare two sets of `scores` by: larger is better."""
    return tuple(scores.get(name) or 0.0 for name in _MERIT[kind])


def counts_shape(classes: int, kind: str) -> tuple[int, ...]:
    return (classes, 2, 2) if kind == "multilabel" else (classes, classes)


def counts_of(probabilities: Tensor, truth: Tensor, kind: str, weights: Tensor | None = None) -> Tensor:
    """Counts (see above) of `probabilities (n, K)` against `truth (n,)`, for multilabel `(n, K)`.

    weights `(n,)`: what an image counts, if not 1.
    """
    classes = probabilities.shape[1]
    if kind == "multilabel":
        said = (probabilities >= 0.5).long()
        return torch.stack([confusion(t, p, 2, weights) for t, p in zip(truth.T, said.T, strict=True)])
    return confusion(truth, probabilities.argmax(1), classes, weights)


def images_in(counts: Tensor) -> int:
    """How many images were counted."""
    return int(counts[0].sum() if counts.dim() == 3 else counts.sum())


def confusion(truth: Tensor, predicted: Tensor, classes: int, weights: Tensor | None = None) -> Tensor:
    """Counts `(K, K)`: rows are true classes, columns predicted ones. Confusions of several sites add up.

    int64, or with `weights (n,)` sums of theirs.
    """
    cells = torch.bincount(truth * classes + predicted, weights, minlength=classes * classes)
    return cells.reshape(classes, classes)


def from_counts(counts: Tensor, kind: str) -> dict[str, Any]:
    """Every metric of the kind that counts determine; None where nothing was counted."""
    if kind == "multilabel":
        return _from_findings(counts)
    return from_confusion(counts) | (_from_grades(counts) if kind == "ordinal" else {})


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


def _from_grades(counts: Tensor) -> dict[str, float | None]:
    """Quadratic weighted kappa and mean absolute error, in grades, from counts `(K, K)`.

        kappa = 1 - sum_ij (i - j)^2 O_ij / sum_ij (i - j)^2 E_ij,   E_ij = (row sum i) (column sum j) / n

    (Cohen 1968). None where all images have one grade and are given that grade: there is nothing to agree on.
    """
    observed, grades = counts.double(), torch.arange(len(counts), dtype=torch.float64)
    n = observed.sum()
    if n == 0:
        return {"qwk": None, "mae": None}
    distance = (grades[:, None] - grades).abs()
    by_chance = (distance.square() * observed.sum(1)[:, None] * observed.sum(0)).sum() / n
    kappa = float(1 - (distance.square() * observed).sum() / by_chance) if by_chance > 0 else None
    return {"qwk": kappa, "mae": float((distance * observed).sum() / n)}


def _from_findings(counts: Tensor) -> dict[str, Any]:
    """Means over findings of accuracy, balanced accuracy and F1, from counts `(K, 2, 2)`, and recall per finding.

    Balanced accuracy is over the findings that some images show and some do not, F1 over those that some show.
    """
    each = [from_confusion(table) for table in counts]
    shown = [table[1].sum() > 0 for table in counts.double()]
    both = [bool(s and table[0].sum() > 0) for s, table in zip(shown, counts, strict=True)]
    f1 = [float(2 * t[1, 1] / (t[1].sum() + t[:, 1].sum())) if s else None for s, t in zip(shown, counts, strict=True)]
    return {
        "accuracy": _mean([one["accuracy"] for one in each]),
        "balanced_accuracy": _mean([one["balanced_accuracy"] for one, b in zip(each, both, strict=True) if b]),
        "macro_f1": _mean(f1),
        "per_class_recall": [one["per_class_recall"][1] for one in each],
    }


def score(probabilities: Tensor, truth: Tensor, kind: str = "multiclass") -> dict[str, Any]:
    """All metrics of `probabilities (n, K)` against `truth (n,)`, for multilabel `(n, K)`.

    auc: mean one-against-rest over the classes that occur (findings that some images show and some do not); map: mean
    average precision over the same findings.
    """
    result, p = from_counts(counts_of(probabilities, truth, kind), kind), probabilities.double().numpy()
    classes = p.shape[1]
    y = truth.numpy() if kind == "multilabel" else (truth[:, None] == torch.arange(classes)).numpy()
    columns = [1] if classes == 2 and kind != "multilabel" else range(classes)
    there = [c for c in columns if 0 < y[:, c].sum() < len(y)]
    result["auc"] = _mean([roc_auc_score(y[:, c], p[:, c]) for c in there])
    if kind == "multilabel":
        result["map"] = _mean([average_precision_score(y[:, c], p[:, c]) for c in there])
    return result


def _mean(values: list[float | None]) -> float | None:
    return mean_std(values)["mean"]


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
