"""Function-space matching: a network trained on the set must answer as the experts do, wherever it began.

Parameters of a private expert lie mostly where the noise took them, but its answers are good. So a student that begins at fresh
random parameters takes N steps on the synthetic set, and is asked on public probe images x:

    L = mean over x of  CE( mean_e softmax f(theta_e, x),  f(theta_N, x) )

differentiated through all N steps by the same adjoint as trajectory matching. It never sees a real image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.phantoms import phantoms_like
from fedistill.data.public import normalise
from fedistill.matching.problem import Bundle, Matching
from fedistill.matching.state import State
from fedistill.matching.student import adjoint, unroll
from fedistill.matching.trajectory import batch_of, indices, update_step_size
from fedistill.methods.distribution import adam, pick
from fedistill.models.augment import augment, draw
from fedistill.models.flat import device_of
from fedistill.models.loss import answers_of, loss_of
from fedistill.seeding import generator

PROBES = 512
PROBE_BATCH = 64
FIRST_STEP = 0.05


def probes_of(config: Config, bundle: Bundle) -> Tensor:
    """Public images `(PROBES, C, H, W)`, normalised, on which teacher and student are compared."""
    rng = generator(config.seed, "probes")
    return normalise(phantoms_like(bundle.task.geometry, PROBES, rng), bundle.task.modality).to(
        device_of(config.device)
    )


def begin(matching: Matching, state: State) -> None:
    state.log_step.fill_(math.log(FIRST_STEP))


def step(matching: Matching, state: State) -> None:
    """One iteration, in place."""
    config, rng, kind = matching.config, state.rng, matching.bundle.task.kind
    place = state.iteration % len(matching.nets)
    net, student, alpha = matching.nets[place], matching.students[place], state.step_size[place]
    images, labels = state.images, matching.labels(state)
    total = len(images)
    batches = [
        batch_of(index.to(images.device), draw(matching.operations, rng), matching.scale)
        for index in indices(total, min(config.syn_batch, total), config.syn_steps, rng)
    ]
    path = unroll(student, net.initial(rng).to(images.device), images, labels, batches, alpha)
    chosen = pick(torch.arange(len(matching.prepared)), PROBE_BATCH, rng)
    x = augment(matching.prepared[chosen], draw(matching.operations, rng))
    wanted = torch.stack([
        answers_of(kind, matching.net_of(e)(trajectory[-1], x)) for e, trajectory in enumerate(matching.trajectories)
    ]).mean(0)  # fmt: skip
    end = path[-1].detach().requires_grad_(True)
    loss = loss_of(kind, net(end, x), wanted.detach())
    (direct,) = torch.autograd.grad(loss, end)
    state.iteration += 1
    state.losses.append(float(loss.detach()))
    if not math.isfinite(state.losses[-1]):
        state.skipped += 1
        return
    gradients = adjoint(student, path, images, labels, batches, alpha, {len(batches): direct})
    adam(matching, state, gradients.images)
    update_step_size(config, state, place, gradients)
