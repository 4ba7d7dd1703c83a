"""Budgets, labels and starting images: what a distillation begins with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedistill.config import BUDGETS, make_config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.experts.train import Task
from fedistill.matching import problem
from fedistill.matching.distil import check_skips, distil, start, warnings
from fedistill.matching.problem import (
    Bundle,
    Matching,
    Real,
    budget_of,
    cover,
    draw_like,
    horizon,
    membership,
    prepare,
    worth_compiling,
)
from fedistill.matching.trajectory import OVERSHOOT, make_plan, run_student
from fedistill.methods.registry import method_of
from fedistill.models.loss import groups_of, targets_of
from fedistill.seeding import generator
from fedistill.site.describe import task_of


@given(st.lists(st.integers(0, 200), min_size=2, max_size=9).filter(any), st.integers(1, 20), st.sampled_from(BUDGETS))
def test_budgets_stay_within_what_is_there(counts: list[int], ipc: int, policy: str) -> None:
    budget = budget_of(counts, ipc, policy)
    assert all((0 < b <= n) if n else b == 0 for b, n in zip(budget, counts, strict=True))
    present = sum(n > 0 for n in counts)
    assert sum(budget) <= ipc * present + present  # rounding, and one image for the rarest


def test_budget_policies_differ_as_they_say() -> None:
    counts = [900, 100, 0]
    assert budget_of(counts, 10, "equal") == [10, 10, 0]
    assert budget_of(counts, 10, "proportional") == [18, 2, 0]
    assert budget_of(counts, 10, "sqrt") == [15, 5, 0]


@pytest.mark.parametrize(
    ("kind", "ipc", "formation"), [("multiclass", 7, 1), ("multiclass", 3, 2), ("multilabel", 2, 1)]
)
def test_a_bundle_knows_how_many_images_are_made(kind: str, ipc: int, formation: int) -> None:
    task = Task((1, 16, 16), ("a", "b"), "generic", kind)
    bundle = Bundle(task, (), (9, 5), findings=(((1, 0), 9), ((0, 1), 5)))
    config = make_config({"ipc": ipc, "formation": formation})
    assert bundle.size(config) == len(bundle.targets(config))


def test_few_images_are_not_worth_compiling() -> None:
    """Half a minute of compilation for batches of two images would cost more than it saves."""
    task = Task((1, 28, 28), ("a", "b"), "generic")
    config = make_config({"iterations": 250, "syn_steps": 10, "width": 64})
    assert worth_compiling(config, task, 50)
    assert worth_compiling(config, task, 1000) == worth_compiling(config, task, 50)  # a batch has 50 at most
    assert not worth_compiling(config, task, 2)
    assert worth_compiling(replace(config, compile="on"), task, 2)

    few = Bundle(task, (), (1, 1))
    config = replace(config, method="mtt", expert_steps=300)
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "student_of", lambda loss, compiled: seen.append(compiled))
        prepare(config, method_of(config), few)
        prepare(config, method_of(config), few, context=(torch.zeros(60, 1, 28, 28), torch.zeros(60, 2)))
    assert seen == [False, True]  # what other sites teach is in the batches too


def test_cover_takes_the_rarest_finding_first_and_no_vector_too_often() -> None:
    findings = [((1, 0, 0), 50), ((0, 1, 0), 3), ((0, 0, 1), 1), ((0, 0, 0), 50), ((1, 1, 0), 2)]
    chosen = [tuple(int(x) for x in row) for row in cover(findings, 6)]
    assert len(set(chosen[:4])) == 4
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)} <= set(chosen)
    assert Counter(chosen)[(0, 0, 1)] == 1
    with pytest.raises(FedistillError, match="has 106 images"):
        cover(findings, 107)


def test_groups_and_membership_of_findings() -> None:
    targets = torch.tensor([[0.0, 1, 1], [0, 0, 0]])
    assert groups_of(targets, "multilabel").tolist() == [1, 3]
    assert membership(targets, "multilabel").tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]
    assert membership(torch.tensor([[0.2, 0.7, 0.1]]), "ordinal").tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_real_images_are_drawn_to_fit_and_never_twice(kind: str) -> None:
    task = Task((1, 8, 8), ("a", "b", "c"), "generic", kind)
    labels = torch.arange(30) % 3
    targets = targets_of(labels, 3, "multiclass")
    real = Real(torch.zeros((30, 1, 8, 8), dtype=torch.uint8), targets, task)
    wanted = targets_of(torch.tensor([2, 0, 0, 1, 2]), 3, "multiclass")
    chosen = draw_like(wanted, real, generator(0))
    assert torch.equal(targets[chosen], wanted)
    assert len(set(chosen.tolist())) == 5
    assert not torch.equal(chosen, draw_like(wanted, real, generator(1)))


def test_only_what_the_schedule_can_reach_is_needed() -> None:
    def needed(**settings: object) -> int:
        config = make_config({"expert_steps": 300, "checkpoint_every": 10, "segment": 4, **settings}).resolved()
        return horizon(config, method_of(config))

    assert needed(method="ptm", ipc=1) == 12  # 4 + 0.3 of the remaining 26
    assert needed(method="ptm", ipc=50) == 30
    assert needed(method="datm", ipc=1) == 30  # soft labels ask the finished expert
    assert needed(method="cf", ipc=1) == 30


def matching_of(data: Dataset, **settings: object) -> Matching:
    tiny = {
        "method": "mtt",
        "preset": "quick",
        "width": 4,
        "ipc": 1,
        "segment": 2,
        "expert_steps": 50,
        "experts": 2,
        "iterations": 10,
    }
    config = make_config(tiny | settings).resolved()
    task = task_of(data)
    net, rng = task.network("convnet", config), generator(0, "walk")
    paths = tuple(
        net.initial(rng) + 0.05 * torch.randn((6, net.size), generator=rng).cumsum(0) for _ in range(config.experts)
    )
    return prepare(config, method_of(config), Bundle(task, paths, tuple(data.train.counts(3))))


def test_images_that_no_expert_classifies_get_confident_labels(tiny: Dataset) -> None:
    """DATM's mean over the experts that are right is 0/0 there: its code makes NaN of it."""
    matching = matching_of(tiny, method="datm")
    image = torch.zeros((1, 1, 16, 16))
    said = {int(matching.net_of(e)(path[-1], image).argmax()) for e, path in enumerate(matching.trajectories)}
    nobody = targets_of(torch.tensor([next(c for c in range(3) if c not in said)]), 3, "multiclass")
    assert torch.equal(matching.opinions(image, nobody), 4.0 * nobody)
    somebody = targets_of(torch.tensor([min(said)]), 3, "multiclass")
    assert matching.opinions(image, somebody).argmax() == min(said)
    assert not torch.equal(matching.opinions(image, somebody), 4.0 * somebody)


