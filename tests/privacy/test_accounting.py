"""Epsilon against a second accountant, a closed form and a table; calibration against what it promises."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from statistics import NormalDist

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedistill.errors import FedistillError
from fedistill.privacy import accounting
from fedistill.privacy.accounting import (
    AGREEMENT,
    PRECISION,
    Accounted,
    Mechanism,
    agree,
    auto_delta,
    calibrate,
    cross_check,
    epsilon_of,
)


def mechanism(sample_rate: float = 1.0, noise_multiplier: float = 2.0, steps: int = 1, **more: object) -> Mechanism:
    return Mechanism(name="sum", sample_rate=sample_rate, noise_multiplier=noise_multiplier, steps=steps, **more)


def second(mechanisms: list[Mechanism], delta: float) -> Accounted:
    pytest.importorskip("dp_accounting")
    found = cross_check(mechanisms, delta)
    assert found is not None
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    """No answer from before the test, and none of the test's afterwards."""

    def forget() -> None:
        accounting._prv.cache_clear()
        accounting._rdp.cache_clear()

    forget()
    yield
    forget()


# --- epsilon ----------------------------------------------------------------------------------------------------------

# records, expected batch, steps, noise, delta; epsilon by Google's PLD, Opacus' PRV and Opacus' RDP
TABLE = [
    (546, 128, 127, 4.0, 1e-3, 1.962, 1.972, 2.244),
    (4708, 512, 275, 2.0, 1e-4, 3.775, 3.785, 4.189),
    (11959, 512, 700, 1.0, 1e-5, 7.560, 7.570, 8.313),
    (89996, 1024, 1318, 0.7, 1e-5, 5.861, 5.871, 6.728),
    (1000, 100, 300, 1.0, 1e-4, 10.815, 10.825, 12.043),
]


@pytest.mark.parametrize(("records", "batch", "steps", "noise", "delta", "pld", "prv", "rdp"), TABLE)
def test_the_table(records, batch, steps, noise, delta, pld, prv, rdp) -> None:
    work = [mechanism(batch / records, noise, steps)]
    first = epsilon_of(work, delta)
    assert first.epsilon == pytest.approx(prv, abs=6e-4)
    assert first.accountant.startswith("opacus ")
    assert first.accountant.endswith(" PRV")
    assert first.delta == delta
    assert second(work, delta).epsilon == pytest.approx(pld, abs=6e-4)
    assert second(work, delta).accountant.endswith(" PLD")
    assert accounting._rdp(accounting._history(work), delta) == pytest.approx(rdp, abs=6e-4)


