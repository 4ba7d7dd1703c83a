"""Whether a network is as often right as it is sure: a reliability table, and the expected calibration error.

    ECE = sum_b n_b / n |right_b / n_b - confidence_b / n_b|

over bins b of equal width (Naeini et al., AAAI 2015; Guo et al., ICML 2017). An answer is the most likely class of an image, with
its probability; where an image may have several findings, each of them with its probability, which is right where it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.evaluation.arms import architectures, global_models
from fedistill.evaluation.fit import predict
from fedistill.evaluation.metrics import mean_std
from fedistill.models.flat import device_of
from fedistill.site.describe import task_of
from fedistill.synthetic.set import SyntheticSet

BINS = 10

Bins = list[
    dict[str, float]
]  # of each bin: number of answers, and sums of their confidence and of those that are right


def reliability(probabilities: Tensor, truth: Tensor, kind: str) -> Bins:
    """Sums of each bin for `probabilities (n, K)` against `truth (n,)`, for multilabel `(n, K)`."""
    if kind == "multilabel":
        confidence, right = probabilities.flatten(), truth.flatten().double()
    else:
        confidence, answer = probabilities.max(1)
        right = (answer == truth).double()
    confidence = confidence.double()
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    sums = {
        "count": torch.bincount(place, minlength=BINS),
        "confidence": torch.bincount(place, confidence, minlength=BINS),
        "right": torch.bincount(place, right, minlength=BINS),
    }
    return [{name: column[b].item() for name, column in sums.items()} for b in range(BINS)]


def expected_error(bins: Bins) -> float | None:
    """The expected calibration error; None without an answer."""
    total = sum(b["count"] for b in bins)
    return sum(abs(b["right"] - b["confidence"]) for b in bins) / total if total else None


def calibration_of(config: Config, data: Dataset, merged: SyntheticSet, folder: Path) -> dict[str, Any]:
    """The reliability of the headline's global model on the test images, after `evaluate_arms` trained it in `folder`."""
    model, task = architectures(config)[0], task_of(data)
    theta = global_models(config, merged, folder)[model].to(device_of(config.device))
    answers = predict(task.network(model, config), theta, data.test.images, task)
    return {"model": model, "bins": reliability(answers, data.test.labels, data.kind)}


def over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What `calibration_of` told of each seed as one table: counts and shares are means over seeds; None without any."""
    if not found:
        return None
    bins = []
    for b in range(BINS):
        count, confidence, right = (
            sum(one["bins"][b][name] for one in found) for name in ("count", "confidence", "right")
        )
        bins.append({
            "from": b / BINS,
            "to": (b + 1) / BINS,
            "count": count / len(found),
            "confidence": confidence / count if count else None,
            "accuracy": right / count if count else None,
        })  # fmt: skip
    return {
        "model": found[0]["model"],
        "bins": bins,
        "expected_error": mean_std([expected_error(one["bins"]) for one in found]),
    }
