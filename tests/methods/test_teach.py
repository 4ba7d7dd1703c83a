"""Function-space matching against one autograd graph through all of the student's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import taught
from torch import Tensor

from fedistill.config import Config, make_config
from fedistill.experts.train import Task
from fedistill.matching.distil import distil, start
from fedistill.matching.problem import Bundle, Matching, prepare
from fedistill.matching.state import State
from fedistill.matching.student import adjoint
from fedistill.matching.trajectory import batch_of, indices
from fedistill.methods import teach
from fedistill.methods.distribution import pick
from fedistill.methods.registry import method_of
from fedistill.models.augment import augment, draw
from fedistill.models.loss import KINDS, answers_of
from fedistill.seeding import generator


def settings(**more: object) -> Config:
    few = {
        "method": "teach", "width": 4, "depth": 2, "ipc": 2, "iterations": 40, "syn_steps": 4, "syn_batch": 5, "experts": 2,
        "expert_steps": 50, "preset": "quick",
    }  # fmt: skip
    return make_config(few | more).resolved()


def problem(kind: str = "multiclass", **more: object) -> tuple[Matching, State]:
    """Two experts that are sure of their answers; what they are sure of depends on the image."""
    config, task = settings(**more), Task((1, 16, 16), ("a", "b", "c"), "phantom", kind)
    net = task.network("convnet", config)
    paths = []
    for e in range(2):
        theta = net.initial(generator(0, "expert"))
        paths.append(torch.stack([theta, theta + 0.02 * torch.randn(net.size, generator=generator(e)), 3 * theta]))
    findings = tuple((tuple(int(i == k) for i in range(3)), 9) for k in range(4))
    bundle = Bundle(task, tuple(paths), (9, 9, 9), findings=findings if kind == "multilabel" else ())
    matching = prepare(config, method_of(config), bundle)
    return matching, start(matching, "here")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_gradient_is_that_of_a_full_unroll(kind: str, labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matching, state = problem(kind, labels=labels)
    caught: dict[str, Tensor] = {}
    monkeypatch.setattr(teach, "adam", lambda m, s, gradient: caught.update(images=gradient))
    monkeypatch.setattr(teach, "update_step_size", lambda c, s, place, g: caught.update(step_size=g.step_size))
    rng = torch.Generator()
    rng.set_state(state.rng.get_state())
    teach.step(matching, state)

    config, total = matching.config, len(state.images)
    batches = [
        batch_of(i, draw(matching.operations, rng)) for i in indices(total, min(5, total), config.syn_steps, rng)
    ]
    begin = matching.nets[0].initial(rng)
    chosen = pick(torch.arange(teach.PROBES), teach.PROBE_BATCH, rng)
    x = augment(matching.prepared[chosen], draw(matching.operations, rng))
    wanted = sum(answers_of(kind, matching.nets[0](path[-1], x)) for path in matching.trajectories) / 2
    loss, d_images, d_alpha = taught(
        matching.nets[0], begin, state.images, matching.labels(state), batches, state.step_size[0], x, wanted, kind
    )
    assert state.losses == [pytest.approx(float(loss), rel=1e-5)]
    assert (caught["images"] - d_images).norm() < 1e-3 * d_images.norm()
    assert float(caught["step_size"]) == pytest.approx(float(d_alpha), rel=1e-3)
    assert state.iteration == 1


@pytest.mark.parametrize(("kind", "labels"), [("multiclass", "hard"), ("multiclass", "soft"), ("multilabel", "hard")])
def test_students_come_to_answer_as_the_experts_do(kind: str, labels: str) -> None:
    matching, state = problem(kind, labels=labels, augment="none", pixel_lr=0.1)
    before = state.images.clone()
    distil(matching, state, until=float("inf"))
    assert state.skipped == 0
    assert (state.images - before).abs().mean() > 0.01
    assert state.step_size[0] != pytest.approx(teach.FIRST_STEP)
    if kind == "multiclass":  # these experts say little of findings: every answer is near one half
        assert sum(state.losses[-8:]) < sum(state.losses[:8])


def test_an_iteration_without_a_finite_loss_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matching, state = problem()
    before = (state.images.clone(), state.log_step.clone())
    monkeypatch.setattr(teach, "loss_of", lambda kind, logits, wanted: logits.sum() * torch.nan)
    monkeypatch.setattr(teach, "adjoint", adjoint)
    teach.step(matching, state)
    assert (state.iteration, state.skipped) == (1, 1)
    assert torch.equal(state.images, before[0])
    assert torch.equal(state.log_step, before[1])


def test_probes_depend_on_nobodys_images() -> None:
    one, two = problem()[0], problem(ipc=1)[0]
    assert torch.equal(one.prepared, two.prepared)
    assert one.prepared.shape == (teach.PROBES, 1, 16, 16)
    assert replace(one).real is None
