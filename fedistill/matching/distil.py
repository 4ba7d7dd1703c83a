"""Distillation: outer iterations of trajectory matching on one site's experts, in slices that survive a kill.

Nothing here can reach the site's images: the input is a `Bundle` of experts and public facts. Only `init="real"` hands in
real images, by name, and a release says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import Config
from fedistill.data.phantoms import phantom_images
from fedistill.data.public import normalise
from fedistill.errors import FedistillError
from fedistill.experts.train import Task
from fedistill.files import read_tensors, write_tensors
from fedistill.matching.objective import MASKS, mismatch
from fedistill.matching.overlap import mitigate
from fedistill.matching.schedule import Reach, Segment
from fedistill.matching.student import Batch, adjoint, unroll
from fedistill.memory import keep_freed_memory
from fedistill.methods.registry import Method, method_of
from fedistill.models.augment import Draw, augment, draw
from fedistill.models.flat import Flat, device_of
from fedistill.seeding import generator

OVERLAP_EVERY = 100  # iterations between two looks at the overlap
RETRAIN_FOR = 50  # iterations in which the untouched images move ten times slower than the new ones
NOISE = 0.3  # deviation of noise images; with 1.0 the leftover noise hides the lesson where sites' sets are merged
CLIP = 5.0  # an image's gradient is at most this many times the running median


@dataclass(frozen=True)
class Bundle:
    """Experts `(T+1, P)` each, the images per class that the site holds, and limits of overlap (one row per stored stage)."""

    task: Task
    trajectories: tuple[Tensor, ...]
    counts: tuple[int, ...]
    overlap_limits: tuple[tuple[float, ...], ...] = ()

    def budget(self, ipc: int) -> list[int]:
        """Synthetic images per class: `ipc`, never more than the site has real images."""
        return [min(ipc, n) for n in self.counts]

    def notes(self, ipc: int) -> tuple[str, ...]:
        """What the budget of a class was cut to, and why."""
        names = self.task.class_names
        return tuple(
            f"class {names[c]}: {n} real image{'s' * (n > 1)}, so {n} synthetic instead of {ipc}"
            if n
            else f"class {names[c]}: no image at this site, so none is synthesised"
            for c, n in enumerate(self.counts)
            if n < ipc
        )


@dataclass
class State:
    """All that changes: enough to continue bit for bit."""

    images: Tensor  # (m, C, H, W)
    logits: Tensor  # (m, K): soft labels are softmax(logits)
    hard: Tensor  # (m,) the class that the image was made for
    log_step: Tensor  # () logarithm of the step size alpha
    image_velocity: Tensor
    label_velocity: Tensor
    strength: Tensor  # (m,) running mean of the gradient norm of each image
    slow_until: Tensor  # (m,) iteration before which an image moves slowly
    rng: torch.Generator
    iteration: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rate: float = 1.0  # of the learning rate of the images; halved when iterations keep being skipped
    replaced: int = 0
    medians: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    TENSORS = ("images", "logits", "hard", "log_step", "image_velocity", "label_velocity", "strength", "slow_until")
    NUMBERS = ("iteration", "skipped", "skipped_in_a_row", "rate", "replaced", "medians", "losses")

    @property
    def step_size(self) -> Tensor:
        return self.log_step.exp()

    def labels(self, method: Method) -> Tensor:
        """Label distributions `(m, K)`."""
        if method.soft_labels:
            return self.logits.softmax(1)
        return F.one_hot(self.hard, self.logits.shape[1]).to(self.logits.dtype)


def save_state(state: State, path: Path) -> None:
    tensors = {name: getattr(state, name) for name in State.TENSORS} | {"rng": state.rng.get_state()}
    write_tensors(path, tensors, {name: getattr(state, name) for name in State.NUMBERS})


def load_state(path: Path, device: torch.device) -> State:
    tensors, numbers = read_tensors(path)
    rng = torch.Generator()
    rng.set_state(tensors.pop("rng"))
    values: dict[str, Any] = {k: v.to(device) for k, v in tensors.items()} | numbers
    return State(**values, rng=rng)


@dataclass(frozen=True)
class Matching:
    """Everything that stays fixed while one site distils."""

    config: Config
    method: Method
    net: Flat
    operations: tuple[str, ...]
    bundle: Bundle
    trajectories: tuple[Tensor, ...]  # on the device
    reach: Reach
    real: dict[int, Tensor] | None  # class -> real images (n, C, H, W), only for init="real"
    context: tuple[Tensor, Tensor] | None  # images and labels of other sites, constant, from an earlier round


def prepare(
    config: Config,
    bundle: Bundle,
    *,
    real: dict[int, Tensor] | None = None,
    context: tuple[Tensor, Tensor] | None = None,
) -> Matching:
    """Check that the configuration fits the experts. Raises `FedistillError` where it does not."""
    check_segment(config)
    device, checkpoints = device_of(config.device), len(bundle.trajectories[0])
    end = round(config.window_share() * (checkpoints - 1 - config.segment))
    return Matching(
        config=config,
        method=method_of(config),
        net=bundle.task.network(config.model, config),
        operations=bundle.task.operations(config),
        bundle=bundle,
        trajectories=tuple(t.to(device) for t in bundle.trajectories),
        reach=Reach(config.segment, end),
        real=real,
        context=context,
    )


def check_segment(config: Config) -> None:
    """Raise `FedistillError` when an expert has no room for one segment."""
    if config.segment > config.expert_steps // config.checkpoint_every:
        raise FedistillError(
            "segment-too-long",
            f"segment={config.segment} needs more checkpoints than an expert has "
            f"({config.expert_steps // config.checkpoint_every + 1}): raise expert_steps or lower segment.",
        )


def start(matching: Matching, site: str) -> State:
    """The synthetic set before the first iteration."""
    config, bundle, task = matching.config, matching.bundle, matching.bundle.task
    rng = generator(config.seed, "distil", site)
    device = matching.trajectories[0].device
    budget = bundle.budget(config.ipc)
    hard = torch.cat([torch.full((n,), c) for c, n in enumerate(budget)])
    images = torch.cat([_fresh(matching, n, c, rng) for c, n in enumerate(budget) if n]).to(device)
    logits = _initial_logits(matching, images, hard.to(device), task.classes)
    m = len(hard)
    # The student covers as much time as the expert did: N alpha = steps of the segment times the expert's learning rate.
    alpha = config.segment * config.checkpoint_every * config.expert_lr / config.syn_steps
    state = State(
        images=images,
        logits=logits,
        hard=hard.to(device),
        log_step=torch.tensor(math.log(alpha), device=device),
        image_velocity=torch.zeros_like(images),
        label_velocity=torch.zeros_like(logits),
        strength=torch.zeros(m, device=device),
        slow_until=torch.zeros(m, dtype=torch.int64, device=device),
        rng=rng,
    )
    return _calibrate(matching, state)


def _fresh(matching: Matching, n: int, c: int, rng: torch.Generator) -> Tensor:
    """`n` starting images `(n, C, H, W)` for class `c`, normalised."""
    channels, h, w = matching.bundle.task.geometry
    if matching.config.init == "noise":
        return NOISE * torch.randn((n, channels, h, w), generator=rng)
    if matching.config.init == "phantom":
        images, _ = phantom_images(n, channels, max(h, w), rng, 6)
        return normalise((images[:, :, :h, :w] * 255).round().to(torch.uint8), matching.bundle.task.modality)
    if matching.real is None:
        raise FedistillError(
            "no-real-images", "init=real needs the site's images, and this distillation has no access to them."
        )
    pool = matching.real[c]
    return (
        pool[torch.randperm(len(pool), generator=rng)[:n]]
        if n <= len(pool)
        else pool[torch.randint(len(pool), (n,), generator=rng)]
    )


def _initial_logits(matching: Matching, images: Tensor, hard: Tensor, classes: int) -> Tensor:
    """Mean logits of the final experts that classify an image as it is meant; a confident one-hot where none does."""
    with torch.no_grad():
        logits = torch.stack([matching.net(t[-1], images) for t in matching.trajectories])  # (E, m, K)
    right = (logits.argmax(2) == hard).unsqueeze(2)
    count = right.sum(0)
    mean = (logits * right).sum(0) / count.clamp_min(1)
    return torch.where(count > 0, mean, 4.0 * F.one_hot(hard, classes).to(images.dtype))


def _calibrate(matching: Matching, state: State) -> State:
    """Halve the step size until the student no longer overshoots: the first loss must not be above 1.1."""
    for _ in range(6):
        losses = []
        for probe in range(3):
            rng = generator(matching.config.seed, "calibrate", probe)
            losses.append(_run_student(matching, state, _plan(matching, state, rng)).loss)
        if all(math.isfinite(x) for x in losses) and sum(losses) / 3 <= 1.1:
            break
        state.log_step -= math.log(2)
    return state


@dataclass(frozen=True)
class Plan:
    """One outer iteration's random choices."""

    start: Tensor
    target: Tensor
    batches: list[Batch]


