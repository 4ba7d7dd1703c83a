"""The student's steps on the synthetic set, and the exact gradient through them in constant memory.

    theta_{i+1} = theta_i - alpha g(theta_i; x_i, y_i),   g = grad_theta loss,   i = 0 .. N-1

A loss L of the path is differentiated by its adjoint lambda_i = dL/dtheta_i, walked backwards:

    lambda_i = lambda_{i+1} - alpha H_i lambda_{i+1} + dL/dtheta_i direct,   H_i = grad_theta^2 loss
    dL/dx_i  = -alpha d<lambda_{i+1}, g_i>/dx_i    (the same for labels)        dL/dalpha = -sum_i <lambda_{i+1}, g_i>

Only the N+1 parameter vectors are kept, never N graphs. TESLA (Cui et al., ICML 2023) has the same cost but treats
theta_i as constant, which is not the gradient of L.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (theta (P,), images (b, C, H, W), labels (b, K)) -> ()
Batch = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # (all images, all labels) -> augmented (images, labels) of a step


@dataclass(frozen=True)
class Student:
    """The two derivatives that matching needs, for one network.

    gradient: (theta, x, y) -> g `(P,)`.
    pairing: (theta, x, y, lam) -> ((H lam, d<lam, g>/dx, d<lam, g>/dy), <lam, g>).
    """

    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairing: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[tuple[Tensor, Tensor, Tensor], Tensor]]


@dataclass(frozen=True)
class Gradients:
    """dL/d(images, labels, alpha), in the shapes of the images, the label distributions and the step size."""

    images: Tensor
    labels: Tensor
    step_size: Tensor


def student_of(loss: Loss, *, compiled: bool = False) -> Student:
    """The derivatives of `loss`; compiled ones fall back to plain ones, with a warning, where they cannot be had.

    The derivative is compiled, not the network: PyTorch does not differentiate a compiled backward a second time.
    """

    def gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_(True)
            return torch.autograd.grad(loss(theta, x, y), theta)[0]

    def pairing(theta: Tensor, x: Tensor, y: Tensor, lam: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        with torch.enable_grad():
            theta, x, y = (t.detach().requires_grad_(True) for t in (theta, x, y))
            (g,) = torch.autograd.grad(loss(theta, x, y), theta, create_graph=True)
            s = lam @ g
            h_lam, d_x, d_y = torch.autograd.grad(s, (theta, x, y))
        return (h_lam, d_x, d_y), s.detach()

    plain = Student(gradient, pairing)
    if not compiled:
        return plain

    def inner(theta: Tensor, x: Tensor, y: Tensor, lam: Tensor) -> Tensor:
        return lam @ torch.func.grad(loss)(theta, x, y)

    return Student(
        _compile(torch.func.grad(loss), plain.gradient),
        _compile(torch.func.grad_and_value(inner, argnums=(0, 1, 2)), plain.pairing),
    )


def _compile(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`fast` compiled at its first call, or `plain` from then on if compilation fails (no C++ compiler, for example).

    The compiler keeps what it made in its own cache on disk, so later runs start at once.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a pool of processes beside every worker
    # that there is no GPU is no news to the user
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    chosen: list[Callable[..., Any]] = []

    def call(*args: Tensor) -> Any:
        if not chosen:
            ready = torch.compile(fast, fullgraph=True, dynamic=False)
            try:
                # every network and shape is a compilation of its own, and a long process sees more than the usual 8
                with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=8192):
                    ready(*args)
                chosen.append(ready)
            except Exception as error:
                logging.getLogger(__name__).warning("not compiled, so slower: %s", type(error).__name__)
                chosen.append(plain)
        return chosen[0](*args)

    return call


@torch.no_grad()
def unroll(
    student: Student, theta: Tensor, images: Tensor, labels: Tensor, batches: Sequence[Batch], alpha: Tensor
) -> list[Tensor]:
    """The student's path: N+1 vectors `(P,)`, without a graph."""
    path = [theta.detach()]
    for batch in batches:
        path.append(path[-1] - alpha * student.gradient(path[-1], *batch(images, labels)))
    return path


def adjoint(
    student: Student,
    path: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Batch],
    alpha: Tensor,
    direct: Mapping[int, Tensor],
) -> Gradients:
    """Exact gradients of L through the path. Batches and augmentations are pulled back too.

    direct: position i -> the direct derivative of L by theta_i `(P,)`; the last one starts the walk, so steps that
    come after it cost nothing.
    """
    last = max(direct)
    lam = direct[last]
    images, labels = images.detach().requires_grad_(True), labels.detach().requires_grad_(True)
    d_images, d_labels, d_alpha = torch.zeros_like(images), torch.zeros_like(labels), torch.zeros_like(alpha)
    for i in reversed(range(last)):
        x, y = batches[i](images, labels)
        (h_lam, d_x, d_y), s = student.pairing(path[i], x.detach(), y.detach(), lam)
        back_x, back_y = torch.autograd.grad((x, y), (images, labels), (d_x, d_y))
        d_images -= alpha * back_x
        d_labels -= alpha * back_y
        d_alpha -= s
        lam = lam - alpha * h_lam
        if i in direct:
            lam = lam + direct[i]
    return Gradients(d_images, d_labels, d_alpha)
