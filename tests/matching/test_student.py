"""The adjoint is the gradient: against a full unroll in float64, and against finite differences."""

from __future__ import annotations

import pytest
import torch
from oracles import unrolled

from fedistill.matching.distil import _batch, _indices
from fedistill.matching.objective import keep_easy, mismatch
from fedistill.matching.student import adjoint, unroll
from fedistill.models.augment import OPERATIONS, Draw, draw
from fedistill.models.flat import Flat
from fedistill.models.nets import build
from fedistill.seeding import generator

STEPS, IMAGES, CLASSES = 4, 6, 3
SMOOTH = tuple(name for name in OPERATIONS if name != "none")


def problem(channels: int = 3, model: str = "convnet", operations: tuple[str, ...] = SMOOTH, size: int = 5):
    rng = generator(0, "test", channels, model)
    net = Flat(build(model, (channels, 12, 12), CLASSES, width=4, depth=2).double())
    start = net.initial(rng).double()
    target = start + 0.05 * torch.randn(net.size, generator=rng).double()
    images = torch.randn((IMAGES, channels, 12, 12), generator=rng).double()
    labels = torch.randn((IMAGES, CLASSES), generator=rng).double().softmax(1)
    batches = [_batch(i, draw(operations, rng)) for i in _indices(IMAGES, size, STEPS, rng)]
    return net, start, target, images, labels, batches, torch.tensor(0.05, dtype=torch.float64)


def gradients(net, start, target, images, labels, batches, alpha, mask):
    path = unroll(net, start, images, labels, batches, alpha)
    end = path[-1].requires_grad_(True)
    loss = mismatch(end, start, target, mask)
    (lam,) = torch.autograd.grad(loss, end)
    return loss.detach(), adjoint(net, path, images, labels, batches, alpha, lam)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("channels", "model"), [(1, "convnet"), (3, "convnet"), (3, "mlp")])
@pytest.mark.parametrize("masked", [False, True])
def test_adjoint_equals_full_unroll(channels: int, model: str, masked: bool) -> None:
    net, start, target, images, labels, batches, alpha = problem(channels, model)
    mask = torch.ones_like(start)
    if masked:
        end = unroll(net, start, images, labels, batches, alpha)[-1]
        mask = keep_easy(end, start, target, keep=0.7)
        assert 0.6 < mask.mean() < 0.8
    loss, grads = gradients(net, start, target, images, labels, batches, alpha, mask)
    want_loss, d_images, d_labels, d_alpha = unrolled(net, start, target, images, labels, batches, alpha, mask)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-12)
    assert relative(grads.images, d_images) < 1e-9
    assert relative(grads.labels, d_labels) < 1e-9
    assert relative(grads.step_size, d_alpha) < 1e-9


@pytest.mark.parametrize("operation", SMOOTH)
def test_adjoint_pulls_back_through_every_augmentation(operation: str) -> None:
    net, start, target, images, labels, batches, alpha = problem(operations=(operation,))
    mask = torch.ones_like(start)
    _, grads = gradients(net, start, target, images, labels, batches, alpha, mask)
    assert relative(grads.images, unrolled(net, start, target, images, labels, batches, alpha, mask)[1]) < 1e-9


def test_adjoint_equals_finite_differences() -> None:
    net, start, target, images, labels, batches, alpha = problem()
    mask = torch.ones_like(start)
    _, grads = gradients(net, start, target, images, labels, batches, alpha, mask)

    def loss_at(x, a) -> float:
        return float(mismatch(unroll(net, start, x, labels, batches, a)[-1], start, target, mask))

    h = 1e-5
    for pixel in grads.images.abs().flatten().topk(5).indices.tolist():
        shift = torch.zeros(images.numel(), dtype=torch.float64)
        shift[pixel] = h
        shift = shift.view_as(images)
        slope = (loss_at(images + shift, alpha) - loss_at(images - shift, alpha)) / (2 * h)
        assert slope == pytest.approx(float(grads.images.flatten()[pixel]), rel=1e-4)
    slope = (loss_at(images, alpha + h) - loss_at(images, alpha - h)) / (2 * h)
    assert slope == pytest.approx(float(grads.step_size), rel=1e-4)


def test_images_outside_every_batch_get_no_gradient() -> None:
    net, start, target, images, labels, _, alpha = problem()
    batches = [_batch(torch.tensor([0, 2]), Draw("none"))] * STEPS
    _, grads = gradients(net, start, target, images, labels, batches, alpha, torch.ones_like(start))
    touched = grads.images.flatten(1).norm(dim=1) > 0
    assert touched.tolist() == [True, False, True, False, False, False]


def test_memory_does_not_keep_the_steps() -> None:
    """The path holds parameters only: nothing in it may hang on to a graph."""
    net, start, _, images, labels, batches, alpha = problem()
    path = unroll(net, start, images, labels, batches, alpha)
    assert len(path) == STEPS + 1
    assert all(theta.grad_fn is None and not theta.requires_grad for theta in path)


def test_batches_use_every_image_once_before_one_twice() -> None:
    batches = _indices(7, 3, 7, generator(0))
    flat = torch.cat(batches)
    assert all(len(b) == 3 for b in batches)
    assert sorted(flat[:7].tolist()) == list(range(7))
    assert sorted(flat[7:14].tolist()) == list(range(7))
