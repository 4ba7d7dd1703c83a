"""Shares, their exact intervals, and rates at few false alarms."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom

from fedistill.privacy.audit.rates import clopper_pearson, rates, share, tpr_at


@pytest.mark.parametrize("trials", [1, 7, 200])
def test_none_and_all_have_closed_forms(trials: int) -> None:
    tail = 0.025 ** (1 / trials)
    assert clopper_pearson(0, trials) == pytest.approx((0, 1 - tail))
    assert clopper_pearson(trials, trials) == pytest.approx((tail, 1))


@pytest.mark.parametrize(("k", "n", "confidence"), [(3, 10, 0.95), (50, 64, 0.9), (1, 400, 0.99)])
def test_ends_are_where_the_tails_hold_what_is_left(k: int, n: int, confidence: float) -> None:
    low, high = clopper_pearson(k, n, confidence)
    assert binom.sf(k - 1, n, low) == pytest.approx((1 - confidence) / 2)
    assert binom.cdf(k, n, high) == pytest.approx((1 - confidence) / 2)


def test_no_trials_say_nothing() -> None:
    assert share(0, 0) == {"share": None, "low": 0.0, "high": 1.0}


def test_members_at_few_false_alarms() -> None:
    inside = torch.tensor([True] * 4 + [False] * 10)
    scores = torch.tensor([9.0, 7.5, 6.5, 0.5, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1])
    assert tpr_at(scores, inside, 0.01)["tpr"] == 0.25  # only what is above all ten
    assert tpr_at(scores, inside, 0.1)["tpr"] == 0.5  # one of ten may pass
    assert tpr_at(scores, inside, 0.2)["tpr"] == 0.75
    assert tpr_at(scores, inside, 1.0)["tpr"] == 1.0


def test_equal_scores_find_nobody() -> None:
    found = rates("flat", torch.zeros(4, 10), torch.arange(40).view(4, 10) % 2 == 0)
    assert found["auc"] == 0.5
    assert found["balanced_accuracy"] == 0.5
    assert found["tpr_at_fpr"]["0.1"]["tpr"] == 0


def test_a_perfect_attack() -> None:
    inside = torch.arange(40).view(4, 10) % 2 == 0
    found = rates("perfect", inside.float(), inside)
    assert (found["auc"], found["balanced_accuracy"], found["pairs"], found["members"]) == (1.0, 1.0, 40, 20)
    assert set(found["tpr_at_fpr"]) == {"0.001", "0.01", "0.05", "0.1"}
    assert all(at["tpr"] == 1 for at in found["tpr_at_fpr"].values())


def test_without_members_there_is_no_auc() -> None:
    assert rates("none", torch.zeros(5), torch.zeros(5, dtype=torch.bool))["auc"] is None
