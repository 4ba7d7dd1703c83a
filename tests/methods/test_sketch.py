"""Sketches: what one record can change, what they stand for, and sets that are fitted to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedistill.config import Config, make_config
from fedistill.data.public import normalise
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.evaluation.fit import Material, fit, predict
from fedistill.evaluation.metrics import score
from fedistill.experts.train import Task
from fedistill.matching.distil import distil, start
from fedistill.matching.problem import Bundle, Matching, prepare
from fedistill.matching.state import State
from fedistill.methods import sketch
from fedistill.methods.registry import method_of
from fedistill.methods.sketch import COUNT_WEIGHT, NORM, Sketched, embedding_of
from fedistill.models.loss import targets_of
from fedistill.seeding import generator

N = 40


def settings(**more: object) -> Config:
    few = {
        "method": "sketch", "width": 8, "ipc": 2, "iterations": 30, "sketch_networks": 3, "sketch_frequencies": 32,
        "sketch_augmentations": 3, "preset": "quick",
    }  # fmt: skip
    return make_config(few | more).resolved()


def random(
    kind: str = "multiclass", geometry: tuple[int, ...] = (1, 16, 16), seed: int = 0
) -> tuple[Task, Tensor, Tensor]:
    rng = generator(seed, "sketch test")
    images = torch.randint(256, (N, *geometry), generator=rng, dtype=torch.uint8)
    labels = torch.randint(2, (N, 3), generator=rng) if kind == "multilabel" else torch.randint(3, (N,), generator=rng)
    return Task(geometry, ("a", "b", "c"), "generic", kind), images, targets_of(labels, 3, kind)


def sketched(config: Config, task: Task, images: Tensor, targets: Tensor, records: Records | None = None) -> Tensor:
    return sketch.sketch(config, task, images, targets, records or Records.of_images(len(images)))


KINDS = ["multiclass", "ordinal", "multilabel"]


@pytest.mark.parametrize("geometry", [(1, 16, 16), (3, 16, 16), (1, 8, 8, 8)])
def test_every_image_has_an_embedding_of_length_one(geometry: tuple[int, ...]) -> None:
    task, images, _ = random(geometry=geometry)
    public = embedding_of(settings(), task)
    for r in range(public.networks):
        length = public.of(r, normalise(images, "generic")).norm(dim=1)
        assert torch.allclose(length, torch.ones(N), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_changes_a_sketch_by_no_more_than_its_norm(kind: str) -> None:
    config, (task, images, targets) = settings(), random(kind)
    whole = sketched(config, task, images, targets)
    for i in range(0, N, 7):
        rest = torch.arange(N) != i
        change = whole - sketched(config, task, images[rest], targets[rest])
        assert 0.5 * NORM < change.norm() <= NORM * (1 + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_reached_and_not_passed(kind: str) -> None:
    """One version of an image has length 1: to the last bit no more, or the noise would be too little."""
    config, (task, images, targets) = settings(sketch_augmentations=1), random(kind)
    lengths = torch.stack([sketched(config, task, images[i : i + 1], targets[i : i + 1]).norm() for i in range(12)])
    assert lengths.max() <= NORM * (1 + 1e-12)
    assert lengths.max() > NORM * (1 - 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_with_many_images_counts_as_one(kind: str) -> None:
    """Images of several classes, all of one patient, in a set of other patients."""
    config, (task, images, targets) = settings(), random(kind)
    patient = torch.cat([torch.full((30,), 99), torch.arange(10)])
    whole = sketched(config, task, images, targets, Records.of_patients(patient))
    change = whole - sketched(config, task, images[30:], targets[30:])
    assert change.norm() <= NORM
    if kind != "multilabel":
        assert float(whole[:, -1].sum()) == pytest.approx(11 * COUNT_WEIGHT)
    same = sketched(config, task, images[:1].expand(30, -1, -1, -1), targets[:1].expand(30, -1),
                    Records.of_patients(torch.zeros(30)))  # fmt: skip
    assert torch.allclose(same, sketched(config, task, images[:1], targets[:1]), atol=1e-6)


def test_what_overflows_for_one_image_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN would be in the sums of every class, and no noise hides it."""
    config, (task, images, targets) = settings(), random()
    public, x = embedding_of(config, task), normalise(images, "generic")
    phases = torch.cat([
        (public.net.features(t, x) - c) / s @ f
        for t, c, s, f in zip(public.thetas, public.centres, public.spreads, public.frequencies, strict=True)
    ], 1)  # fmt: skip
    largest = phases.abs().amax(1)
    wild = replace(public, frequencies=public.frequencies * (torch.finfo(torch.float32).max / largest.median()))
    assert 0 < (wild.of(0, x).isnan().any(1) | wild.of(1, x).isnan().any(1) | wild.of(2, x).isnan().any(1)).sum() < N
    monkeypatch.setattr(sketch, "embedding_of", lambda *_: wild)
    whole = sketched(config, task, images, targets)
    assert whole.isfinite().all()
    for i in range(0, N, 7):
        rest = torch.arange(N) != i
        assert (whole - sketched(config, task, images[rest], targets[rest])).norm() <= NORM * (1 + 1e-7)