def test_the_first_step_size_does_not_overshoot(tiny: Dataset) -> None:
    """A tiny site's expert moves little per checkpoint: at the expert's own pace the student would shoot past it."""
    matching = matching_of(tiny, expert_lr=20.0)
    own_pace = 20.0 * matching.config.segment * matching.config.checkpoint_every / matching.config.syn_steps
    state = start(matching, "here")
    assert float(state.step_size) < own_pace
    probes = [run_student(matching, state, make_plan(matching, state, generator(0, "probe", n))).loss for n in range(5)]
    assert sum(probes) / 5 < 2 * OVERSHOOT
    state.log_step.fill_(math.log(own_pace))
    probes = [run_student(matching, state, make_plan(matching, state, generator(0, "probe", n))).loss for n in range(5)]
    assert not sum(probes) / 5 < 100 * OVERSHOOT  # NaN counts


def test_a_student_that_gets_nowhere_is_said(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedistill.matching.distil.STUCK_FOR", 10)
    matching = matching_of(tiny, iterations=10, image_lr=0.0, step_lr=0.0)
    state = start(matching, "here")
    state.log_step.fill_(-9.0)
    distil(matching, state, until=float("inf"))
    assert "raise syn_steps or lower segment" in warnings(matching, state)[0]
    check_skips(matching, state)


def test_a_far_end_gets_more_student_steps(tiny: Dataset) -> None:
    """A growing end would outrun a fixed number of steps, and the loss would stay near 1 whatever the images are."""
    matching = matching_of(tiny, method="ptm", window=1.0, syn_steps=4)
    state = start(matching, "here")
    near = len(make_plan(matching, state, generator(0)).batches)
    state.iteration = 9
    assert len(make_plan(matching, state, generator(0)).batches) > near == 4
