"""The adjoint is the gradient: against a full unroll in float64, and against finite differences."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import unrolled
from torch import Tensor

from fedistill.matching.objective import keep_easy, mismatch, shape_difference
from fedistill.matching.student import Batch, Gradients, Student, adjoint, student_of, unroll
from fedistill.matching.trajectory import batch_of, indices
from fedistill.models.augment import OPERATIONS, Draw, draw
from fedistill.models.flat import Flat
from fedistill.models.loss import KINDS, answers_of, loss_of
from fedistill.models.nets import build
from fedistill.seeding import generator

STEPS, IMAGES, CLASSES = 4, 6, 3
SMOOTH = tuple(name for name in OPERATIONS if name != "none")


@dataclass(frozen=True)
class Problem:
    """A small matching problem in float64: three points of an expert, a synthetic set, batches, a step size."""

    net: Flat
    points: tuple[Tensor, Tensor, Tensor]
    images: Tensor
    labels: Tensor
    batches: list[Batch]
    alpha: Tensor
    mask: Tensor
    kind: str = "multiclass"
    shape_weight: float = 0.0

    @property
    def student(self) -> Student:
        return student_of(lambda theta, x, y: loss_of(self.kind, self.net(theta, x), y))

    def path(self, **changed: Tensor) -> list[Tensor]:
        p = replace(self, **changed)
        return unroll(p.student, p.points[0], p.images, p.labels, p.batches, p.alpha)

    def loss(self, **changed: Tensor) -> float:
        path = self.path(**changed)
        loss = mismatch(path[-1], self.points[0], self.points[2], self.mask)
        shape = shape_difference((self.points[0], path[STEPS // 2], path[-1]), self.points)
        return float(loss + self.shape_weight * shape)

    def oracle(self) -> tuple[Tensor, ...]:
        return unrolled(
            self.net, self.points, self.images, self.labels, self.batches, self.alpha, self.mask,
            kind=self.kind, shape_weight=self.shape_weight,
        )  # fmt: skip

    def adjoint(self) -> tuple[float, Gradients]:
        path = self.path()
        leaves = {i: path[i].requires_grad_(True) for i in (STEPS // 2, STEPS)}
        loss = mismatch(leaves[STEPS], self.points[0], self.points[2], self.mask)
        if self.shape_weight:
            shape = shape_difference((self.points[0], *leaves.values()), self.points)
            loss = loss + self.shape_weight * shape
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        direct = {i: g for i, g in zip(leaves, found, strict=True) if g is not None}
        path = [theta.detach() for theta in path]
        return float(loss.detach()), adjoint(
            self.student, path, self.images, self.labels, self.batches, self.alpha, direct
        )


def problem(
    channels: int = 3,
    model: str = "convnet",
    operations: tuple[str, ...] = SMOOTH,
    size: int = 5,
    kind: str = "multiclass",
    scale: int = 1,
    **more: float,
) -> Problem:
    rng = generator(0, "test", channels, model)
    net = Flat(build(model, (channels, 12, 12), CLASSES, width=4, depth=2).double())
    start = net.initial(rng).double()
    middle, target = (start + s * torch.randn(net.size, generator=rng).double() for s in (0.03, 0.05))
    images = torch.randn((IMAGES, channels, 12 // scale, 12 // scale), generator=rng).double()
    labels = answers_of(kind, torch.randn((IMAGES, CLASSES), generator=rng).double())
    batches = [batch_of(i, draw(operations, rng), scale) for i in indices(IMAGES, size, STEPS, rng)]
    alpha = torch.tensor(0.05, dtype=torch.float64)
    return Problem(net, (start, middle, target), images, labels, batches, alpha, torch.ones_like(start), kind, **more)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


def agrees(p: Problem) -> None:
    loss, grads = p.adjoint()
    want_loss, d_images, d_labels, d_alpha = p.oracle()
    assert loss == pytest.approx(float(want_loss), rel=1e-12)
    assert relative(grads.images, d_images) < 1e-9
    assert relative(grads.labels, d_labels) < 1e-9
    assert relative(grads.step_size, d_alpha) < 1e-9


@pytest.mark.parametrize(("channels", "model"), [(1, "convnet"), (3, "convnet"), (3, "mlp")])
@pytest.mark.parametrize("masked", [False, True])
def test_adjoint_equals_full_unroll(channels: int, model: str, masked: bool) -> None:
    p = problem(channels, model)
    if masked:
        mask = keep_easy(p.path()[-1], p.points[0], p.points[2], keep=0.7, progress=0.0)
        assert 0.6 < mask.mean() < 0.8
        p = replace(p, mask=mask)
    agrees(p)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_equals_full_unroll_for_every_kind_of_task(kind: str) -> None:
    agrees(problem(kind=kind))


def test_adjoint_equals_full_unroll_for_images_that_are_kept_smaller() -> None:
    agrees(problem(scale=2))


def test_adjoint_with_the_shape_of_the_path() -> None:
    """The loss then depends on a point in the middle of the student's path too."""
    plain, shaped = problem().oracle()[1], problem(shape_weight=2.0).oracle()[1]
    assert relative(plain, shaped) > 0.01
    agrees(problem(shape_weight=2.0))


