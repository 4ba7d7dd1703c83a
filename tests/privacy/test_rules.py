"""What is refused with privacy on, and what a private set says of itself."""

from __future__ import annotations

import json

import pytest
from private import settings

from fedistill.config import make_config
from fedistill.errors import FedistillError
from fedistill.methods.registry import METHODS
from fedistill.privacy.plan import plan_of
from fedistill.privacy.rules import check_private, conditions, statement_of


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"epsilon": 0.0}, "privacy=dp needs a budget: say --epsilon"),
        ({"init": "real"}, "init=real cannot be private: patients' pixels would be in the set.*use noise or phantom"),
        ({"budget": "sqrt"}, "budget=sqrt cannot be private: how many images a class has is private: use equal"),
        ({"budget": "proportional"}, "budget=proportional cannot be private"),
        ({"overlap": "on"}, "overlap=on cannot be private: its limits are measured on real images: use auto or off"),
        ({"method": "sketch", "rounds": 2}, "rounds=2 needs trajectory matching: use ptm, or one round"),
        ({"method": "sketch", "labels": "soft"}, "method=sketch has none: use labels=hard"),
        ({"model": "convnet,mlp"}, "model=convnet,mlp cannot be private: private experts are averaged.*name one"),
    ],
)
def test_settings_that_let_something_out_are_refused(changed: dict[str, object], sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        check_private(settings(**changed))


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_that_read_images_are_refused(method: str) -> None:
    config = settings(method=method)
    if METHODS[method].sees_images:
        with pytest.raises(
            FedistillError, match=f"method={method} cannot be private: it reads real images.*use sketch"
        ):
            check_private(config)
    else:
        check_private(config)


@pytest.mark.parametrize("changed", [{"epsilon": 1.0}, {"delta": 1e-5}, {"eval_epsilon": 1.0}, {"unit": "patient"}])
def test_settings_of_privacy_need_privacy(changed: dict[str, object]) -> None:
    name, value = next(iter(changed.items()))
    shown = value if isinstance(value, str) else f"{value:g}"
    with pytest.raises(FedistillError, match=f"{name}={shown} has no effect without privacy=dp: add --privacy dp"):
        check_private(make_config(changed))
    check_private(make_config({}))


def test_one_architecture_twice_is_one() -> None:
    check_private(settings(model="convnet, convnet"))
    check_private(settings(method="sketch", model="convnet,mlp"))  # it has no experts


@pytest.mark.parametrize("method", ["sketch", "ptm"])
def test_there_are_ten_conditions(method: str) -> None:
    found = conditions(settings(method=method))
    assert [c["number"] for c in found] == list(range(1, 11))
    assert {c["status"] for c in found} <= {"passed", "declared", "not-applicable"}
    assert next(c for c in found if c["number"] == 6)["status"] == "declared"
    assert all(c["how"] for c in found)
    assert len({c["name"] for c in found}) == 10
    assert ("Poisson" in found[8]["how"]) == (method == "ptm")


@pytest.mark.parametrize("method", ["sketch", "ptm"])
def test_a_statement_is_the_plan_and_holds_no_seed(method: str) -> None:
    config = settings(method=method, seed=987_654_321)
    plan = plan_of(config, 1234)
    about = statement_of(config, plan)
    text = json.dumps(about)
    assert "987654321" not in text
    assert "1234" not in text
    assert '"seed"' not in text
    assert about["epsilon"] == plan.first.epsilon
    assert about["mechanisms"] == [m.to_dict() for m in plan.mechanisms]
    assert about["adjacency"] == "zero-out"
    assert f"({plan.first.epsilon:.2f}, 0.0001)-differential privacy for every image" in about["statement"]
    assert "k times the epsilon" in about["statement"]
    assert len(about["conditions"]) == 10


def test_a_statement_names_whom_it_protects_and_what_else_leaves() -> None:
    config = settings(method="sketch", unit="patient", eval_epsilon=0.5)
    about = statement_of(config, plan_of(config, 100))
    assert "for every patient of" in about["statement"]
    assert "k times" not in about["statement"]
    assert "eval_epsilon=0.5" in about["conditions"][7]["how"]
