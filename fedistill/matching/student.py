"""The student's steps on the synthetic set, and the exact gradient through them in constant memory.

    theta_{i+1} = theta_i - alpha g(theta_i; x_i, y_i),   g = grad_theta loss,   i = 0 .. N-1

The matching loss L(theta_N) is differentiated by its adjoint lambda_i = dL/dtheta_i, walked backwards:

    lambda_i = lambda_{i+1} - alpha H_i lambda_{i+1},   H_i = grad_theta^2 loss
    dL/dx_i  = -alpha d<lambda_{i+1}, g_i>/dx_i    (the same for labels)        dL/dalpha = -sum_i <lambda_{i+1}, g_i>

Only the N+1 parameter vectors are kept, never N graphs. TESLA (Cui et al., ICML 2023) has the same cost but treats
theta_i as constant, which is not the gradient of L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Net = Callable[[Tensor, Tensor], Tensor]  # (theta (P,), images (b, C, H, W)) -> logits (b, K)
Batch = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # (all images, all labels) -> augmented (images, labels) of a step


@dataclass(frozen=True)
class Gradients:
    """dL/d(images, labels, alpha), in the shapes of the images, the label distributions and the step size."""

    images: Tensor
    labels: Tensor
    step_size: Tensor


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `logits (b, K)` to the distributions `labels (b, K)`."""
    return -(labels * F.log_softmax(logits, 1)).sum(1).mean()


def unroll(
    net: Net, theta: Tensor, images: Tensor, labels: Tensor, batches: Sequence[Batch], alpha: Tensor
) -> list[Tensor]:
    """The student's path: N+1 vectors `(P,)`, without a graph."""
    path = [theta.detach()]
    for batch in batches:
        here = path[-1].requires_grad_(True)
        with torch.no_grad():
            x, y = batch(images, labels)
        (g,) = torch.autograd.grad(soft_cross_entropy(net(here, x), y), here)
        path[-1] = here.detach()
        path.append(path[-1] - alpha * g)
    return path


def adjoint(
    net: Net,
    path: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Batch],
    alpha: Tensor,
    lam: Tensor,
) -> Gradients:
    """Exact gradients of L through the path, given lam = dL/dtheta_N `(P,)`. Batches and augmentations are pulled back too."""
    images, labels = images.detach().requires_grad_(True), labels.detach().requires_grad_(True)
    d_images, d_labels, d_alpha = torch.zeros_like(images), torch.zeros_like(labels), torch.zeros_like(alpha)
    for theta, batch in zip(path[-2::-1], batches[::-1], strict=True):
        theta = theta.detach().requires_grad_(True)
        x, y = batch(images, labels)
        (g,) = torch.autograd.grad(soft_cross_entropy(net(theta, x), y), theta, create_graph=True)
        pairing = lam @ g
        h_lam, d_x, d_y = torch.autograd.grad(pairing, (theta, images, labels))
        d_images -= alpha * d_x
        d_labels -= alpha * d_y
        d_alpha -= pairing.detach()
        lam = lam - alpha * h_lam
    return Gradients(d_images, d_labels, d_alpha)