@dataclass(frozen=True)
class Outcome:
    path: list[Tensor]
    loss: float
    lam: Tensor


def _plan(matching: Matching, state: State, rng: torch.Generator) -> Plan:
    config = matching.config
    trajectory = matching.trajectories[int(torch.randint(len(matching.trajectories), (1,), generator=rng))]
    segment = _segment(matching, state, rng)
    begin, target = trajectory[segment.start], trajectory[segment.stop]
    # A far end needs more student steps (at most twice as many), else no synthetic set could reach it.
    first = (trajectory[config.segment] - trajectory[0]).norm()
    steps = math.ceil(config.syn_steps * float(((target - begin).norm() / first).clamp(1, 2)))
    total = len(state.images) + (len(matching.context[0]) if matching.context else 0)
    batches = [
        _batch(index.to(begin.device), draw(matching.operations, rng))
        for index in _indices(total, min(config.syn_batch, total), steps, rng)
    ]
    return Plan(begin, target, batches)


def _segment(matching: Matching, state: State, rng: torch.Generator) -> Segment:
    total = matching.config.iterations * matching.config.rounds
    return matching.method.schedule(state.iteration, total, matching.reach, rng)


def _indices(total: int, size: int, steps: int, rng: torch.Generator) -> list[Tensor]:
    """`steps` batches of equal size; every image is used once before one is used again."""
    if size == total:
        return [torch.arange(total)] * steps
    order = torch.cat([torch.randperm(total, generator=rng) for _ in range(math.ceil(steps * size / total))])
    return [order[i * size : (i + 1) * size] for i in range(steps)]


