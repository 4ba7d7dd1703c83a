"""A lower bound on epsilon from one run: Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv 2305.08846.

Each of m canaries is in the training data by a fair coin of its own. An auditor who sees only what was released guesses r of
the coins, abstains from the rest, and is right v times. Against an (epsilon, delta)-DP release he is right no more often
than coins of bias q = e^epsilon / (e^epsilon + 1) would be, but for delta (their Theorem 5.2):

    P[V >= v] <= P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i,      B ~ Binomial(r, q),  i = 1 .. v

An epsilon at which the right side is below 1 - confidence is rejected. Here, as in the theorem, one canary more or less is
one record added to or removed from the training data.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom

CONFIDENCE = 0.95
PRECISION = 1e-6  # of the bound, which is rounded downwards


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The most probable that an (epsilon, delta)-DP release can make `right` or more of `guesses` right.

    canaries: m, all whose coin was tossed. Raises `ValueError` on counts that cannot be.
    """
    if not (0 <= right <= guesses <= canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"not an audit: {canaries=} {guesses=} {right=} {epsilon=} {delta=}")
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, q))
    i = np.arange(1, right + 1)
    alpha = float((np.cumsum(binom.pmf(right - i, guesses, q)) / i).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def epsilon_lower(
    canaries: int, guesses: int, right: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that is rejected at `confidence`; 0 where none is.

    Formal guarantee: if the release is (epsilon, delta)-DP and the guesses were fixed in number beforehand, the result is
    above epsilon with probability at most 1 - confidence. Of several runs or scores only one may be used, or the
    confidence has to be divided among them.

    | right of guesses         | result                                    |
    | half or fewer            | 0                                         |
    | all                      | `ceiling`: no attack can show more        |
    | no guesses               | 0                                         |
    """
    limit = 1 - confidence
    if p_value(canaries, guesses, right, 0.0, delta) >= limit:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) < limit:
        low, high = high, 2 * high
    while high - low > PRECISION:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < limit:
            low = middle
        else:
            high = middle
    return low


def ceiling(guesses: int, *, canaries: int | None = None, delta: float = 0.0, confidence: float = CONFIDENCE) -> float:
    """The highest bound that `guesses` can certify: every one of them right. canaries: as many as guesses unless given."""
    return epsilon_lower(
        guesses if canaries is None else canaries, guesses, guesses, delta=delta, confidence=confidence
    )