@settings(max_examples=8)
@given(
    works=st.lists(
        st.tuples(st.sampled_from([0.01, 0.1, 0.3, 1.0]), st.floats(0.8, 20), st.integers(1, 200)),
        min_size=1,
        max_size=3,
    ),
    delta=st.sampled_from([1e-3, 1e-5]),
)
def test_two_accountants_agree(works: list[tuple[float, float, int]], delta: float) -> None:
    work = [mechanism(*about) for about in works]
    loose = accounting._rdp(accounting._history(work), delta)
    assume(loose < 20)  # nobody releases at more, and the second accountant then takes seconds
    first, other = epsilon_of(work, delta), second(work, delta)
    assert other.epsilon - 1e-3 <= first.epsilon <= other.epsilon + AGREEMENT
    assert agree(first, other)
    assert first.epsilon <= loose + PRECISION


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Of one Gaussian mechanism: the root of Phi(1/2s - es) - exp(e) Phi(-1/2s - es) = delta (Balle & Wang, ICML 2018)."""
    phi = NormalDist().cdf

    def spare(e: float) -> float:
        return phi(0.5 / sigma - e * sigma) - math.exp(e) * phi(-0.5 / sigma - e * sigma) - delta

    low, high = 0.0, 1.0
    while spare(high) > 0:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spare(middle) > 0 else (low, middle)
    return high


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 10.0])
def test_a_closed_form(sigma: float, delta: float) -> None:
    exact = gaussian_epsilon(sigma, delta)
    assert exact <= epsilon_of([mechanism(1.0, sigma)], delta).epsilon <= exact + 1.1 * PRECISION
    # k Gaussian sums are one with sqrt(k) times less noise, and of different ones the inverse variances add up.
    four = [mechanism(1.0, 4 * sigma, 4), *[mechanism(1.0, 4 * sigma)] * 8, mechanism(1.0, 2 * sigma)]
    assert exact <= epsilon_of(four, delta).epsilon <= exact + 1.1 * PRECISION


def test_composition_depends_on_no_order_and_no_clip_norm() -> None:
    parts = [mechanism(0.1, 2.0, 50), mechanism(1.0, 9.0), mechanism(0.1, 2.0, 30), mechanism(0.1, 3.0, 10)]
    whole = epsilon_of(parts, 1e-5)
    for seed in range(4):
        random.Random(seed).shuffle(parts)
        assert epsilon_of(parts, 1e-5) == whole
    assert epsilon_of([mechanism(0.1, 2.0, 80), *(m for m in parts if m.steps not in (50, 30))], 1e-5) == whole
    alone = [epsilon_of([part], 1e-5).epsilon for part in parts]
    assert max(alone) < whole.epsilon < sum(alone)
    assert epsilon_of([mechanism(0.1, 2.0, 5, clip_norm=0.1)], 1e-5) == epsilon_of([mechanism(0.1, 2.0, 5)], 1e-5)


def test_more_work_costs_more_and_more_noise_less() -> None:
    base = epsilon_of([mechanism(0.1, 2.0, 50)], 1e-5).epsilon
    for more in (mechanism(0.1, 2.0, 60), mechanism(0.12, 2.0, 50), mechanism(0.1, 1.9, 50)):
        assert epsilon_of([more], 1e-5).epsilon > base + 0.01
    assert epsilon_of([mechanism(0.1, 2.0, 50)], 1e-6).epsilon > base + 0.01


def test_nothing_costs_nothing() -> None:
    assert epsilon_of([], 1e-5) == Accounted(epsilon=0.0, delta=1e-5, accountant="none")


def test_hopeless_noise_is_answered_at_once(fresh) -> None:
    epsilon_of([mechanism()], 1e-5)  # Opacus is imported before the clock starts
    begin = time.monotonic()
    for sigma in (0.1, 0.01, 1e-3):
        found = epsilon_of([mechanism(0.2, sigma, 1000)], 1e-5)
        assert found.epsilon > accounting.HOPELESS
        assert found.accountant.endswith(" RDP")
    assert time.monotonic() - begin < 5


# --- where an accountant fails ----------------------------------------------------------------------------------------


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, answer: object) -> None:
    import opacus.accountants

    monkeypatch.setattr(getattr(opacus.accountants, name), "get_epsilon", answer)


def overflow(*_: object, **__: object) -> float:
    raise OverflowError


def hang(*_: object, **__: object) -> float:
    time.sleep(20)
    return 0.001


@pytest.mark.parametrize(
    "answer", [overflow, lambda *_, **__: math.nan, lambda *_, **__: math.inf, lambda *_, **__: -1.0, hang]
)
def test_rdp_stands_in_for_prv(fresh, monkeypatch, answer) -> None:
    breaking(monkeypatch, "PRVAccountant", answer)
    if answer is hang:
        monkeypatch.setattr(accounting, "PATIENCE", 0.5)
    records, batch, steps, noise, delta, pld, _, rdp = TABLE[0]
    work = [mechanism(batch / records, noise, steps)]
    begin = time.monotonic()
    found = epsilon_of(work, delta)
    assert time.monotonic() - begin < 15
    assert found.epsilon == pytest.approx(rdp, abs=6e-4)
    assert found.accountant.endswith(" RDP")
    assert agree(found, Accounted(epsilon=pld, delta=delta, accountant="PLD"))


def test_prv_alone_is_enough(fresh, monkeypatch) -> None:
    monkeypatch.setattr(accounting, "_rdp", lambda *_: None)  # Opacus' PRV asks Opacus' RDP how far it has to look
    assert epsilon_of([mechanism()], 1e-5).accountant.endswith(" PRV")


def test_no_accountant_is_one_sentence(fresh, monkeypatch) -> None:
    breaking(monkeypatch, "PRVAccountant", overflow)
    breaking(monkeypatch, "RDPAccountant", overflow)
    with pytest.raises(FedistillError, match="raise the noise") as caught:
        epsilon_of([mechanism()], 1e-5)
    assert caught.value.code == "no-epsilon"


def test_agreement_lets_only_rdp_be_looser() -> None:
    def said(epsilon: float, accountant: str) -> Accounted:
        return Accounted(epsilon=epsilon, delta=1e-5, accountant=accountant)

    assert agree(said(1.01, "PRV"), said(1.0, "PLD"))
    assert not agree(said(1.1, "PRV"), said(1.0, "PLD"))
    assert not agree(said(0.9, "PRV"), said(1.0, "PLD"))
    assert agree(said(1.2, "RDP"), said(1.0, "PLD"))
    assert not agree(said(0.9, "RDP"), said(1.0, "PLD"))


# --- calibration ------------------------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(
    epsilon=st.floats(0.3, 12), rate=st.sampled_from([0.05, 0.3, 1.0]), steps=st.integers(1, 200), spent=st.booleans()
)
def test_calibration_never_overshoots_and_is_tight(epsilon: float, rate: float, steps: int, spent: bool) -> None:
    before = [mechanism(1.0, 30.0), mechanism(0.1, 12.0, 20)] if spent else []
    sigma = calibrate(epsilon, 1e-5, sample_rate=rate, steps=steps, before=before)
    assert epsilon_of([*before, mechanism(rate, sigma, steps)], 1e-5).epsilon <= epsilon
    assert epsilon_of([*before, mechanism(rate, 0.997 * sigma, steps)], 1e-5).epsilon > epsilon


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 5.0])
def test_calibration_does_not_overshoot_at_a_very_small_delta(epsilon: float) -> None:
    """The accountant's error has steps there, and rounding sigma can go over one: the gate refused what was paid for."""
    sigma = calibrate(epsilon, 1e-15, sample_rate=1.0, steps=1)
    assert epsilon_of([mechanism(1.0, sigma)], 1e-15).epsilon <= epsilon
    assert epsilon_of([mechanism(1.0, 0.99 * sigma)], 1e-15).epsilon > epsilon


