"""Distribution matching: synthetic images of a class have the features that the real ones have. It reads real images.

No gradient passes through training steps, so an iteration costs about what one training step does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.matching.problem import Matching, membership
from fedistill.matching.state import State
from fedistill.models.augment import augment, draw

FREQUENCIES = 1024
Features = Callable[[Tensor], Tensor]  # images (n, C, H, W) -> (n, D)
Distance = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]
# (real features (n, D), their weights (n, G), synthetic features (m, D), their weights (m, G), rng) -> ();
# a column of weights adds up to 1 for each of the G classes


def random_network(matching: Matching, rng: torch.Generator) -> Features:
    """Features of a network with fresh parameters, another one every iteration (DM)."""
    net = matching.nets[int(torch.randint(len(matching.nets), (1,), generator=rng))]
    theta = net.initial(rng).to(matching.device)
    return lambda x: net.features(theta, x)


def between_experts(matching: Matching, rng: torch.Generator) -> Features:
    """Features of a point between an expert's first and last parameters (NCFM draws its networks so)."""
    e = int(torch.randint(len(matching.trajectories), (1,), generator=rng))
    path, net = matching.trajectories[e], matching.net_of(e)
    theta = torch.lerp(path[0], path[-1], float(torch.rand(1, generator=rng)))
    return lambda x: net.features(theta, x)


def means(real: Tensor, real_weight: Tensor, made: Tensor, made_weight: Tensor, rng: torch.Generator) -> Tensor:
    """sum_c |mean real feature - mean synthetic feature|^2 (DM; Zhao and Bilen, WACV 2023, eq. 5)."""
    return (real_weight.T @ real - made_weight.T @ made).square().sum()


def characteristic(
    real: Tensor, real_weight: Tensor, made: Tensor, made_weight: Tensor, rng: torch.Generator
) -> Tensor:
    """Distance of characteristic functions phi(t) = E exp(i <t, f>) at random frequencies t ~ N(0, I), f of length 1.

        sqrt( (|phi_r| - |phi_s|)^2 / 2 + |phi_r| |phi_s| - Re phi_r conj(phi_s) ),   averaged over t, summed over classes

    NCFM (Wang et al., CVPR 2025) with equal weights of amplitude and phase, and without its sampling network.
    """
    t = torch.randn((real.shape[1], FREQUENCIES), generator=rng).to(real)
    at_real, at_made = F.normalize(real, dim=1) @ t, F.normalize(made, dim=1) @ t
    r_re, r_im = real_weight.T @ at_real.cos(), real_weight.T @ at_real.sin()  # (G, F)
    s_re, s_im = made_weight.T @ at_made.cos(), made_weight.T @ at_made.sin()
    r_abs = (r_re.square() + r_im.square() + 1e-12).sqrt()
    s_abs = (s_re.square() + s_im.square() + 1e-12).sqrt()
    square = 0.5 * (r_abs - s_abs).square() + r_abs * s_abs - r_re * s_re - r_im * s_im
    return (square.clamp_min(0) + 1e-12).sqrt().mean(1).sum()


def step(
    matching: Matching, state: State, *, features: Callable[[Matching, torch.Generator], Features], distance: Distance
) -> None:
    """One iteration, in place: a network, a batch of real images per class, one augmentation for all."""
    real, rng = matching.seen(), state.rng
    f, op = features(matching, rng), draw(matching.operations, rng)
    made_in = membership(state.targets, matching.bundle.task.kind)
    parts = [pick(pool, matching.config.real_batch, rng) for pool in real.members]
    index = torch.cat(parts)
    # an image with several findings counts for the one that it was drawn for
    real_in = torch.block_diag(*(torch.ones(len(part), 1) for part in parts)).to(state.images)
    both = (made_in.sum(0) > 0) & (real_in.sum(0) > 0)
    with torch.no_grad():
        of_real = f(augment(real.batch(index).to(state.images), op))
    images = state.images.requires_grad_(True)
    loss = distance(
        of_real, _shares(real_in[:, both]), f(augment(matching.shown(images), op)), _shares(made_in[:, both]), rng
    )
    (gradient,) = torch.autograd.grad(loss, images)
    state.images = images.detach()
    adam(matching, state, gradient)
    state.iteration += 1
    state.losses.append(float(loss.detach()))


def pick(pool: Tensor, most: int, rng: torch.Generator) -> Tensor:
    """At most `most` random members of `pool`."""
    return pool[torch.randperm(len(pool), generator=rng)[:most]]


def _shares(inside: Tensor) -> Tensor:
    return inside / inside.sum(0)


def adam(matching: Matching, state: State, gradient: Tensor) -> None:
    """Adam (Kingma and Ba, ICLR 2015) on the images, its learning rate falling to zero along a half cosine."""
    k = state.iteration + 1
    state.image_velocity = 0.9 * state.image_velocity + 0.1 * gradient
    state.image_square = 0.99 * state.image_square + 0.01 * gradient.square()
    direction = state.image_velocity / (1 - 0.9**k) / ((state.image_square / (1 - 0.99**k)).sqrt() + 1e-12)
    fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * state.iteration / max(1, matching.total))))
    state.images = state.images - matching.config.pixel_lr * float(fall) * direction
