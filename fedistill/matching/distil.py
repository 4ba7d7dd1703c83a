"""Distillation: the synthetic set before the first iteration, and iterations in slices that survive a kill."""

from __future__ import annotations

import time

import torch

from fedistill.errors import FedistillError
from fedistill.matching.problem import Matching
from fedistill.matching.state import State
from fedistill.memory import one_thread
from fedistill.models.loss import groups_of
from fedistill.seeding import generator

STUCK = 0.95  # a matching loss above it means that the student did not get anywhere
STUCK_FOR = 200  # iterations


def start(matching: Matching, site: str) -> State:
    """The synthetic set before the first iteration; for methods that select real images, the set itself."""
    method, task, device = matching.method, matching.bundle.task, matching.device
    rng = generator(matching.config.seed, "distil", site)
    targets = matching.bundle.targets(matching.config)
    if method.select is not None:
        chosen = method.select(matching, targets, rng)
        images, targets = matching.seen().batch(chosen), matching.seen().targets[chosen].float()
    else:
        images = matching.fresh(targets, rng)
    images, targets = images.to(device), targets.to(device)
    state = State(
        images=images,
        logits=matching.opinions(images, targets) if method.learns_labels else torch.zeros_like(targets),
        targets=targets,
        group=groups_of(targets, task.kind),
        log_step=torch.zeros(len(matching.nets), device=device),
        image_velocity=torch.zeros_like(images),
        image_square=torch.zeros_like(images),
        label_velocity=torch.zeros_like(targets),
        strength=torch.zeros(len(images), device=device),
        slow_until=torch.zeros(len(images), dtype=torch.int64, device=device),
        network=torch.zeros(0, device=device),
        rng=rng,
    )
    if method.begin is not None:
        method.begin(matching, state)
    return state


@one_thread()
def distil(matching: Matching, state: State, *, until: float) -> None:
    """Iterate in place up to the iterations of the configuration, or until the clock (`time.monotonic`) says `until`."""
    step = matching.method.step
    while step is not None and state.iteration < matching.goal:
        step(matching, state)
        if time.monotonic() >= until:  # after the iteration: every slice gets somewhere
            break


def finished(matching: Matching, state: State) -> bool:
    return matching.method.step is None or state.iteration >= matching.goal


def _image_rate(matching: Matching) -> str:
    """The setting that is the learning rate of the images."""
    return "image_lr" if matching.method.schedule is not None else "pixel_lr"


def check_finite(matching: Matching, state: State) -> None:
    """Raise `FedistillError` when the images are no numbers any more: they will not become any again."""
    if not torch.isfinite(state.images).all():
        name = _image_rate(matching)
        raise FedistillError(
            "diverged",
            f"The images diverged within {state.iteration} iterations: lower {name}={getattr(matching.config, name):g}.",
        )


def check_skips(matching: Matching, state: State) -> None:
    """Raise `FedistillError` when more than half of all iterations had to be skipped: the result would be noise."""
    if state.skipped > 0.5 * state.iteration:
        raise FedistillError(
            "all-skipped",
            f"{state.skipped} of {state.iteration} iterations had a matching loss above skip_above={matching.config.skip_above:g}: "
            f"lower {_image_rate(matching)}, or raise syn_steps.",
        )


def warnings(matching: Matching, state: State) -> tuple[str, ...]:
    """What a person should know about how the matching went."""
    recent = state.losses[-STUCK_FOR:]
    if matching.method.schedule is not None and len(recent) == STUCK_FOR and min(recent) > STUCK:
        return (
            f"the matching loss stayed above {STUCK} for {STUCK_FOR} iterations: the student's steps are too short for the "
            "segments; raise syn_steps or lower segment",
        )
    return ()
