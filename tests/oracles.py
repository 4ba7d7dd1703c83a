"""Slow and obvious versions of what fedistill does fast: the tests believe these."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.matching.objective import mismatch
from fedistill.matching.student import soft_cross_entropy


def unrolled(net, start, target, images, labels, batches, alpha, mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The matching loss and its gradients (images, labels, alpha), by one autograd graph through all student steps."""
    images, labels, alpha = (t.detach().clone().requires_grad_(True) for t in (images, labels, alpha))
    theta = start.clone().requires_grad_(True)
    for batch in batches:
        x, y = batch(images, labels)
        (g,) = torch.autograd.grad(soft_cross_entropy(net(theta, x), y), theta, create_graph=True)
        theta = theta - alpha * g
    loss = mismatch(theta, start, target, mask)
    return loss.detach(), *torch.autograd.grad(loss, (images, labels, alpha))
