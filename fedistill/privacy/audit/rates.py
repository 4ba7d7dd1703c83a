"""How well scores tell members from others, with intervals that are exact for few of them."""

from __future__ import annotations

import math
from typing import Any

from scipy.stats import beta
from sklearn.metrics import roc_auc_score
from torch import Tensor

FALSE_ALARMS = (0.001, 0.01, 0.05, 0.1)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share (Clopper and Pearson, Biometrika 1934); (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def share(successes: int, trials: int) -> dict[str, float | None]:
    """A share with its 95 % interval; None for the share where there were no trials."""
    low, high = clopper_pearson(successes, trials)
    return {"share": successes / trials if trials else None, "low": low, "high": high}


def tpr_at(scores: Tensor, inside: Tensor, fpr: float) -> dict[str, float]:
    """Share of members above the lowest threshold that lets at most a share `fpr` of the others pass, with its interval.

    The interval is of the members alone: that the threshold is an estimate from few others is not in it.
    scores `(n,)`, higher for members; inside `(n,)` bool.
    """
    others = scores[~inside].sort(descending=True).values
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = float(others[allowed]) if allowed < len(others) else -math.inf
    members = scores[inside]
    caught = int((members > threshold).sum())
    low, high = clopper_pearson(caught, len(members))
    return {"tpr": caught / max(1, len(members)), "low": low, "high": high}


def rates(name: str, scores: Tensor, inside: Tensor) -> dict[str, Any]:
    """All that is said of one attack, from scores and membership of (canary, run) pairs of any shape.

    Balanced accuracy is at the median score, which needs no knowledge of the members. AUC is None where all pairs, or none,
    are members.
    """
    scores, inside = scores.flatten().double(), inside.flatten()
    members = int(inside.sum())
    both = 0 < members < len(inside)
    guess = scores > scores.median()
    right = [float((guess == inside)[inside == side].double().mean()) for side in (True, False)] if both else []
    return {
        "name": name,
        "pairs": len(inside),
        "members": members,
        "auc": float(roc_auc_score(inside.numpy(), scores.numpy())) if both else None,
        "balanced_accuracy": sum(right) / 2 if both else None,
        "tpr_at_fpr": {f"{fpr:g}": tpr_at(scores, inside, fpr) for fpr in FALSE_ALARMS},
    }
