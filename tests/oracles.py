"""Slow and obvious versions of what fedistill does fast: the tests believe these."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.matching.objective import mismatch, shape_difference
from fedistill.models.loss import loss_of


def unrolled(
    net, points, images, labels, batches, alpha, mask, *, kind: str = "multiclass", shape_weight: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The matching loss and its gradients (images, labels, alpha), by one autograd graph through all student steps.

    points: start, middle and target of the expert.
    """
    images, labels, alpha = (t.detach().clone().requires_grad_(True) for t in (images, labels, alpha))
    path = [points[0].clone().requires_grad_(True)]
    for batch in batches:
        x, y = batch(images, labels)
        (g,) = torch.autograd.grad(loss_of(kind, net(path[-1], x), y), path[-1], create_graph=True)
        path.append(path[-1] - alpha * g)
    loss = mismatch(path[-1], points[0], points[2], mask)
    if shape_weight:
        loss = loss + shape_weight * shape_difference((points[0], path[len(batches) // 2], path[-1]), points)
    return loss.detach(), *torch.autograd.grad(loss, (images, labels, alpha))


def taught(
    net, begin, images, labels, batches, alpha, probes, wanted, kind: str = "multiclass"
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of function-space matching and its gradients (images, alpha), by one autograd graph."""
    images, alpha = (t.detach().clone().requires_grad_(True) for t in (images, alpha))
    theta = begin.clone().requires_grad_(True)
    for batch in batches:
        (g,) = torch.autograd.grad(loss_of(kind, net(theta, batch(images, labels)[0]), batch(images, labels)[1]), theta,
                                   create_graph=True)  # fmt: skip
        theta = theta - alpha * g
    loss = loss_of(kind, net(theta, probes), wanted)
    return loss.detach(), *torch.autograd.grad(loss, (images, alpha))