@pytest.mark.parametrize("operation", SMOOTH)
def test_adjoint_pulls_back_through_every_augmentation(operation: str) -> None:
    p = problem(operations=(operation,))
    assert relative(p.adjoint()[1].images, p.oracle()[1]) < 1e-9


def test_adjoint_equals_finite_differences() -> None:
    p = problem(shape_weight=0.5)
    _, grads = p.adjoint()
    h = 1e-5
    for pixel in grads.images.abs().flatten().topk(5).indices.tolist():
        shift = torch.zeros(p.images.numel(), dtype=torch.float64)
        shift[pixel] = h
        shift = shift.view_as(p.images)
        slope = (p.loss(images=p.images + shift) - p.loss(images=p.images - shift)) / (2 * h)
        assert slope == pytest.approx(float(grads.images.flatten()[pixel]), rel=1e-4)
    slope = (p.loss(alpha=p.alpha + h) - p.loss(alpha=p.alpha - h)) / (2 * h)
    assert slope == pytest.approx(float(grads.step_size), rel=1e-4)


def test_compiled_derivatives_are_the_plain_ones() -> None:
    """Skipped where there is no compiler; elsewhere compilation must not change the gradient."""
    net = Flat(build("mlp", (1, 8, 8), CLASSES))

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return loss_of("multiclass", net(theta, x), y)

    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler for torch.compile")
    rng = generator(0)
    theta, lam = net.initial(rng), torch.randn(net.size, generator=rng)
    x, y = torch.randn((4, 1, 8, 8), generator=rng), torch.randn((4, CLASSES), generator=rng).softmax(1)
    plain, fast = student_of(loss), student_of(loss, compiled=True)
    assert relative(fast.gradient(theta, x, y), plain.gradient(theta, x, y)) < 1e-5
    (a, s), (b, t) = fast.pairing(theta, x, y, lam), plain.pairing(theta, x, y, lam)
    assert all(relative(i, j) < 1e-4 for i, j in zip(a, b, strict=True))
    assert float(s) == pytest.approx(float(t), rel=1e-4)


def test_a_long_process_compiles_any_number_of_shapes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By default PyTorch gives up after 8, and what the gradient is would depend on what the process did before."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, backend="eager", **more))
    net = Flat(build("mlp", (1, 6, 6), CLASSES))
    for n in range(1, 12):
        fast = student_of(lambda theta, x, y: loss_of("multiclass", net(theta, x), y), compiled=True)
        y = torch.full((n, CLASSES), 1 / CLASSES)
        assert torch.isfinite(fast.gradient(net.initial(generator(0)), torch.ones((n, 1, 6, 6)), y)).all()
    assert "not compiled" not in caplog.text


def test_without_a_compiler_the_plain_derivatives_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: object, **more: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *args, **more: no_compiler)
    p = problem()
    broken = student_of(lambda theta, x, y: loss_of(p.kind, p.net(theta, x), y), compiled=True)
    x, y = p.batches[0](p.images, p.labels)
    assert torch.equal(broken.gradient(p.points[0], x, y), p.student.gradient(p.points[0], x, y))
    assert "not compiled" in caplog.text


def test_images_outside_every_batch_get_no_gradient() -> None:
    p = replace(problem(), batches=[batch_of(torch.tensor([0, 2]), Draw("none"))] * STEPS)
    touched = p.adjoint()[1].images.flatten(1).norm(dim=1) > 0
    assert touched.tolist() == [True, False, True, False, False, False]


def test_memory_does_not_keep_the_steps() -> None:
    """The path holds parameters only: nothing in it may hang on to a graph."""
    path = problem().path()
    assert len(path) == STEPS + 1
    assert all(theta.grad_fn is None and not theta.requires_grad for theta in path)


def test_batches_use_every_image_once_before_one_twice() -> None:
    batches = indices(7, 3, 7, generator(0))
    flat = torch.cat(batches)
    assert all(len(b) == 3 for b in batches)
    assert sorted(flat[:7].tolist()) == list(range(7))
    assert sorted(flat[7:14].tolist()) == list(range(7))
