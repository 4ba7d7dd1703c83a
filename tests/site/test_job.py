"""One site's work: slices, resume, the boundary between experts and matching, and what is released."""

from __future__ import annotations

import copy
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.public import normalise
from fedistill.errors import FedistillError
from fedistill.evaluation.fit import Material, fit, of_split, predict
from fedistill.evaluation.metrics import score
from fedistill.files import read_json
from fedistill.matching.distil import distil, start
from fedistill.matching.problem import prepare
from fedistill.methods.registry import METHODS, method_of
from fedistill.models.enlarge import enlarge
from fedistill.models.loss import targets_of
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.site.job import Progress, _Folders, advance, load_bundle, released_set
from fedistill.synthetic.merge import merge
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import quantise


def settings(**more: object) -> Config:
    tiny = {
        "method": "ptm", "experts": 2, "expert_steps": 40, "checkpoint_every": 5, "expert_batch": 8, "expert_lr": 0.05,
        "width": 4, "workers": 1, "ipc": 2, "iterations": 12, "syn_steps": 3, "segment": 2, "image_lr": 5.0,
        "skip_above": 1000.0,
    }  # fmt: skip
    return make_config(tiny | more).resolved()


def finish(
    config: Config, data: Dataset, work: Path, *, seconds: float = 1e9, **more
) -> tuple[SyntheticSet, list[Progress]]:
    slices = []
    while not slices or not slices[-1].done:
        slices.append(advance(config, data, "north", work, seconds=seconds, **more))
        assert len(slices) < 500
    return released_set(config, data, "north", work, round=more.get("round", 1)), slices


def same(a: SyntheticSet, b: SyntheticSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.step_size == b.step_size


def test_a_sketch_with_soft_labels_has_its_experts_after_one_without(tiny: Dataset, tmp_path: Path) -> None:
    """Both share a folder: that there is a sketch does not say that there are experts."""
    hard, _ = finish(settings(method="sketch"), tiny, tmp_path)
    soft, _ = finish(settings(method="sketch", labels="soft"), tiny, tmp_path)
    alone, _ = finish(settings(method="sketch", labels="soft"), tiny, tmp_path / "alone")
    assert same(soft, alone)
    assert not torch.equal(soft.labels, hard.labels)


@pytest.mark.parametrize("method", list(METHODS))
def test_slices_give_the_same_bits_as_one_go(method: str, tiny: Dataset, tmp_path: Path) -> None:
    config = settings(method=method)
    whole, _ = finish(config, tiny, tmp_path / "whole")
    sliced, slices = finish(config, tiny, tmp_path / "sliced", seconds=0.01)
    assert same(whole, sliced)
    assert same(whole, quantise(whole))
    if METHODS[method].step is not None:
        assert len(slices) > 2
        points = [k for s in slices for k, _ in s.curve]
        assert points == sorted(set(points)) == [10]


def test_the_distiller_cannot_see_the_images(tiny: Dataset, tmp_path: Path) -> None:
    """After expert training every image is overwritten: the synthetic set is the same to the last bit."""
    config = settings(method="ptm", labels="soft")
    advance(config, tiny, "north", tmp_path / "a", seconds=0)
    while not list((tmp_path / "a").rglob("facts-*.json")):
        advance(config, tiny, "north", tmp_path / "a", seconds=0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    private = copy.deepcopy(tiny)
    assert private.fingerprint == tiny.fingerprint  # cached: the folder is found by it
    private.train.images.random_(generator=torch.Generator().manual_seed(1))
    private.train.labels.fill_(0)
    assert same(finish(config, tiny, tmp_path / "a")[0], finish(config, private, tmp_path / "b")[0])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.sees_images])
def test_methods_that_read_real_images_say_so(method: str, tiny: Dataset, tmp_path: Path) -> None:
    """The other side of the test above: without the images these methods cannot even begin."""
    config = settings(method=method)
    while not list(tmp_path.rglob("facts-*.json")):
        advance(config, tiny, "north", tmp_path, seconds=0)
    bundle = load_bundle(config, task_of(tiny), _Folders.of(config, tiny, "north", tmp_path, ""))
    matching = prepare(config, method_of(config), bundle)
    with pytest.raises(FedistillError, match="has no access to them"):
        distil(matching, start(matching, "north"), until=float("inf"))


