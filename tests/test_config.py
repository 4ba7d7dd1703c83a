from __future__ import annotations

import json
from dataclasses import fields

import pytest

from fedistill.config import LIGHT, PRESETS, TYPES, Config, make_config, recommended_method
from fedistill.errors import FedistillError
from fedistill.methods.registry import METHODS
from fedistill.wire import strict_json


def test_strings_and_typed_values_mean_the_same() -> None:
    typed = make_config({"ipc": 3, "alpha": 1, "class_weights": False, "data": "x.npz"})
    text = make_config({"ipc": "3", "alpha": "1", "class-weights": "no", "data": "x.npz"})
    assert typed == text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"iteration": 3}, "Unknown option 'iteration': did you mean 'iterations'"),
        ({"ipc": "ten"}, "ipc=ten is not a whole number"),
        ({"ipc": 1.5}, "ipc=1.5 is not a whole number"),
        ({"ipc": True}, "ipc=True is not a whole number"),
        ({"ipc": 0}, "ipc=0 is too small: it must be at least 1"),
        ({"alpha": "nan"}, "alpha=nan is not a finite number"),
        ({"class_weights": "maybe"}, "class_weights=maybe is not true or false"),
        ({"init": "nois"}, "Unknown value of init 'nois': did you mean 'noise'"),
        ({"preset": "fast"}, "Unknown preset 'fast'"),
        ({"data": 3}, "data=3 is not text"),
        ({"seed": 2**63 - 2, "seeds": 3}, f"seed={2**63 - 2} is too large for seeds=3: the last one must be below"),
        ({"phantom_size": 100000}, "phantom_size=100000 is too large: it must be at most 1024"),
        ({"phantom_images": 10**12}, "phantom_images=1000000000000 is too large"),
        ({"phantom_depth": 10**6}, "phantom_depth=1000000 is too large"),
    ],
)
def test_bad_values_are_one_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        make_config(values)


def test_the_last_seed_fits_into_64_bits() -> None:
    config = make_config({"seed": 2**63 - 2, "seeds": 2})
    assert [config.with_seed(config.seed + i).seed for i in range(config.seeds)] == [2**63 - 2, 2**63 - 1]
    assert strict_json(json.dumps(config.with_seed(2**63 - 1).to_dict()))["seed"] == 2**63 - 1


def test_presets_fill_only_what_was_left_open() -> None:
    config = make_config({"preset": "quick", "iterations": 7}).resolved()
    assert config.iterations == 7
    assert config.experts == PRESETS["quick"]["experts"]
    assert all(getattr(config, key) > 0 for key in PRESETS["quick"])
    assert all(set(p) == set(PRESETS["quick"]) for p in PRESETS.values())


def test_a_resolved_configuration_survives_a_round_trip() -> None:
    config = make_config({"preset": "quick", "partition": "dirichlet"}).resolved()
    assert make_config(config.to_dict()) == config
    assert config.resolved() == config


def test_every_key_is_documented_and_has_a_type_that_flower_can_carry() -> None:
    for item in fields(Config):
        assert item.metadata["help"]
        assert item.metadata["scope"] in ("data", "experts", "distill", "merge", "eval", "run")
        assert TYPES[item.name] in (int, float, bool, str)


def test_keys_of_work_follow_what_matters() -> None:
    config = make_config({})
    assert config.key("data", "experts") == make_config({"ipc": 5, "deadline": 3.0}).key("data", "experts")
    assert config.key("data", "experts") != make_config({"width": 64}).key("data", "experts")
    assert config.key("distill") != make_config({"ipc": 5}).key("distill")


def test_auto_becomes_a_method_and_cheap_iterations_become_more() -> None:
    resolved = make_config({"preset": "quick"}).resolved()
    assert resolved.method == recommended_method(resolved.ipc) in METHODS
    assert METHODS[make_config({"rounds": 2}).resolved().method].meets_others
    # of the methods that can be private only trajectory matching has a use for what other sites teach
    assert make_config({"rounds": 2, "privacy": "dp", "epsilon": 1.0}).resolved().method == "ptm"
    quick = PRESETS["quick"]["iterations"]
    assert make_config({"preset": "quick", "method": "ptm"}).resolved().iterations == quick
    assert make_config({"preset": "quick", "method": "cf"}).resolved().iterations == LIGHT["cf"] * quick
    assert [
        make_config({"preset": "quick", "method": "dm", "ipc": n}).resolved().iterations // quick for n in (2, 3)
    ] == [5, 10]
    assert make_config({"preset": "quick", "method": "cf", "iterations": 7}).resolved().iterations == 7
    assert set(LIGHT) == {name for name, m in METHODS.items() if m.step is not None and (m.sees_images or m.sketch)}