def _batch(index: Tensor, op: Draw) -> Batch:
    return lambda images, labels: (augment(images[index], op), labels[index])


def _with_context(matching: Matching, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if matching.context is None:
        return images, labels
    return torch.cat([images, matching.context[0]]), torch.cat([labels, matching.context[1]])


def _run_student(matching: Matching, state: State, plan: Plan) -> Outcome:
    images, labels = _with_context(matching, state.images, state.labels(matching.method))
    path = unroll(matching.net, plan.start, images, labels, plan.batches, state.step_size)
    end = path[-1].requires_grad_(True)
    mask = MASKS[matching.method.mask](end.detach(), plan.start, plan.target, keep=matching.config.mask_keep)
    loss = mismatch(end, plan.start, plan.target, mask)
    (lam,) = torch.autograd.grad(loss, end)
    path[-1] = end.detach()
    return Outcome(path, float(loss.detach()), lam)


def iterate(matching: Matching, state: State) -> None:
    """One outer iteration, in place."""
    config, method = matching.config, matching.method
    if method.overlap and state.iteration and state.iteration % OVERLAP_EVERY == 0:
        _mitigate(matching, state)
    plan = _plan(matching, state, state.rng)
    outcome = _run_student(matching, state, plan)
    state.iteration += 1
    state.losses.append(outcome.loss)
    if not math.isfinite(outcome.loss) or outcome.loss > config.skip_above:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row % 20 == 0:
            state.rate *= 0.5
        return
    state.skipped_in_a_row = 0

    images, labels = _with_context(matching, state.images, state.labels(method))
    grads = adjoint(matching.net, outcome.path, images, labels, plan.batches, state.step_size, outcome.lam)
    m = len(state.images)
    shared = min(
        config.syn_batch, len(images)
    )  # the student's loss is a mean over so many: an image's gradient shrinks with it
    d_images = _clip(state, grads.images[:m])
    d_images *= torch.where(state.slow_until > state.iteration, 0.1, 1.0)[:, None, None, None]
    state.image_velocity = 0.5 * state.image_velocity + d_images
    state.images = state.images - config.image_lr * shared * state.rate * state.image_velocity
    if method.soft_labels:
        q = state.logits.softmax(1)
        d_q = grads.labels[:m]
        d_logits = q * (d_q - (q * d_q).sum(1, keepdim=True))  # back through the softmax
        state.label_velocity = 0.9 * state.label_velocity + d_logits
        state.logits = state.logits - config.label_lr * shared * state.label_velocity
    d_log_step = (state.step_size * grads.step_size).clamp(-10, 10)
    state.log_step = (state.log_step - config.step_lr * d_log_step).clamp(math.log(1e-4), math.log(0.5))


def _clip(state: State, d_images: Tensor) -> Tensor:
    """Per-image gradient clipping at CLIP times the running median, so that one wild segment cannot ruin an image."""
    norms = d_images.flatten(1).norm(dim=1)
    state.strength = 0.9 * state.strength + 0.1 * norms
    state.medians = [*state.medians[-99:], float(norms.median())]
    limit = CLIP * sorted(state.medians)[len(state.medians) // 2]
    return d_images * (limit / norms.clamp_min(1e-30)).clamp(max=1)[:, None, None, None]


def _mitigate(matching: Matching, state: State) -> None:
    limits, checkpoints = matching.bundle.overlap_limits, len(matching.trajectories[0])
    if not limits:
        return
    stop = _segment(matching, state, state.rng).stop
    stage = round((len(limits) - 1) * stop / (checkpoints - 1))
    thetas = [t[stop] for t in matching.trajectories[:3]]

    def fresh(n: int, c: int) -> Tensor:
        return _fresh(matching, n, c, state.rng).to(state.images)

    for i, image in mitigate(matching.net, thetas, state.images, state.hard, state.strength, limits[stage], fresh):
        state.images[i], state.image_velocity[i] = image, 0.0
        state.replaced += 1
        same = state.hard == state.hard[i]
        state.slow_until[same] = state.iteration + RETRAIN_FOR
        state.slow_until[i] = 0


def distil(matching: Matching, state: State, *, iterations: int, until: float) -> None:
    """Iterate in place up to iteration `iterations`, or until the clock (`time.monotonic`) says `until`."""
    keep_freed_memory()
    while state.iteration < iterations:
        iterate(matching, state)
        if time.monotonic() >= until:  # after the iteration: every slice gets somewhere
            break


def check_skips(matching: Matching, state: State) -> None:
    """Raise `FedistillError` when more than half of all iterations had to be skipped: the result would be noise."""
    if state.skipped > 0.5 * state.iteration:
        raise FedistillError(
            "all-skipped",
            f"{state.skipped} of {state.iteration} iterations had a matching loss above skip_above={matching.config.skip_above:g}: "
            "lower image_lr, or raise syn_steps.",
        )


def pool_of(images: Tensor, labels: Tensor, modality: str, classes: Sequence[int]) -> dict[int, Tensor]:
    """Real images by class, normalised: what `init="real"` starts from."""
    return {c: normalise(images[labels == c], modality) for c in classes}
