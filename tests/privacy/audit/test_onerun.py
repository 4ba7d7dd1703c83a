"""The one-run bound: the published formula, its guarantee by simulation, and what it can show at most."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scipy.stats import binom

from fedistill.privacy.audit.attack import guesses
from fedistill.privacy.audit.onerun import ceiling, epsilon_lower, p_value

TABLE = {  # guesses: the bound at 60, 70, 80, 90 and 100 % right, 95 % confidence, delta 0
    20: (0.0, 0.0, 0.40, 0.93, 1.82),
    50: (0.0, 0.31, 0.77, 1.39, 2.78),
    100: (0.05, 0.47, 0.96, 1.63, 3.49),
    200: (0.16, 0.58, 1.09, 1.80, 4.19),
    500: (0.25, 0.68, 1.20, 1.95, 5.11),
    1000: (0.30, 0.73, 1.25, 2.02, 5.81),
}
bound = functools.cache(epsilon_lower)


@pytest.mark.parametrize("guessed", TABLE)
def test_known_bounds(guessed: int) -> None:
    found = [epsilon_lower(guessed, guessed, guessed * share // 100) for share in (60, 70, 80, 90, 100)]
    assert found == pytest.approx(TABLE[guessed], abs=0.0051)
    assert ceiling(guessed) == found[-1]


def test_ceiling_has_a_closed_form() -> None:
    """All right: q^r = 1 - confidence, so epsilon = log(q / (1 - q))."""
    for guessed in (5, 42, 300):
        q = 0.05 ** (1 / guessed)
        assert ceiling(guessed) == pytest.approx(math.log(q / (1 - q)), abs=1e-5)


@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2])
def test_p_value_is_the_theorem_word_by_word(delta: float) -> None:
    for m, r, v, epsilon in ((10, 10, 9, 0.0), (64, 42, 30, 0.7), (200, 100, 95, 2.0), (20, 12, 0, 1.0)):
        q = math.exp(epsilon) / (1 + math.exp(epsilon))
        pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        alpha = max((sum(pmf[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
        assert p_value(m, r, v, epsilon, delta) == pytest.approx(min(1, sum(pmf[v:]) + 2 * m * delta * alpha), rel=1e-9)


def test_one_guess() -> None:
    assert p_value(1, 1, 1, 0.0, 0.1) == pytest.approx(0.5 + 2 * 0.1 * 0.5)


def test_more_shows_more() -> None:
    rising = [ceiling(r) for r in (1, 4, 5, 10, 20, 50, 100)]
    assert rising == sorted(rising)
    assert rising[:2] == [0.0, 0.0]  # four coins all right are chance: 1/16
    by_delta = [ceiling(40, canaries=60, delta=d) for d in (0.0, 1e-4, 1e-3, 1e-2)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert len(set(by_delta)) == 4
    assert ceiling(40, canaries=400, delta=1e-4) < ceiling(40, canaries=40, delta=1e-4)
    assert ceiling(40, confidence=0.99) < ceiling(40, confidence=0.9)
    assert [bound(40, 40, v) for v in range(41)] == sorted(bound(40, 40, v) for v in range(41))


def test_nothing_is_shown_by_no_guesses_or_bad_ones() -> None:
    assert epsilon_lower(10, 0, 0) == 0
    assert epsilon_lower(100, 100, 20) == 0


def test_impossible_counts() -> None:
    for m, r, v in ((5, 6, 2), (6, 5, 6), (5, 5, -1)):
        with pytest.raises(ValueError, match="not an audit"):
            epsilon_lower(m, r, v)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("guessed", [12, 42, 200])
def test_the_guarantee_holds_exactly_for_the_worst_case(epsilon: float, guessed: int) -> None:
    q = 1 / (1 + math.exp(-epsilon))
    above = [v for v in range(guessed + 1) if bound(guessed, guessed, v) > epsilon + 1e-9]
    assert sum(binom.pmf(above, guessed, q)) <= 0.05


def respond(epsilon: float, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coins, and scores of an auditor who sees each through epsilon-DP randomised response; ties in random order."""
    rng = torch.Generator().manual_seed(seed)
    inside = torch.rand(m, generator=rng) < 0.5
    honest = torch.rand(m, generator=rng) < 1 / (1 + math.exp(-epsilon))
    return inside, (inside == honest).float() + 0.1 * torch.rand(m, generator=rng)


def right_of(inside: torch.Tensor, scores: torch.Tensor, each: int) -> int:
    said_in, said_out = guesses(scores, each)
    return int(inside[said_in].sum() + (~inside[said_out]).sum())


def test_simulated_runs_with_abstentions_overshoot_in_at_most_five_per_cent() -> None:
    over = sum(bound(90, 60, right_of(*respond(1.0, 90, seed), 30)) > 1.0 for seed in range(300))
    assert 0 < over <= 0.05 * 300 + 2 * math.sqrt(300 * 0.05 * 0.95)


def test_many_guesses_come_close_to_the_truth() -> None:
    found = sorted(bound(3000, 2000, right_of(*respond(1.0, 3000, seed), 1000)) for seed in range(21))
    assert 0.8 < found[10] < 1.0


def test_guesses_are_the_extremes_and_never_both() -> None:
    said_in, said_out = guesses(torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7, 0.2]), 2)
    assert sorted(said_in.tolist()) == [1, 4]
    assert sorted(said_out.tolist()) == [2, 5]
