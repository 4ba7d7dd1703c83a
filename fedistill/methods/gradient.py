"""Gradient matching: a training step on the synthetic images of a class points where one on the real ones does.

DC (Zhao, Mopuri and Bilen, ICLR 2021) and, with siamese augmentation, DSA (Zhao and Bilen, ICML 2021). It reads real images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedistill.matching.problem import Matching
from fedistill.matching.state import State
from fedistill.methods.distribution import adam, pick
from fedistill.models.augment import augment, draw
from fedistill.models.loss import loss_of

OUTER = 10  # matching steps per network, which trains on the synthetic set between them
INNER = 5  # its training steps
NETWORK_LR = 0.01


def distance(made: Tensor, real: Tensor, shapes: tuple[torch.Size, ...]) -> Tensor:
    """sum over layers and output rows of 1 - cosine (DC, eq. 10 and its code); biases and norms are left out.

    Gradients `(P,)` of a network with parameters of `shapes`.
    """
    total, sizes = torch.zeros((), device=made.device), [math.prod(s) for s in shapes]
    for a, b, shape in zip(made.split(sizes), real.split(sizes), shapes, strict=True):
        if len(shape) > 1:
            a, b = a.view(shape[0], -1), b.view(shape[0], -1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def step(matching: Matching, state: State) -> None:
    """One iteration, in place: match the gradients of every class, then train the network on the set."""
    real, rng, kind = matching.seen(), state.rng, matching.bundle.task.kind
    net = matching.nets[state.iteration // OUTER % len(matching.nets)]
    if state.iteration % OUTER == 0 or len(state.network) != net.size:
        state.network = net.initial(rng).to(matching.device)
    theta = state.network.requires_grad_(True)
    images = state.images.requires_grad_(True)
    loss = torch.zeros((), device=images.device)
    for c in state.group.unique().tolist():
        mine, pool = torch.nonzero(state.group == c).flatten(), real.of_group(c)
        if not len(pool):
            continue
        op, index = draw(matching.operations, rng), pick(pool, matching.config.real_batch, rng)
        x, y = augment(real.batch(index).to(images), op), real.targets[index].to(images)
        (of_real,) = torch.autograd.grad(loss_of(kind, net(theta, x), y), theta)
        made = loss_of(kind, net(theta, augment(matching.shown(images[mine]), op)), state.targets[mine])
        (of_made,) = torch.autograd.grad(made, theta, create_graph=True)
        loss = loss + distance(of_made, of_real, net.shapes)
    (gradient,) = torch.autograd.grad(loss, images)
    state.images = images.detach()
    adam(matching, state, gradient)
    for _ in range(INNER):
        some = pick(torch.arange(len(state.images)), matching.config.syn_batch, rng)
        x = augment(matching.shown(state.images[some]), draw(matching.operations, rng))
        (g,) = torch.autograd.grad(loss_of(kind, net(theta, x), state.targets[some]), theta)
        theta = (theta - NETWORK_LR * g).detach().requires_grad_(True)
    state.network = theta.detach()
    state.iteration += 1
    state.losses.append(float(loss.detach()))
