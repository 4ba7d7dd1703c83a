"""The indicator: it never sees the test split, says the same for the same seed, and warns of what is there to be warned of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedistill.api import from_tensors
from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.errors import FedistillError
from fedistill.evaluation import predictor as predictor_module
from fedistill.evaluation import probe as probe_module
from fedistill.evaluation.cautions import cautions_of
from fedistill.evaluation.metrics import Spread
from fedistill.evaluation.predictor import FEATURES, Prediction, Predictor, save_predictor
from fedistill.evaluation.probe import Budget, Measured, Probe, probe, recommend


@pytest.fixture(autouse=True)
def no_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "PATH", tmp_path / "predictor.json")


def settings(**more: object) -> Config:
    return make_config({"width": 4, "eval_steps": 3, "eval_nets": 2, "workers": 1, "eval_models": "convnet"} | more)


def timeless(found: Probe) -> Probe:
    return replace(found, seconds=0.0)


def fitted(**more: object) -> Predictor:
    """Predicts a gain of .1 everywhere."""
    values = {
        "kind": "mean gain",
        "intercept": 0.1,
        "coefficients": dict.fromkeys(FEATURES, 0.0),
        "half_width": 0.03,
        "errors": {"mean gain": {"a": 0.01, "b": 0.03}},
        "ranges": dict.fromkeys(FEATURES, (-1.0, 2.0)),
        "model": "convnet",
        "methods": ("dm",),
        "provenance": {"csv": "results.csv", "cells": {"a": 2, "b": 3}, "version": "0"},
    }
    return Predictor(**values | more)


def test_the_test_split_is_never_looked_at(tiny: Dataset) -> None:
    class Untouchable:
        """A split of which only the length is known."""

        def __len__(self) -> int:
            return 60

        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"test.{name} was read")

    want = timeless(probe(settings(), tiny, (1, 2)))
    poisoned = Split(255 - tiny.test.images, (tiny.test.labels + 1) % 3, tiny.test.site * 0)
    assert timeless(probe(settings(), replace(tiny, test=poisoned), (1, 2))) == want
    assert timeless(probe(settings(), replace(tiny, test=Untouchable()), (1, 2))) == want
    dirichlet = settings(partition="dirichlet", alpha=1)
    one = probe(dirichlet, tiny, (1,))
    assert timeless(probe(dirichlet, replace(tiny, test=poisoned), (1,))) == timeless(one)


def test_the_seed_decides_and_the_validation_images_matter(tiny: Dataset) -> None:
    one, again = (probe(settings(seed=1), tiny, (2, 1)) for _ in range(2))
    assert timeless(one) == timeless(again)
    assert [b.ipc for b in one.budgets] == [1, 2]
    assert [b.random.images for b in one.budgets] == [3, 6]
    assert one.whole.images == len(tiny.train) == 120
    assert one.budgets[1].share == 6 / 120
    assert probe(settings(seed=2), tiny, (1, 2)).whole != one.whole
    other = replace(tiny, val=Split(tiny.val.images, (tiny.val.labels + 1) % 3, tiny.val.site))
    assert probe(settings(seed=1), other, (1, 2)).whole != one.whole


def test_the_learning_rate_is_chosen_on_a_draw_that_is_not_scored(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def made_up(config, task, model, material, val, rate, n):
        trained.append((len(material), rate, n))
        return (0.9 if rate == 0.01 else 0.5, 0.5) if n == 0 else (0.1 * n, 0.6)

    monkeypatch.setattr(probe_module, "_train_and_score", made_up)
    told = []
    found = probe(settings(), tiny, (1,), on_progress=lambda *event: told.append(event))
    assert found.budgets[0].random == Measured(3, 0.01, Spread(pytest.approx(0.15), pytest.approx(0.0707, abs=1e-4), 2),
                                               Spread(0.6, 0.0, 2))  # fmt: skip
    assert trained == [(n, rate, 0) for n in (3, 48) for rate in (0.003, 0.01)] + [
        (n, 0.01, draw) for n in (3, 48) for draw in (1, 2)
    ]  # of all data 3 steps of 16 images
    assert told == [(n, 8) for n in range(1, 9)]


def test_subsets_tell_a_little_and_all_data_more() -> None:
    """Phantoms are learnable: the cheap protocol must see it."""
    data = from_tensors(*bars(160), class_names=("left", "right"), modality="generic")
    found = probe(settings(eval_steps=30, width=8), data, (1, 20))
    assert found.validation == "train"
    assert found.validation_images == (16, 16)
    assert found.whole.images == 128
    assert found.whole.balanced_accuracy.mean > 0.9
    assert found.whole.auc.mean > 0.95


def bars(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright left or right half."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = torch.randint(0, 120, (n, 16, 16), generator=rng)
    for i, label in enumerate(labels.tolist()):
        images[i, :, 8 * label : 8 * label + 8] += 100
    return images.to(torch.uint8), labels


def test_a_validation_split_that_tells_nothing_is_replaced(tiny: Dataset) -> None:
    only = torch.nonzero(tiny.val.labels == 1).flatten()
    found = probe(settings(), replace(tiny, val=tiny.val.take(only)), (1,))
    assert found.validation == "train"
    assert all(found.validation_images)
    assert sum(found.validation_images) + found.whole.images == 120
    assert sum(found.train) == 120
    assert "no-validation" in codes(found)


def test_data_that_cannot_be_validated_are_refused() -> None:
    images, labels = bars(2)
    with pytest.raises(FedistillError, match="add a validation split"):
        probe(settings(), from_tensors(images, labels, class_names=None, modality="generic"), (1,))


@pytest.mark.parametrize(
    ("ipcs", "sentence"),
    [
        ((), "is no list"),
        ((0, 1), "ipc=0,1 is no list"),
        ((41,), "ipc=41 asks for more images than phantom has: use ipc=40"),
    ],
)
def test_budgets_that_make_no_sense(tiny: Dataset, ipcs: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        probe(settings(), tiny, ipcs)


def test_one_draw_has_no_deviation(tiny: Dataset) -> None:
    with pytest.raises(FedistillError, match="eval_nets=1 is too small"):
        probe(settings(eval_nets=1), tiny, (1,))


def test_prediction_comes_from_the_stored_predictor(tiny: Dataset) -> None:
    assert probe(settings(), tiny, (1,)).budgets[0].predicted is None
    save_predictor(fitted())
    found = probe(settings(), tiny, (1,))
    [budget] = found.budgets
    assert budget.predicted is not None
    assert budget.predicted.mean == pytest.approx(budget.random.balanced_accuracy.mean + 0.1)
    assert budget.predicted.high - budget.predicted.low >= 0.06
    assert budget.method == "dm"
    assert found.recommended_ipc == 1
    assert json.loads(json.dumps(found.to_dict()))["budgets"][0]["predicted"]["mean"] == budget.predicted.mean
    other = probe(settings(eval_models="mlp"), tiny, (1,))
    assert other.budgets[0].predicted is None
    assert codes(other).count("other-predictor") == 1
    save_predictor(fitted(methods=("datm",)))
    assert "other-predictor" in codes(probe(settings(), tiny, (1,)))


def budget(ipc: int, random: float, predicted: float | None = None, *, std: float = 0.0, half: float = 0.01) -> Budget:
    measured = Measured(ipc, 0.01, Spread(random, std, 4), Spread(random, std, 4))
    expected = None if predicted is None else Prediction(predicted, predicted - half, predicted + half)
    return Budget(ipc, ipc / 1000, measured, "dm", expected)


def test_the_smallest_budget_that_is_as_good_is_recommended() -> None:
    assert recommend([budget(1, 0.5), budget(10, 0.6)]) is None
    assert recommend([budget(1, 0.5, 0.70), budget(5, 0.6, 0.79), budget(10, 0.7, 0.80)]) == 5
    assert recommend([budget(1, 0.5, 0.70), budget(5, 0.6, 0.77), budget(10, 0.7, 0.80)]) == 10
    noisy = [budget(1, 0.5, 0.70, std=0.2), budget(5, 0.6, 0.77, std=0.2), budget(10, 0.7, 0.80, std=0.2)]
    assert recommend(noisy) == 1  # the standard error of a difference is .14


def made(**more: object) -> Probe:
    """A probe that has nothing to warn of."""
    values = {
        "data": "made",
        "modality": "generic",
        "class_names": ("cyst", "mass"),
        "train": (500, 500),
        "validation": "val",
        "validation_images": (50, 50),
        "model": "convnet",
        "seed": 0,
        "whole": Measured(1000, 0.01, Spread(0.9, 0.0, 2), Spread(0.9, 0.0, 2)),
        "budgets": (budget(1, 0.6, 0.7), budget(10, 0.7, 0.8)),
        "left_out": (),
        "recommended_ipc": 10,
        "predictor": fitted(),
        "sites": (),
        "warnings": (),
        "seconds": 0.0,
    }
    return Probe(**values | more)


def codes(found: Probe) -> list[str]:
    return [caution.code for caution in found.warnings]


def test_nothing_to_warn_of() -> None:
    assert list(cautions_of(made())) == []


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        ({"left_out": (20, 50)}, "budget-left-out", "IPC 20 and 50 left out: there are only 1000 training images."),
        ({"train": (500, 60), "budgets": (budget(70, 0.7, 0.8),)}, "few-images", "largest budget of IPC 70: mass (60)."),
        ({"train": (900, 80)}, "imbalance", "(cyst 900, mass 80 training images)"),
        ({"budgets": (budget(251, 0.6, 0.7),)}, "large-budget", "At IPC 251 the budget is more than a quarter"),
        ({"validation": "train"}, "no-validation", "so 100 training images were set aside"),
        ({"class_names": ("cyst", "scar", "mass"), "train": (500,) * 3, "validation_images": (50, 50, 0)},
         "class-not-validated", "not part of any score here: mass."),
        ({"budgets": (budget(1, 0.89, 0.95),)}, "nothing-to-win", "already reach 0.890, within 1.0 points of all data"),
        ({"budgets": (budget(1, 0.93, 0.96),)}, "nothing-to-win", "3.0 points above all data"),
        ({"budgets": (budget(1, 0.8, 0.95, std=0.3),)}, "nothing-to-win", "within 10.0 points"),
        ({"whole": Measured(1000, 0.01, Spread(0.54, 0.0, 2), Spread(0.5, 0.0, 2))}, "near-chance", "where chance is 0.500"),
        ({"budgets": (budget(1, 0.6, 0.7, half=0.2),)}, "gain-in-doubt", "At IPC 1 the predicted gain"),
        ({"budgets": (budget(1, 0.6, 0.7), budget(2, 0.6))}, "other-predictor", "No prediction at IPC 2"),
        ({"budgets": (replace(budget(1, 0.6, 0.7), extrapolated=("share",)),)}, "extrapolates", "benchmark (share)"),
    ],
)  # fmt: skip
def test_each_warning_has_its_cause(change: dict[str, object], code: str, sentence: str) -> None:
    found = {caution.code: caution.sentence for caution in cautions_of(made(**change))}
    assert sentence in found.pop(code)
    assert not found


def lacking(data: Dataset, keep: Callable[[Split], torch.Tensor]) -> Dataset:
    """Without the training images that `keep` is false for."""
    return replace(data, train=data.train.take(torch.nonzero(keep(data.train)).flatten()))


def test_real_data_provoke_them_too(tiny: Dataset) -> None:
    few = lacking(tiny, lambda train: (train.labels != 2) | (torch.cumsum(train.labels == 2, 0) <= 3))
    few = replace(few, val=few.val.take(torch.nonzero(few.val.labels != 2).flatten()))
    found = probe(settings(), few, (1, 5, 40))
    assert {"budget-left-out", "few-images", "imbalance", "class-not-validated"} <= set(codes(found))
    assert found.budgets[-1].random.images == 5 + 5 + 3
    assert found.left_out == (40,)


def test_sites_that_lack_a_class(tiny: Dataset) -> None:
    data = lacking(tiny, lambda train: (train.site != 1) | (train.labels != 2))
    found = probe(settings(), data, (1,))
    assert [site.name for site in found.sites] == ["north", "harbour", "valley"]
    assert [site.missing for site in found.sites] == [(), ("spiculated mass",), ()]
    assert sum(site.images for site in found.sites) == len(data.train)
    north = torch.bincount(data.train.labels[data.train.site == 0], minlength=3)
    assert found.sites[0].smallest == north.min()
    assert found.sites[0].smallest_class == data.class_names[north.argmin()]
    assert codes(found).count("class-missing-at-site") == 1
    one = replace(data, site_names=("all",))
    assert probe(settings(), one, (1,)).sites == ()
    assert len(probe(settings(partition="iid", sites=4), one, (1,)).sites) == 4


def test_more_processes_give_the_same(tiny: Dataset) -> None:
    one, two = (timeless(probe(settings(workers=n), tiny, (1,))) for n in (1, 2))
    assert one == two