def test_real_initialisation_does_see_them(tiny: Dataset, tmp_path: Path) -> None:
    """The test above can fail: with init=real, the same overwriting changes the set."""
    config = settings(init="real")
    while not list(tmp_path.rglob("facts-*.json")):
        advance(config, tiny, "north", tmp_path / "a", seconds=0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    private = copy.deepcopy(tiny)
    assert private.fingerprint == tiny.fingerprint
    private.train.images.random_(generator=torch.Generator().manual_seed(1))
    assert not same(finish(config, tiny, tmp_path / "a")[0], finish(config, private, tmp_path / "b")[0])


def test_noise_initialisation_releases_no_real_image(tiny: Dataset, tmp_path: Path) -> None:
    made, _ = finish(settings(), tiny, tmp_path)
    real = tiny.train.images.float().flatten(1) / 255
    distance = torch.cdist(made.pixels.flatten(1), real).min()
    between = torch.cdist(real, real).fill_diagonal_(9e9).min()
    assert distance > between


def test_methods_share_the_experts(tiny: Dataset, tmp_path: Path) -> None:
    finish(settings(), tiny, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("expert-*.safetensors")}
    finish(settings(method="mtt", ipc=1), tiny, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("expert-*.safetensors")} == before


def test_a_finished_job_answers_at_once_and_again(tiny: Dataset, tmp_path: Path) -> None:
    made, slices = finish(settings(), tiny, tmp_path)
    assert advance(settings(), tiny, "north", tmp_path, seconds=0) == slices[-1]
    assert same(made, released_set(settings(), tiny, "north", tmp_path))


def test_the_budget_of_a_rare_class_is_cut_and_said(tiny: Dataset, tmp_path: Path) -> None:
    keep = torch.cat([torch.nonzero(tiny.train.labels == c).flatten()[:n] for c, n in ((0, 30), (1, 1), (2, 0))])
    nothing = torch.empty(0, dtype=torch.int64)
    rare = tiny.at({"train": keep, "val": nothing, "test": nothing}, "rare")
    made, slices = finish(settings(), rare, tmp_path)
    assert torch.bincount(made.hard_labels, minlength=3).tolist() == [2, 1, 0]
    assert len(slices[-1].notes) == 2
    assert "1 real image, so 1 synthetic" in slices[-1].notes[0]
    assert "no image at this site" in slices[-1].notes[1]


def test_a_site_with_one_class_can_take_part(tiny: Dataset, tmp_path: Path) -> None:
    keep = torch.nonzero(tiny.train.labels == 1).flatten()
    nothing = torch.empty(0, dtype=torch.int64)
    made, _ = finish(settings(), tiny.at({"train": keep, "val": nothing, "test": nothing}, "one"), tmp_path)
    assert made.hard_labels.unique().tolist() == [1]
    assert torch.isfinite(made.images).all()


@pytest.mark.parametrize("method", ["ptm", "cf"])
def test_a_second_round_goes_on_and_depends_on_what_the_others_teach(
    method: str, tiny: Dataset, tmp_path: Path
) -> None:
    config = settings(rounds=2, method=method)
    first, _ = finish(config, tiny, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def second(images: torch.Tensor, work: Path) -> SyntheticSet:
        other = SyntheticSet(**{**first.__dict__, "images": images, "sites": ("south",), "manifest": {"south": {}}})
        return finish(config, tiny, work, round=2, context=merge([first, other]))[0]

    one = second(first.images, tmp_path / "one")
    two = second(first.images.flip(0), tmp_path / "two")
    assert not same(first, one)
    assert not same(one, two)


def test_experts_of_a_later_round_know_the_classes_that_only_others_have(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(rounds=2, method="cf", width=8, expert_steps=200, expert_lr=0.1)
    task, labels = task_of(tiny), tiny.train.labels
    mine, theirs = (torch.nonzero(labels == c).flatten() for c in (1, 0))
    here = tiny.at({"train": mine, "val": mine[:0], "test": mine[:0]}, "one class")
    own, _ = finish(config, here, tmp_path)
    absent = normalise(tiny.train.images[theirs], tiny.modality)
    taught = SyntheticSet(
        **{**own.__dict__, "images": absent, "labels": targets_of(labels[theirs], task.classes, task.kind),
           "site": torch.zeros(len(theirs), dtype=torch.int64), "sites": ("south",), "manifest": {"south": {}}}
    )  # fmt: skip
    finish(config, here, tmp_path, round=2, context=merge([own, taught]))
    folders, net = _Folders.of(config, here, "north", tmp_path, ""), task.network("convnet", config)
    right = [
        [(net(path[-1], absent).argmax(1) == 0).float().mean() for path in folders.trajectories(config, *where)]
        for where in ((), (folders.met(2),))
    ]
    assert max(right[0]) < 0.1
    assert min(right[1]) > 0.4


def test_a_site_that_is_alone_goes_on_with_the_experts_that_it_has(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(rounds=2, method="cf")
    first, _ = finish(config, tiny, tmp_path)
    second, _ = finish(config, tiny, tmp_path, round=2, context=merge([first]))
    assert not same(first, second)
    assert not _Folders.of(config, tiny, "north", tmp_path, "").met(2).exists()


def test_all_skipped_iterations_are_an_error_not_a_result(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="12 of 12 iterations"):
        finish(settings(skip_above=1e-6), tiny, tmp_path)


@pytest.mark.parametrize(
    ("method", "name"), [("dm", "pixel_lr"), ("dsa", "pixel_lr"), ("sketch", "pixel_lr"), ("mtt", "image_lr")]
)
def test_images_that_diverge_are_said_at_the_end_of_their_slice(
    method: str, name: str, tiny: Dataset, tmp_path: Path
) -> None:
    config = settings(method=method, skip_above=1e30, iterations=200, **{name: 1e38})
    with pytest.raises(FedistillError, match=rf"diverged within \d\d? iterations: lower {name}=1e\+38") as caught:
        finish(config, tiny, tmp_path, seconds=0)  # slices of one iteration
    assert caught.value.code == "diverged"


def test_the_step_size_stays_positive_whatever_its_learning_rate(tiny: Dataset, tmp_path: Path) -> None:
    made, _ = finish(settings(step_lr=1e6, skip_above=1e9), tiny, tmp_path)
    assert 0 < made.step_size[0] <= 0.5


def test_a_segment_longer_than_the_trajectory_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="segment=8 needs more checkpoints"):
        finish(settings(segment=8, expert_steps=20), tiny, tmp_path)


@pytest.mark.parametrize("method", ["ptm", "datm", "line", "cf", "herding"])
def test_a_pool_of_two_architectures_works_with_every_kind_of_method(
    method: str, tiny: Dataset, tmp_path: Path
) -> None:
    made, slices = finish(settings(method=method, model="convnet,mlp"), tiny, tmp_path)
    assert torch.isfinite(made.images).all()
    assert slices[-1].skipped == 0
    assert not same(made, finish(settings(method=method), tiny, tmp_path)[0])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.step is not None])
def test_every_method_makes_images_that_are_kept_smaller(name: str, tiny: Dataset, tmp_path: Path) -> None:
    """Four in a place, no more than there are real ones, enlarged exactly; and they are matched as they are shown."""
    keep = torch.cat([torch.nonzero(tiny.train.labels == c).flatten()[:n] for c, n in ((0, 30), (1, 5), (2, 30))])
    nothing = torch.empty(0, dtype=torch.int64)
    data = tiny.at({"train": keep, "val": nothing, "test": nothing}, "north")
    config = settings(method=name, formation=2, ipc=2, iterations=8 if METHODS[name].sees_images else 12)
    made, slices = finish(config, data, tmp_path)
    assert (made.scale, made.geometry, made.stored.shape[2:]) == (2, (1, 16, 16), (8, 8))
    if METHODS[name].soft_labels:
        assert len(made) == 8 + 5 + 8
    else:
        assert torch.bincount(made.hard_labels, minlength=3).tolist() == [8, 5, 8]
    assert torch.equal(enlarge(made.stored, 2), made.images)
    assert "5 real images, so 5 synthetic instead of 8" in slices[-1].notes[0]
    again, _ = finish(config, data, tmp_path / "again", seconds=0.0)
    assert same(again, made)


@pytest.mark.parametrize("method", ["ptm", "cf"])
def test_a_second_round_of_smaller_images(method: str, tiny: Dataset, tmp_path: Path) -> None:
    config = settings(rounds=2, method=method, formation=2)
    first, _ = finish(config, tiny, tmp_path)
    other = SyntheticSet(**{**first.__dict__, "sites": ("south",), "manifest": {"south": {}}})
    second, _ = finish(config, tiny, tmp_path, round=2, context=merge([first, other]))
    assert second.stored.shape == first.stored.shape
    assert not same(first, second)


def test_a_residual_network_can_be_matched(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(
        method="mtt",
        model="resnet18",
        experts=1,
        expert_steps=5,
        expert_batch=2,
        segment=1,
        iterations=1,
        syn_steps=1,
        ipc=1,
    )
    made, slices = finish(config, tiny, tmp_path)
    assert torch.isfinite(made.images).all()
    assert slices[-1].loss is not None
    assert 0 < slices[-1].loss < 10


@pytest.mark.parametrize("budget", ["proportional", "sqrt"])
def test_a_budget_follows_the_classes(budget: str, tiny: Dataset, tmp_path: Path) -> None:
    keep = torch.cat([torch.nonzero(tiny.train.labels == c).flatten()[:n] for c, n in ((0, 30), (1, 6), (2, 3))])
    nothing = torch.empty(0, dtype=torch.int64)
    skewed = tiny.at({"train": keep, "val": nothing, "test": nothing}, "skewed")
    made, _ = finish(settings(budget=budget, ipc=3), skewed, tmp_path)
    counts = torch.bincount(made.hard_labels, minlength=3).tolist()
    assert counts == ([7, 1, 1] if budget == "proportional" else [5, 2, 2])


def test_soft_labels_are_distributions_and_move(tiny: Dataset, tmp_path: Path) -> None:
    made, _ = finish(settings(method="datm"), tiny, tmp_path)
    assert torch.allclose(made.labels.sum(1), torch.ones(len(made)), atol=0.01)
    assert (made.labels.amax(1) < 1).all()


def test_overlap_mitigation_is_recorded(tiny: Dataset, tmp_path: Path) -> None:
    made, _ = finish(settings(method="ptm", iterations=101), tiny, tmp_path)
    assert made.manifest["north"]["replaced_for_overlap"] >= 0
    facts = read_json(next(tmp_path.rglob("facts-*.json")))
    assert len(facts["overlap_limits"]) == 5


def patterns(n: int, seed: int) -> Split:
    """A faint pattern per class under strong noise: one real image says little, what all images share says much."""
    templates = torch.randn((3, 1, 4, 4), generator=generator(0, "templates"))
    templates = torch.nn.functional.interpolate(templates, size=(16, 16), mode="bilinear")
    labels = torch.arange(n) % 3
    images = 0.5 + 0.08 * templates[labels] + 0.35 * torch.randn((n, 1, 16, 16), generator=generator(seed, "noise"))
    return Split((images.clamp(0, 1) * 255).to(torch.uint8), labels, torch.zeros(n, dtype=torch.int64))


def test_distillation_beats_random_images_at_one_image_per_class(tmp_path: Path) -> None:
    """By more than two standard errors of the random draws: a distiller that does nothing fails here."""
    config = settings(
        ipc=1, iterations=160, syn_steps=8, segment=4, expert_steps=100, expert_batch=32, width=8, augment="none", image_lr=50.0,
        eval_steps=60,
    )  # fmt: skip
    data = Dataset(
        "patterns", "generic", ("a", "b", "c"), ("all",), patterns(300, 0), patterns(30, 1), patterns(300, 2)
    )
    task = task_of(data)

    def balanced(material: Material, seed: int) -> float:
        theta = fit(config, task, "convnet", material, lr=0.01, seed=seed)
        probabilities = predict(task.network("convnet", config), theta, data.test.images, task)
        return score(probabilities, data.test.labels)["balanced_accuracy"]

    made, _ = finish(config, data, tmp_path)
    ours = [balanced(Material(made.images, made.labels), n) for n in range(3)]
    draws = [balanced(of_split(data.train.take(torch.arange(3) + 3 * n), task), n) for n in range(6)]
    error = statistics.stdev(draws) / len(draws) ** 0.5
    assert statistics.mean(ours) > statistics.mean(draws) + 2 * error, (ours, draws)
