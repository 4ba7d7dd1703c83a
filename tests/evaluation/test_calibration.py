"""Intervals of shares, and calibration: against other formulas, and against networks that are known to be calibrated."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.evaluation.arms import confusion_at, evaluate_arms, global_models
from fedistill.evaluation.calibration import BINS, calibration_of, expected_error, over_seeds, reliability
from fedistill.evaluation.intervals import recognised, wilson
from fedistill.synthetic.set import SyntheticSet, one_hot


@pytest.mark.parametrize(("right", "of"), [(0, 3), (3, 3), (1, 2), (17, 20), (250, 1000)])
def test_wilson_is_scipys(right: int, of: int) -> None:
    other = binomtest(right, of).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(right, of) == pytest.approx((other.low, other.high), abs=1e-9)


def test_nothing_counted_has_no_interval() -> None:
    assert wilson(0, 0) is None


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(share: float) -> None:
    n = 40
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    covered = sum(p for k, p in enumerate(chances) if (found := wilson(k, n)) and found[0] <= share <= found[1])
    assert 0.92 < covered < 0.985


def test_recognised_images_of_both_kinds_of_counts() -> None:
    assert recognised(torch.tensor([[3, 1], [2, 4]]), "multiclass") == [(3, 4), (4, 6)]
    assert recognised(torch.tensor([[[5, 1], [2, 4]], [[6, 0], [6, 0]]]), "multilabel") == [(4, 6), (0, 6)]


def test_bins_are_sums_over_the_answers_in_them() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6], [1.0, 0.0]])
    bins = reliability(probabilities, torch.tensor([0, 1, 1, 0]), "multiclass")
    assert len(bins) == BINS
    assert bins[9] == {"count": 3, "confidence": pytest.approx(2.87), "right": 2}
    assert bins[6] == {"count": 1, "confidence": pytest.approx(0.6), "right": 1}
    assert expected_error(bins) == pytest.approx((abs(2 - 2.87) + abs(1 - 0.6)) / 4)


def test_a_calibrated_network_has_next_to_no_error_and_one_that_is_too_sure_has() -> None:
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(torch.randn(40_000, 3, generator=rng), 1)
    truth = torch.multinomial(probabilities, 1, generator=rng).flatten()
    found = expected_error(reliability(probabilities, truth, "multiclass"))
    assert found is not None
    assert found < 0.02
    sharper = (4 * probabilities.log()).softmax(1)
    worse = expected_error(reliability(sharper, truth, "multiclass"))
    assert worse == pytest.approx(
        float(sharper.amax(1).mean() - (probabilities.argmax(1) == truth).float().mean()), abs=0.03
    )
    assert worse > 0.1


def test_findings_are_answers_of_their_own() -> None:
    bins = reliability(torch.tensor([[0.15, 0.75], [0.11, 0.7501]]), torch.tensor([[0, 1], [1, 0]]), "multilabel")
    assert (bins[1]["count"], bins[1]["right"], bins[7]["count"], bins[7]["right"]) == (2, 1, 2, 1)


def test_seeds_are_averaged() -> None:
    one = {"model": "mlp", "bins": reliability(torch.tensor([[0.95, 0.05]]), torch.tensor([0]), "multiclass")}
    other = {"model": "mlp", "bins": reliability(torch.tensor([[0.91, 0.09]]), torch.tensor([1]), "multiclass")}
    found = over_seeds([one, other])
    assert found is not None
    assert found["bins"][9] == {"from": 0.9, "to": 1.0, "count": 1, "confidence": pytest.approx(0.93), "accuracy": 0.5}
    assert found["bins"][0]["accuracy"] is None
    assert found["expected_error"]["mean"] == pytest.approx((0.05 + 0.91) / 2)
    assert over_seeds([]) is None


def test_the_first_global_model_of_the_headline_is_looked_at(tiny: Dataset, tmp_path: Path) -> None:
    small = {
        "width": 4,
        "eval_steps": 3,
        "eval_nets": 1,
        "workers": 1,
        "eval_models": "mlp",
        "partition": "iid",
        "sites": 2,
    }
    config = make_config(small).resolved()
    part = partition(tiny, config)
    merged = SyntheticSet(
        images=torch.randn(6, 1, 16, 16),
        labels=one_hot([0, 1, 2] * 2, 3),
        site=torch.tensor([0, 0, 0, 1, 1, 1]),
        sites=tuple(part.names),
        class_names=tiny.class_names,
        mean=0.4,
        std=0.25,
        modality=tiny.modality,
        step_size=(0.01, 0.01),
        manifest={},
    )
    evaluate_arms(config, tiny, part, merged, tmp_path, lambda *event: None)
    found = calibration_of(config, tiny, merged, tmp_path)
    counts = confusion_at(config, tiny, "mlp", global_models(config, merged, tmp_path)["mlp"], "test")
    assert found["model"] == "mlp"
    assert sum(b["count"] for b in found["bins"]) == len(tiny.test)
    assert sum(b["right"] for b in found["bins"]) == counts.diagonal().sum()
