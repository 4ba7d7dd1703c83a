"""What a ledger holds, what it comes to, and what it refuses."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import fails, mechanism, spend

from fedistill.errors import FedistillError
from fedistill.privacy.accounting import epsilon_of
from fedistill.privacy.chain import START, Head
from fedistill.privacy.ledger import Cap, Ledger, so_far


def test_an_entry_says_what_was_spent(ledger: Ledger) -> None:
    work = [mechanism(2.5, 50, 0.2), mechanism(20.0)]
    first = spend(ledger, "a", *work, unit="patient", note="round 1")
    second = spend(ledger, "b", data="derma", what="counts")
    assert (first.position, first.data, first.unit, first.what, first.key) == (1, "chest", "patient", "experts", "a")
    assert (first.delta, first.mechanisms, first.note) == (1e-5, tuple(work), "round 1")
    assert first.time.endswith("+00:00")
    assert (first.previous, second.previous, second.position) == (START, first.hash, 2)
    assert Ledger(ledger.path).entries() == [first, second]
    assert ledger.verify() == Head(2, second.hash)


def test_only_the_owner_may_read_it(ledger: Ledger) -> None:
    spend(ledger, "a")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (ledger.path, ledger.head_path)} == {0o600}


def test_the_same_key_spends_once(ledger: Ledger) -> None:
    first = spend(ledger, "a", mechanism(steps=3), cap=Cap(epsilon=2, delta=1e-5))
    assert spend(ledger, "a", mechanism(steps=3), note="again", cap=Cap(epsilon=0.1, delta=1e-5)) == first
    assert ledger.entries() == [first]


@pytest.mark.parametrize("other", [{"data": "derma"}, {"unit": "patient"}, {"what": "sketch"}, {"delta": 1e-6}])
def test_a_key_stands_for_one_work(ledger: Ledger, other: dict) -> None:
    spend(ledger, "a")
    with fails("other-work", "choose a new key"):
        spend(ledger, "a", **other)
    with fails("other-work"):
        spend(ledger, "a", mechanism(steps=2))
    assert len(ledger.entries()) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"unit": "images"}, {"delta": 0.0}, {"delta": 1.0}, {"data": " "}, {"what": ""}, {"note": "two\nlines"}, {"mechanisms": []}],
    ids=str,
)  # fmt: skip
def test_what_is_no_spend_is_refused(ledger: Ledger, wrong: dict) -> None:
    given = {"key": "a", "data": "x", "unit": "image", "what": "y", "delta": 1e-5, "mechanisms": [mechanism()]}
    with pytest.raises(FedistillError):
        ledger.spend(**(given | wrong))
    assert ledger.entries() == []


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (1, 0), (1, 1), (float("nan"), 0.1)])
def test_a_cap_is_checked(epsilon: float, delta: float) -> None:
    with fails("bad-cap"):
        Cap(epsilon=epsilon, delta=delta)


# --- what it comes to -------------------------------------------------------------------------------------------------


def test_spends_compose(ledger: Ledger) -> None:
    assert ledger.spent("chest", 1e-5).epsilon == 0
    parts = [mechanism(5.0, 4), mechanism(3.0, 30, 0.1), mechanism(4.0)]
    for k, part in enumerate(parts):
        spend(ledger, str(k), part)
    spend(ledger, "other", mechanism(0.5), data="derma")
    alone = [epsilon_of([part], 1e-5).epsilon for part in parts]
    whole = ledger.spent("chest", 1e-5)
    assert whole == epsilon_of(parts, 1e-5)
    assert max(alone) + 0.1 < whole.epsilon < sum(alone) - 0.1
    assert [total.epsilon for total in so_far(ledger.entries())] == [
        *(epsilon_of(parts[:k], 1e-5).epsilon for k in (1, 2, 3)),
        epsilon_of([mechanism(0.5)], 1e-5).epsilon,
    ]


def test_the_weaker_unit_is_reported(ledger: Ledger) -> None:
    spend(ledger, "a", unit="patient")
    assert ledger.unit_of("chest") == "patient"
    spend(ledger, "b", unit="image", data="derma")
    assert ledger.unit_of("chest") == "patient"
    spend(ledger, "c", unit="image")
    assert ledger.unit_of("chest") == "image"
    assert ledger.spent("chest", 1e-5) == epsilon_of([mechanism()] * 2, 1e-5)


def test_the_cap_holds_to_the_last_digit(ledger: Ledger) -> None:
    spend(ledger, "a", mechanism(5.0, 4))
    total = epsilon_of([mechanism(5.0, 4), mechanism(5.0, 5)], 1e-6).epsilon
    with fails("over-budget") as refused:
        spend(ledger, "b", mechanism(5.0, 5), cap=Cap(epsilon=total - 1e-9, delta=1e-6))
    spent, asked = (epsilon_of([mechanism(5.0, steps)], 1e-6).epsilon for steps in (4, 5))
    for number in (total, total, spent, total - spent, asked):
        assert f"{number:.3f}" in refused.value.sentence or f"{number:g}" in refused.value.sentence
    assert len(ledger.entries()) == 1
    spend(ledger, "b", mechanism(5.0, 5), cap=Cap(epsilon=total, delta=1e-6))
    assert ledger.spent("chest", 1e-6).epsilon == total


def test_the_cap_is_over_all_data_of_a_site(ledger: Ledger) -> None:
    """A person who was in validation may be in training once the data have grown, and the splits are cut anew."""
    for k, split in enumerate(("north", "north/val")):
        spend(ledger, split, mechanism(5.0, k + 1), data=split)
    total = epsilon_of([mechanism(5.0, 3), mechanism(4.0)], 1e-6).epsilon
    with fails("over-budget", "is spent on this site's data"):
        spend(ledger, "c", mechanism(4.0), data="north/test", cap=Cap(epsilon=total - 1e-9, delta=1e-6))
    spend(ledger, "c", mechanism(4.0), data="north/test", cap=Cap(epsilon=total, delta=1e-6))


WORK = st.tuples(st.sampled_from([2.0, 5.0, 20.0]), st.integers(1, 6), st.sampled_from([1.0, 0.1]))


@settings(max_examples=10)
@given(st.lists(WORK, min_size=2, max_size=5), st.floats(0.3, 4))
def test_what_is_accepted_never_exceeds_the_cap(works: list[tuple[float, int, float]], epsilon: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger, cap = Ledger(Path(folder) / "l"), Cap(epsilon=epsilon, delta=1e-5)
        accepted = []
        for k, (noise, steps, rate) in enumerate(works):
            asked = mechanism(noise, steps, rate)
            if epsilon_of([*accepted, asked], cap.delta).epsilon > epsilon:
                with fails("over-budget"):
                    spend(ledger, str(k), asked, cap=cap)
            else:
                spend(ledger, str(k), asked, cap=cap)
                accepted.append(asked)
            assert ledger.spent("chest", cap.delta).epsilon <= epsilon
        assert [e.mechanisms[0] for e in ledger.entries()] == accepted
