"""Less noise in private trajectories, against simulated ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedistill.privacy.denoise import denoise

SIZES, T, EVERY, NOISE = (400, 100, 1500), 12, 10, 0.01
P = sum(SIZES)


def walks(experts: int, drift: Tensor | float = 0.0) -> list[Tensor]:
    """Paths from one start: `drift` per checkpoint, and the noise of `EVERY` steps."""
    start = torch.randn(P)
    noise = NOISE * EVERY**0.5 * torch.randn(experts, T, P)
    return [torch.cat([start[None], start + (drift + n).cumsum(0)]) for n in noise]


def denoised(paths: list[Tensor], how: str = "shrink") -> list[Tensor]:
    return denoise(paths, SIZES, how=how, step_noise=NOISE, every=EVERY)


def test_nothing_is_left_of_pure_noise() -> None:
    for experts in (1, 3):
        paths = walks(experts)
        (path,) = denoised(paths)
        raw = (paths[0][1:] - paths[0][0]).square().sum()
        assert (path[1:] - path[0]).square().sum() < 0.01 * raw
        assert torch.allclose(path[0], paths[0][0], atol=1e-6)


@pytest.mark.parametrize("experts", [1, 4])
def test_the_noise_that_is_left_is_known_exactly(experts: int) -> None:
    """What shrink takes for noise is the measured square of a way that has no signal, at every checkpoint and layer."""
    (average,) = denoised(walks(experts), "average")
    measured = (average - average[0]).square().mean(1)[1:]
    t = torch.arange(1, T + 1)
    for k in t.tolist():
        inside = range(k // 2, k + 1)
        # cov(walk_a, walk_b) = min(a, b): the variance of the mean of some of its points
        wanted = sum(min(a, b) for a in inside for b in inside) / len(inside) ** 2 * EVERY * NOISE**2 / experts
        assert float(measured[k - 1]) == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("experts", [1, 4])
def test_shrink_takes_away_exactly_that_noise(experts: int) -> None:
    """Read off the factor of every layer and checkpoint."""
    paths = walks(experts, NOISE * EVERY**0.5 * torch.randn(P))
    (average,), (shrunk,) = denoised(paths, "average"), denoised(paths)
    for k in range(1, T + 1):
        inside = range(k // 2, k + 1)
        wanted = sum(min(a, b) for a in inside for b in inside) / len(inside) ** 2 * EVERY * NOISE**2 / experts
        for before, after in zip(
            (average[k] - average[0]).split(SIZES), (shrunk[k] - shrunk[0]).split(SIZES), strict=True
        ):
            factor = float(after.double().norm() / before.double().norm())
            square = float(before.double().square().sum())
            assert (1 - factor) * square / len(before) == pytest.approx(wanted, rel=1e-3)


def test_the_noise_of_longer_trajectories_is_all_taken_away_and_no_more() -> None:
    """The expected square of what is left of a known signal: a factor that is too large or too small would show."""
    direction = torch.nn.functional.normalize(torch.randn(P), dim=0)
    drift = 3 * NOISE * EVERY**0.5 * P**0.5 * direction  # three times the noise
    (plain,) = denoised([torch.cat([torch.zeros(1, P), (drift.expand(T, P)).cumsum(0)])], "average")
    (path,) = denoised(walks(1, drift))
    way, wanted = path[-1] - path[0], plain[-1] - plain[0]
    (raw,) = denoised(walks(1, drift), "average")
    share = (way @ wanted) / wanted.square().sum()
    noise = (raw[-1] - raw[0] - wanted).square().sum()
    assert float(share) == pytest.approx(float(wanted.square().sum() / (wanted.square().sum() + noise)), abs=0.05)


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_it_is_nearer_to_the_signal(strength: float) -> None:
    drift = strength * NOISE * EVERY**0.5 * torch.randn(P)
    signal = torch.cat([torch.zeros(1, P), drift.expand(T, P).cumsum(0)])
    averaged = denoised([signal], "average")[0]
    paths = walks(2, drift)
    errors = {how: (denoised(paths, how)[0] - paths[0][0] - averaged).square().sum() for how in ("average", "shrink")}
    raw = (paths[0] - paths[0][0] - signal).square().sum()
    assert errors["average"] < 0.6 * raw
    assert errors["shrink"] < errors["average"]


def test_no_checkpoint_is_the_one_before_while_anything_is_known() -> None:
    """A segment without a length cannot be matched. Early checkpoints are the ones that drown first."""
    drift = torch.zeros(T, P)
    drift[-4:] = 10 * NOISE * EVERY**0.5  # nothing is learned before the end
    for _ in range(20):
        (path,) = denoised(walks(1, drift))
        assert ((path[1:] - path[:-1]).norm(dim=1) > 0).all()
        early = path[1] - path[0]
        assert early.norm() < 0.1 * (path[-1] - path[0]).norm()


def test_none_leaves_everything_as_it_is() -> None:
    paths = walks(3)
    assert all(a is b for a, b in zip(denoised(paths, "none"), paths, strict=True))