def test_frequencies_have_a_limit() -> None:
    with pytest.raises(FedistillError, match=r"sketch_scale=1e\+38 is too large"):
        settings(sketch_scale=1e38)


def test_sums_of_many_images_round_to_less_than_one_of_them() -> None:
    """Rounding of large sums in float32 would add to the sensitivity."""
    config, (task, images, targets) = settings(sketch_augmentations=1), random()
    assert sketched(config, task, images, targets).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_of_sites_add_up(kind: str) -> None:
    config, (task, images, targets) = settings(), random(kind)
    parts = [sketched(config, task, images[p], targets[p]) for p in (slice(0, 13), slice(13, N))]
    assert torch.allclose(sum(parts), sketched(config, task, images, targets), atol=1e-5)


def test_the_embedding_is_the_same_at_every_site() -> None:
    """It depends on the seed and on what is public of the task, on no image and no count."""
    a, b = (embedding_of(settings(), random(seed=s)[0]) for s in (0, 1))
    for name in ("frequencies", "centres", "spreads"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert all(torch.equal(x, y) for x, y in zip(a.thetas, b.thetas, strict=True))
    other = embedding_of(settings(seed=1), random()[0])
    assert not torch.equal(a.frequencies, other.frequencies)


def test_a_sketch_is_the_mean_characteristic_function() -> None:
    """Against cosines and sines one by one."""
    config, (task, images, targets) = settings(sketch_augmentations=1, sketch_networks=2), random()
    known, public = Sketched.of(config, task, sketched(config, task, images, targets)), embedding_of(config, task)
    net, x = task.network("convnet", config), normalise(images, "generic")
    for r in range(2):
        f = (net.features(public.thetas[r], x) - public.centres[r]) / public.spreads[r]
        for c in range(3):
            mine = f[targets.argmax(1) == c]
            for j in (0, 5):
                phase = mine @ public.frequencies[r][:, j]
                assert float(known.means[r, c, j]) == pytest.approx(float(phase.cos().mean()) / 32**0.5, abs=1e-4)
                assert float(known.means[r, c, 32 + j]) == pytest.approx(float(phase.sin().mean()) / 32**0.5, abs=1e-4)


def prepared(config: Config, task: Task, sums: Tensor, targets: Tensor) -> Matching:
    findings = tuple((tuple(int(v) for v in row), 9) for row in targets.unique(dim=0).tolist())
    bundle = Bundle(task, (), (20, 20, 20), findings=findings if task.kind == "multilabel" else (), sketch=sums)
    return prepare(config, method_of(config), bundle)


def loss_at(matching: Matching, state: State, images: Tensor) -> tuple[float, Tensor]:
    """What one `step` would see at `images`, and the gradient that it would smooth and follow."""
    caught: list[Tensor] = []
    at = replace(state, images=images.clone(), rng=torch.Generator().manual_seed(4), losses=[])
    before = sketch.adam, sketch.smooth
    sketch.adam, sketch.smooth = (lambda m, s, gradient: caught.append(gradient)), (lambda gradient: gradient)
    try:
        sketch.step(matching, at)
    finally:
        sketch.adam, sketch.smooth = before
    return at.losses[-1], caught[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_images_themselves_have_no_loss(kind: str) -> None:
    config, (task, images, targets) = settings(sketch_augmentations=1, augment="none"), random(kind)
    matching = prepared(config, task, sketched(config, task, images, targets), targets)
    state = start(matching, "here")
    state.targets = targets
    found, _ = loss_at(matching, state, normalise(images, "generic"))
    other, _ = loss_at(matching, state, torch.randn(images.shape))
    if kind == "multilabel":  # an image of several findings is shared between them in a sketch, and counts fully here
        assert found < 0.1 * other
    else:
        assert found < 1e-8 < other


def test_the_gradient_is_that_of_finite_differences() -> None:
    config, (task, images, targets) = settings(sketch_augmentations=1), random()
    matching = prepared(config, task, sketched(config, task, images, targets), targets)
    state = start(matching, "here")
    _, gradient = loss_at(matching, state, state.images)
    direction = torch.nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient)
    h = 3e-2
    up, down = (loss_at(matching, state, state.images + s * h * direction)[0] for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("geometry", [(1, 16, 16), (1, 8, 16, 16)])
def test_distillation_lowers_the_loss(kind: str, geometry: tuple[int, ...]) -> None:
    config, (task, images, targets) = settings(iterations=60, augment="none"), random(kind, geometry)
    matching = prepared(config, task, sketched(config, task, images, targets), targets)
    state = start(matching, "here")
    distil(matching, state, until=float("inf"))
    assert len(state.losses) == 60
    assert sum(state.losses[-10:]) < 0.6 * sum(state.losses[:10])


def test_a_class_that_nobody_has_is_left_out() -> None:
    config, (task, images, targets) = settings(), random()
    keep = targets.argmax(1) != 1
    sums = sketched(config, task, images[keep], targets[keep])
    known = Sketched.of(config, task, sums)
    assert known.there.tolist() == [True, False, True]
    matching = prepared(config, task, sums, targets)
    state = start(matching, "here")
    before = state.images.clone()
    distil(matching, state, until=float("inf"))
    moved = (state.images - before).flatten(1).norm(dim=1) > 0
    assert moved.tolist() == (state.targets.argmax(1) != 1).tolist()


def test_without_a_sketch_nothing_is_made() -> None:
    task = random()[0]
    with pytest.raises(FedistillError, match="needs a sketch of the site's images"):
        prepare(settings(), method_of(settings()), Bundle(task, (), (3, 3, 3)))


def patterns(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A faint pattern per class under noise."""
    templates = torch.randn((3, 1, 4, 4), generator=generator(0, "templates"))
    templates = torch.nn.functional.interpolate(templates, size=(16, 16), mode="bilinear")
    labels = torch.arange(n) % 3
    images = 0.5 + 0.15 * templates[labels] + 0.25 * torch.randn((n, 1, 16, 16), generator=generator(seed, "noise"))
    return (images.clamp(0, 1) * 255).to(torch.uint8), labels


def test_the_set_teaches_what_noise_does_not() -> None:
    config = settings(ipc=3, iterations=120, eval_steps=60, augment="none")
    task, (images, labels), (unseen, answers) = random()[0], patterns(300, 0), patterns(150, 1)
    targets = targets_of(labels, 3, "multiclass")
    matching = prepared(config, task, sketched(config, task, images, targets), targets)
    state = start(matching, "here")

    def auc(images: Tensor) -> float:
        theta = fit(config, task, "convnet", Material(images, state.targets), lr=0.02, seed=0)
        return score(predict(task.network("convnet", config), theta, unseen, task), answers)["auc"]

    noise = auc(state.images)
    distil(matching, state, until=float("inf"))
    assert auc(state.images) > max(noise + 0.1, 0.85)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 16, 16, 16)])
def test_smoothing_keeps_what_is_even_and_removes_what_is_not(shape: tuple[int, ...]) -> None:
    assert torch.allclose(sketch.smooth(torch.full(shape, 3.0)), torch.full(shape, 3.0), atol=1e-5)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert sketch.smooth(noise).shape == shape
    assert sketch.smooth(noise).std() < 0.3 * noise.std()
