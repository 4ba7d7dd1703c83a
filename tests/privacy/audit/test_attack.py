"""Scores: they find members where there is a signal, nothing where there is none, and never look at the coin that they guess."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedistill.privacy.audit.attack import nearest, offline, online, scaled
from fedistill.privacy.audit.rates import rates
from fedistill.synthetic.set import SyntheticSet, one_hot

CALIBRATED = pytest.mark.parametrize("calibrate", [online, offline])


def world(effect: float, runs: int = 16, m: int = 80, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a view sees where canaries differ a lot among themselves, and being in the data adds `effect` deviations."""
    rng = torch.Generator().manual_seed(seed)
    inside = torch.rand(runs, m, generator=rng) < 0.5
    own = 5 * torch.randn(m, generator=rng, dtype=torch.float64)
    return own + effect * inside + torch.randn(runs, m, generator=rng, dtype=torch.float64), inside


@CALIBRATED
def test_members_are_found(calibrate) -> None:
    seen, inside = world(effect=2.0)
    found = rates("", calibrate(seen, inside), inside)
    assert 0.85 < found["auc"] < 0.93  # Phi(2 / sqrt(2)) = .921 for who knows both means
    assert rates("", seen, inside)["auc"] < 0.65  # without calibration the canaries' own differences hide it
    assert found["tpr_at_fpr"]["0.01"]["low"] > 0.05


@CALIBRATED
def test_chance_without_a_signal(calibrate) -> None:
    found = []
    for seed in range(20):
        seen, inside = world(effect=0.0, seed=seed)
        found.append(rates("", calibrate(seen, inside), inside))
    assert abs(sum(f["auc"] for f in found) / 20 - 0.5) < 0.02
    assert sum(f["tpr_at_fpr"]["0.01"]["tpr"] for f in found) / 20 < 0.02


@CALIBRATED
def test_the_coin_that_is_guessed_is_not_used(calibrate) -> None:
    seen, inside = world(effect=1.0, runs=5, m=12)
    turned = inside.clone()
    turned[2] = ~turned[2]
    assert torch.equal(calibrate(seen, inside)[2], calibrate(seen, turned)[2])
    assert not torch.equal(calibrate(seen, inside)[1], calibrate(seen, turned)[1])


def test_online_finds_an_effect_of_either_sign() -> None:
    seen, inside = world(effect=-3.0)
    assert rates("", online(seen, inside), inside)["auc"] > 0.9
    assert rates("", offline(seen, inside), inside)["auc"] < 0.2


def test_offline_counts_deviations_from_runs_without_the_canary() -> None:
    seen, inside = world(effect=3.0, runs=64)
    scores = offline(seen, inside)
    assert scores[~inside].mean() == pytest.approx(0, abs=0.1)
    assert scores[~inside].std() == pytest.approx(1, abs=0.1)
    assert scores[inside].mean() == pytest.approx(3.0, abs=0.2)


def test_online_is_the_likelihood_ratio_where_shadows_abound() -> None:
    seen, inside = world(effect=2.0, runs=400, m=6)
    own = torch.stack([seen[~inside[:, i], i].mean() for i in range(6)])
    exact = 2.0 * (seen - own - 1.0)  # log N(x; own + 2, 1) - log N(x; own, 1)
    assert (online(seen, inside) - exact).abs().mean() < 0.3
    assert torch.corrcoef(torch.stack([online(seen, inside).flatten(), exact.flatten()]))[0, 1] > 0.99


@CALIBRATED
@pytest.mark.parametrize("coin", [True, False])
def test_canaries_that_no_shadow_or_every_shadow_has(calibrate, coin: bool) -> None:
    seen, inside = world(effect=2.0, runs=4, m=30)
    inside[:, :10] = coin
    assert torch.isfinite(calibrate(seen, inside)).all()
    assert torch.isfinite(calibrate(seen, torch.full_like(inside, coin))).all()


@CALIBRATED
def test_views_that_never_change_tell_nothing(calibrate) -> None:
    _, inside = world(effect=0.0)
    scores = calibrate(torch.linspace(-4, 4, 80, dtype=torch.float64).expand(16, 80), inside)
    assert abs(rates("", scores[0], inside[0])["auc"] - 0.5) < 0.2
    assert torch.isfinite(scores).all()


def test_confidence_is_the_logit_of_the_probability() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64)
    labels = torch.arange(7) % 4
    p = logits.softmax(1)[torch.arange(7), labels]
    assert torch.allclose(scaled(logits, one_hot(labels, 4), "multiclass"), (p / (1 - p)).log())
    findings = torch.tensor([[1.0, 0, 1, 0]]).expand(7, 4)
    q = torch.where(findings > 0, logits.sigmoid(), 1 - logits.sigmoid())
    assert torch.allclose(scaled(logits, findings, "multilabel"), (q / (1 - q)).log().mean(1))


def test_a_diverged_network_has_no_opinion() -> None:
    assert scaled(torch.full((2, 3), torch.nan), one_hot([0, 1], 3), "multiclass").tolist() == [0, 0]


def test_nearest_image_of_the_same_label() -> None:
    images = torch.randn(3, 1, 6, 6)
    made = SyntheticSet(
        images=torch.cat([images[:2], -images[2:]]),
        labels=one_hot([0, 1, 1], 3),
        site=torch.zeros(3, dtype=torch.int64),
        sites=("a",),
        class_names=("x", "y", "z"),
        mean=0.5,
        std=0.25,
        modality="phantom",
        step_size=(0.1,),
        manifest={"a": {}},
    )
    same = nearest(made, images, torch.tensor([0, 0, 2]))
    assert same["distance"][0] == 0
    assert same["correlation"][0] == pytest.approx(1)
    assert same["distance"][1] == pytest.approx(-float((images[1] - images[0]).square().mean().sqrt()), rel=1e-5)
    assert same["distance"][2] == pytest.approx(  # no image has its label: all are looked at
        -min(float((images[2] - x).square().mean().sqrt()) for x in made.images), rel=1e-5
    )
    assert nearest(made, 3 * images + 1, torch.tensor([0, 1, 1]))["correlation"][:2] == pytest.approx(1)