def test_what_was_spent_before_needs_more_noise() -> None:
    # Two halves with the same noise are one run of all the steps.
    whole = calibrate(3, 1e-5, sample_rate=0.3, steps=40)
    halves = calibrate(3, 1e-5, sample_rate=0.3, steps=20, before=[mechanism(0.3, whole, 20)])
    assert halves == pytest.approx(whole, rel=4e-3)
    assert calibrate(3, 1e-5, sample_rate=0.3, steps=20) < 0.9 * whole


def test_no_noise_is_enough() -> None:
    spent = [mechanism(1.0, 1.0)]
    for epsilon, before in ((0.001, ()), (1.0, spent)):
        with pytest.raises(FedistillError, match="No noise is enough") as caught:
            calibrate(epsilon, 1e-5, sample_rate=0.1, steps=10, before=before)
        assert caught.value.code == "too-little-epsilon"


def test_an_epsilon_that_protects_nobody_is_calibrated_too() -> None:
    sigma = calibrate(1e6, 1e-5, sample_rate=0.5, steps=10)
    assert 0 < sigma <= 0.051
    assert epsilon_of([mechanism(0.5, sigma, 10)], 1e-5).epsilon <= 1e6


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"sample_rate": 0}, {"sample_rate": 1.1}, {"noise_multiplier": 0}, {"noise_multiplier": math.nan}, {"steps": 0},
     {"clip_norm": 0}, {"noise_multiplier": math.inf}, {"clip_norm": math.inf}],
    ids=str,
)  # fmt: skip
def test_what_is_no_mechanism_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="not a mechanism"):
        mechanism(**wrong)


@given(st.integers(1, 10**12))
def test_auto_delta(records: int) -> None:
    delta = auto_delta(records)
    assert 1 / (10.5 * records) <= delta < 1 / records
    assert math.log10(delta) == pytest.approx(round(math.log10(delta)), abs=1e-9)


@pytest.mark.parametrize(
    ("records", "delta"), [(1, 0.1), (9, 0.1), (10, 0.01), (999, 1e-3), (1000, 1e-4), (1001, 1e-4)]
)
def test_auto_delta_at_powers_of_ten(records: int, delta: float) -> None:
    assert auto_delta(records) == pytest.approx(delta)
    assert auto_delta(0) == auto_delta(1)
