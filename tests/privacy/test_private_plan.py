"""Plans: never more than was asked for, by both accountants, over everything that touches a record."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from private import labelled, settings

from fedistill.errors import FedistillError
from fedistill.methods import sketch
from fedistill.privacy import plan as plans
from fedistill.privacy.accounting import Accounted, auto_delta, epsilon_of
from fedistill.privacy.plan import plan_of, records_of


def test_experts_compose_and_counts_are_part_of_it() -> None:
    one, two = (plan_of(settings(experts=e), 1000) for e in (1, 2))
    assert [m.name for m in one.mechanisms] == ["counts", "dp-sgd"]
    assert one["dp-sgd"].steps == 20
    assert two["dp-sgd"].steps == 40
    assert two["dp-sgd"].noise_multiplier > one["dp-sgd"].noise_multiplier
    for plan in (one, two):
        assert 2.9 < plan.first.epsilon <= 3
        assert plan.first.epsilon == epsilon_of(plan.mechanisms, plan.first.delta).epsilon
        without = epsilon_of([plan["dp-sgd"]], plan.first.delta).epsilon
        assert plan.first.epsilon - 0.15 < without < plan.first.epsilon  # counts are cheap, not free


def test_a_sketch_is_one_gaussian_of_everybody() -> None:
    (only,) = plan_of(settings(method="sketch"), 1000).mechanisms
    assert (only.sample_rate, only.steps, only.clip_norm) == (1.0, 1, sketch.NORM)


def test_more_sampling_takes_more_noise() -> None:
    base, more = (plan_of(settings(experts=1, sample_rate=r), 1000)["dp-sgd"].noise_multiplier for r in (0.2, 1.0))
    assert base < more


def test_only_whole_checkpoints_are_paid_for() -> None:
    assert plan_of(settings(experts=1, expert_steps=24), 1000)["dp-sgd"].steps == 20


@effort(max_examples=3)
@given(
    epsilon=st.floats(0.5, 12.0),
    records=st.integers(30, 200_000),
    rate=st.floats(0.01, 1.0),
    steps=st.integers(5, 40),
    method=st.sampled_from(["sketch", "ptm"]),
)
def test_no_plan_spends_more_than_asked(epsilon: float, records: int, rate: float, steps: int, method: str) -> None:
    config = settings(epsilon=epsilon, sample_rate=rate, expert_steps=steps, experts=1, method=method)
    plan = plan_of(config, records)
    assert 0.9 * epsilon - 0.05 < plan.first.epsilon <= epsilon
    assert plan.second is not None
    assert plan.second.epsilon <= epsilon
    assert plan.first.delta == auto_delta(records) < 1 / records


def test_delta_is_below_the_share_of_one_record() -> None:
    config = settings(method="sketch")
    assert [plan_of(config, n).first.delta for n in (99, 100, 101)] == [1e-2, 1e-3, 1e-3]
    assert plan_of(replace(config, delta=1e-5), 100).first.delta == 1e-5
    for delta in (0.01, 0.5):
        with pytest.raises(FedistillError, match="not below 1/100, the share of one record: lower it"):
            plan_of(replace(config, delta=delta), 100)


def test_hopeless_budgets_are_refused() -> None:
    with pytest.raises(FedistillError, match="No noise is enough"):
        plan_of(settings(method="sketch", epsilon=1e-7), 100)


def test_accountants_that_differ_release_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plans, "cross_check", lambda m, delta: Accounted(epsilon=3.5, delta=delta, accountant="another PLD")
    )
    with pytest.raises(FedistillError, match="nothing is released on such a claim"):
        plan_of(settings(method="sketch"), 100)


def test_patients_are_counted_where_they_are_protected() -> None:
    data = labelled(60, patients=7)
    assert records_of(data.train, "image") == 60
    assert records_of(data.train, "patient") == 7
    with pytest.raises(FedistillError, match="give a manifest with a patient column"):
        records_of(labelled().train, "patient")


def test_a_plan_says_nothing_of_the_number_of_records() -> None:
    """Beyond its order of magnitude, in delta."""
    config = settings(method="sketch")
    assert plan_of(config, 1001).to_dict() == plan_of(config, 9998).to_dict()
