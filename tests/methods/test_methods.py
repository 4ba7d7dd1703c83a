"""The peers of trajectory matching against slow and obvious versions of themselves."""

from __future__ import annotations

import cmath
import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.experts.train import Task
from fedistill.matching.distil import distil, start
from fedistill.matching.problem import Bundle, Real, formation_of, images_per_class, prepare
from fedistill.methods import distribution, gradient
from fedistill.methods.registry import METHODS, method_of
from fedistill.methods.selection import farthest, nearest_mean
from fedistill.models.loss import targets_of
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.site.feasible import check_settings


def weights(labels: list[int]) -> torch.Tensor:
    one_hot = F.one_hot(torch.tensor(labels)).float()
    return one_hot / one_hot.sum(0)


def test_means_is_the_squared_distance_of_class_means() -> None:
    real, made = torch.randn((4, 5)), torch.randn((2, 5))
    found = distribution.means(real, weights([0, 0, 1, 1]), made, weights([0, 1]), generator(0))
    want = (real[:2].mean(0) - made[0]).square().sum() + (real[2:].mean(0) - made[1]).square().sum()
    assert float(found) == pytest.approx(float(want), rel=1e-5)


def test_characteristic_is_the_distance_of_complex_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "FREQUENCIES", 7)
    real, made = torch.randn((5, 3)).double(), torch.randn((4, 3)).double()
    found = distribution.characteristic(
        real, weights([0, 0, 0, 1, 1]).double(), made, weights([0, 0, 1, 1]).double(), generator(3)
    )
    t = torch.randn((3, 7), generator=generator(3)).double()
    want = 0.0
    for a, b in ((real[:3], made[:2]), (real[3:], made[2:])):
        for j in range(7):
            phi = [
                sum(cmath.exp(1j * float(F.normalize(x, dim=0) @ t[:, j])) for x in part) / len(part) for part in (a, b)
            ]
            cross = (phi[0] * phi[1].conjugate()).real
            square = 0.5 * (abs(phi[0]) - abs(phi[1])) ** 2 + abs(phi[0]) * abs(phi[1]) - cross
            want += max(square, 0) ** 0.5 / 7
    assert float(found) == pytest.approx(want, rel=1e-4)


def test_characteristic_tells_distributions_with_one_mean_apart() -> None:
    """Mean features cannot: that is what characteristic functions are for."""
    wide, narrow = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    both = weights([0, 0])
    assert float(distribution.means(wide, both, narrow, both, generator(0))) == pytest.approx(0)
    assert float(distribution.characteristic(wide, both, narrow, both, generator(0))) > 0.05


def test_gradient_distance_is_one_minus_cosine_of_every_row() -> None:
    shapes = (torch.Size((4, 2, 3, 3)), torch.Size((4,)), torch.Size((2, 5)))
    a, b = torch.randn((2, 72 + 4 + 10))
    want = 0.0
    for lo, hi, rows in ((0, 72, 4), (76, 86, 2)):
        cosine = F.cosine_similarity(a[lo:hi].view(rows, -1), b[lo:hi].view(rows, -1))
        want += float((1 - cosine).sum())
    assert float(gradient.distance(a, b, shapes)) == pytest.approx(want, rel=1e-4)
    assert float(gradient.distance(3 * a, a, shapes)) == pytest.approx(0, abs=1e-4)


def test_herding_follows_the_mean_and_k_centre_the_border() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [10.0]])  # mean 3.33
    assert nearest_mean(line, 2) == [3, 4]
    assert farthest(line, 3) == [3, 5, 0]


def test_selection_never_takes_an_image_twice() -> None:
    same = torch.zeros((4, 2))
    assert sorted(nearest_mean(same, 4)) == [0, 1, 2, 3]
    assert sorted(farthest(same, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["dc", "dsa", "dm", "cf"])
def test_methods_that_read_images_lower_their_own_loss(name: str, tiny: Dataset) -> None:
    config = make_config(
        {
            "method": name,
            "iterations": 40,
            "ipc": 2,
            "width": 8,
            "preset": "quick",
            "augment": "none",
            "expert_steps": 50,
        }
    ).resolved()
    task, method = task_of(tiny), method_of(config)
    net = task.network("convnet", config)
    bundle = Bundle(
        task, tuple(torch.stack([net.initial(generator(e, t)) for t in range(6)]) for e in range(2)), (9,) * 3
    )
    real = Real(tiny.train.images, targets_of(tiny.train.labels, 3, "multiclass"), task)
    matching = prepare(config, method, bundle, real=real)
    state = start(matching, "here")
    before = state.images.clone()
    distil(matching, state, until=float("inf"))
    assert len(state.losses) == 40
    assert sum(state.losses[-10:]) < 0.9 * sum(state.losses[:10])
    assert (state.images - before).abs().mean() > 0.01


@pytest.mark.parametrize("settings", [{"mask": "prune"}, {"overlap": "on"}])
def test_parts_of_trajectory_matching_are_refused_elsewhere(settings: dict[str, str]) -> None:
    with pytest.raises(FedistillError, match="belong to trajectory matching"):
        method_of(make_config({"method": "dm", **settings}))


def test_images_that_are_taken_are_not_kept_smaller() -> None:
    with pytest.raises(
        FedistillError, match="formation=2 is for images that are made, and method=herding takes real ones"
    ):
        method_of(make_config({"method": "herding", "formation": 2}))


def test_a_formation_must_divide_the_images(tiny: Dataset) -> None:
    check_settings(make_config({"formation": 4}).resolved(), task_of(tiny))
    with pytest.raises(FedistillError, match="formation=3 does not divide images of 16 x 16 pixels"):
        check_settings(make_config({"formation": 3}).resolved(), task_of(tiny))


@pytest.mark.parametrize(
    ("method", "formation", "geometry", "want"),
    [
        ("dm", 0, (1, 28, 28), 2), ("dm", 0, (3, 64, 64), 2), ("dm", 0, (1, 16, 16), 1), ("dm", 0, (1, 29, 29), 1),
        ("cf", 0, (1, 28, 28), 1), ("dm", 0, (1, 28, 28, 28), 1), ("dm", 1, (1, 28, 28), 1), ("mtt", 2, (1, 16, 16), 2),
        ("cf", 3, (1, 30, 30), 3),
    ],
)  # fmt: skip
def test_only_what_was_measured_is_kept_smaller_unasked(
    method: str, formation: int, geometry: tuple[int, ...], want: int
) -> None:
    config = make_config({"method": method, "formation": formation, "ipc": 5})
    task = Task(geometry, ("a", "b"), "generic")
    assert formation_of(config, task) == want
    assert images_per_class(config, task) == 5 * want ** (len(geometry) - 1)
    if not formation:  # whose budget is not cut to what a class has
        assert formation_of(config, dataclasses.replace(task, kind="multilabel")) == 1


def test_every_method_either_steps_or_selects() -> None:
    for method in METHODS.values():
        assert (method.step is None) != (method.select is None)
    reading = {name for name, method in METHODS.items() if method.sees_images}
    assert reading == {"dc", "dsa", "dm", "cf", "random", "random-soft", "k-centre", "herding"}
