"""One outer iteration of trajectory matching: a segment of an expert, the student's steps, the exact gradient, the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import Config
from fedistill.matching.objective import MASKS, mismatch, shape_difference
from fedistill.matching.overlap import mitigate
from fedistill.matching.problem import Matching
from fedistill.matching.schedule import Segment
from fedistill.matching.state import State
from fedistill.matching.student import Batch, Gradients, adjoint, unroll
from fedistill.models.augment import Draw, augment, draw
from fedistill.models.enlarge import enlarge, reduce
from fedistill.seeding import generator

OVERLAP_LOOKS = 10  # at the overlap, evenly over the iterations, but none in the last fifth: a new image needs time
RETRAIN_FOR = 0.05  # of the iterations, in which the untouched images move ten times slower than the new ones
CLIP = 5.0  # an image's gradient is at most this many times the running median
LONGEST = 0.5  # step of the student
OVERSHOOT = 1.1  # the largest first loss, averaged over three segments


@dataclass(frozen=True)
class Plan:
    """One outer iteration's random choices: the points of the expert (start, middle, end), and the student's batches."""

    expert: int
    points: tuple[Tensor, Tensor, Tensor]
    batches: list[Batch]


@dataclass(frozen=True)
class Outcome:
    """The student's path, the loss, and the loss's direct derivatives by points of the path."""

    path: list[Tensor]
    loss: float
    direct: dict[int, Tensor]


def iterate(matching: Matching, state: State) -> None:
    """One outer iteration, in place."""
    if matching.method.overlap and looks_at_overlap(state.iteration, matching.total):
        _mitigate(matching, state)
    plan = make_plan(matching, state, state.rng)
    outcome = run_student(matching, state, plan)
    state.iteration += 1
    state.losses.append(outcome.loss)
    if not math.isfinite(outcome.loss) or outcome.loss > matching.config.skip_above:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row % 20 == 0:
            state.rate *= 0.5
        return
    state.skipped_in_a_row = 0
    _update(matching, state, plan, outcome)


def looks_at_overlap(k: int, total: int) -> bool:
    """Whether iteration k of `total` begins with a look at the overlap."""
    return 0 < k <= 0.8 * total and k % max(1, total // OVERLAP_LOOKS) == 0


def calibrate(matching: Matching, state: State) -> None:
    """First step sizes: the student covers as much time as the expert did, halved until it no longer overshoots.

    Each architecture of the pool has its own, found on its own experts.
    """
    config = matching.config
    rate = config.dp_lr if config.privacy == "dp" else config.expert_lr
    alpha = min(config.segment * config.checkpoint_every * rate / config.syn_steps, LONGEST)
    state.log_step.fill_(math.log(alpha))
    for place in range(min(len(matching.nets), len(matching.trajectories))):
        mine = range(place, len(matching.trajectories), len(matching.nets))
        for _ in range(16):
            losses = []
            for n in range(3):
                plan = make_plan(matching, state, generator(config.seed, "calibrate", n), mine)
                losses.append(run_student(matching, state, plan).loss)
            if all(math.isfinite(x) for x in losses) and sum(losses) / 3 <= OVERSHOOT:
                break
            state.log_step[place] -= math.log(2)


def on_line(path: Tensor, t: float, sizes: Sequence[int]) -> Tensor:
    """The straight surrogate of `path (T+1, P)` at time t, which need not be whole (MCT, Zhong et al., CVPR 2025).

        theta(t) = theta_0 + lambda_l(t) (theta_T - theta_0)

    with lambda_l the share of its path that layer l (of `sizes` parameters) has gone by time t.
    """
    steps = torch.stack([part.diff(dim=0).norm(dim=1) for part in path.split(list(sizes), 1)])  # (L, T)
    gone = F.pad(steps.cumsum(1), (1, 0))
    share = gone / gone[:, -1:].clamp_min(1e-30)
    whole = min(int(t), len(path) - 2)
    at = torch.lerp(share[:, whole], share[:, whole + 1], t - whole)
    return path[0] + at.repeat_interleave(torch.tensor(sizes, device=path.device)) * (path[-1] - path[0])


def make_plan(matching: Matching, state: State, rng: torch.Generator, experts: Sequence[int] | None = None) -> Plan:
    """A random expert (of `experts`, or of all), the next segment, and batches of the synthetic set."""
    config = matching.config
    choice = experts if experts is not None else range(len(matching.trajectories))
    expert = choice[int(torch.randint(len(choice), (1,), generator=rng))]
    path, segment = matching.trajectories[expert], _segment(matching, state, rng)
    times = (segment.start, (segment.start + segment.stop) / 2, segment.stop)
    if matching.method.line:
        straight, sizes = path[: matching.reach.end + matching.reach.length + 1], matching.net_of(expert).sizes
        begin, middle, target = (on_line(straight, t, sizes) for t in times)
    else:
        begin, middle, target = (path[round(t)] for t in times)
    # A far end needs more student steps (at most twice as many), else no synthetic set could reach it.
    first = (path[config.segment] - path[0]).norm()
    steps = math.ceil(config.syn_steps * float(((target - begin).norm() / first).clamp(1, 2)))
    total = len(state.images) + (len(matching.context[0]) if matching.context else 0)
    batches = [
        batch_of(index.to(begin.device), draw(matching.operations, rng), matching.scale)
        for index in indices(total, min(config.syn_batch, total), steps, rng)
    ]
    return Plan(expert, (begin, middle, target), batches)


def _segment(matching: Matching, state: State, rng: torch.Generator) -> Segment:
    assert matching.method.schedule is not None  # what makes a method one of trajectory matching
    return matching.method.schedule(state.iteration, matching.total, matching.reach, rng)


def indices(total: int, size: int, steps: int, rng: torch.Generator) -> list[Tensor]:
    """`steps` batches of equal size; every image is used once before one is used again."""
    if size == total:
        return [torch.arange(total)] * steps
    order = torch.cat([torch.randperm(total, generator=rng) for _ in range(math.ceil(steps * size / total))])
    return [order[i * size : (i + 1) * size] for i in range(steps)]


def batch_of(index: Tensor, op: Draw, scale: int = 1) -> Batch:
    return lambda images, labels: (augment(enlarge(images[index], scale), op), labels[index])


def _with_context(matching: Matching, state: State) -> tuple[Tensor, Tensor]:
    images, labels = state.images, matching.labels(state)
    if matching.context is None:
        return images, labels
    return torch.cat([images, matching.context[0]]), torch.cat([labels, matching.context[1]])


def run_student(matching: Matching, state: State, plan: Plan) -> Outcome:
    config, method, pool = matching.config, matching.method, len(matching.nets)
    images, labels = _with_context(matching, state)
    start, _, target = plan.points
    alpha = state.step_size[plan.expert % pool]
    path = unroll(matching.students[plan.expert % pool], start, images, labels, plan.batches, alpha)
    n, half = len(plan.batches), len(plan.batches) // 2
    progress = state.iteration / max(1, matching.total)
    mask = MASKS[method.mask](path[-1], start, target, keep=config.mask_keep, progress=progress)
    wanted = {n} | ({half} if method.shape and half else set())
    leaves = {i: path[i].detach().requires_grad_(True) for i in wanted}
    loss = mismatch(leaves[n], start, target, mask)
    if len(wanted) > 1:
        loss = loss + config.shape_weight * shape_difference((start, leaves[half], leaves[n]), plan.points)
    direct = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return Outcome(path, float(loss.detach()), direct)


def _update(matching: Matching, state: State, plan: Plan, outcome: Outcome) -> None:
    config, method, pool = matching.config, matching.method, len(matching.nets)
    place = plan.expert % pool
    images, labels = _with_context(matching, state)
    grads = adjoint(
        matching.students[place], outcome.path, images, labels, plan.batches, state.step_size[place], outcome.direct
    )
    m = len(state.images)
    # the student's loss is a mean over so many: an image's gradient shrinks with it
    shared = min(config.syn_batch, len(images))
    d_images = _clip(state, grads.images[:m])
    slow = torch.where(state.slow_until > state.iteration, 0.1, 1.0)
    d_images *= slow.view(-1, *[1] * (d_images.dim() - 1))
    state.image_velocity = 0.5 * state.image_velocity + d_images
    state.images = state.images - config.image_lr * shared * state.rate * state.image_velocity
    if method.learns_labels:
        with torch.enable_grad():
            logits = state.logits.requires_grad_(True)
            (d_logits,) = torch.autograd.grad(matching.labels(state), logits, grads.labels[:m])
        state.label_velocity = 0.9 * state.label_velocity + d_logits
        state.logits = state.logits.detach() - config.label_lr * shared * state.label_velocity
    update_step_size(config, state, place, grads)


def update_step_size(config: Config, state: State, place: int, grads: Gradients) -> None:
    """A step on the logarithm of the student's step size, for the architecture at `place` of the pool."""
    d_log_step = (state.step_size[place] * grads.step_size).clamp(-10, 10)
    state.log_step[place] = (state.log_step[place] - config.step_lr * d_log_step).clamp(
        math.log(1e-4), math.log(LONGEST)
    )


def _clip(state: State, d_images: Tensor) -> Tensor:
    """Per-image gradient clipping at CLIP times the running median, so that one wild segment cannot ruin an image."""
    norms = d_images.flatten(1).norm(dim=1)
    state.strength = 0.9 * state.strength + 0.1 * norms
    state.medians = [*state.medians[-99:], float(norms.median())]
    limit = CLIP * sorted(state.medians)[len(state.medians) // 2]
    scale = (limit / norms.clamp_min(1e-30)).clamp(max=1)
    return d_images * scale.view(-1, *[1] * (d_images.dim() - 1))


def _mitigate(matching: Matching, state: State) -> None:
    limits, checkpoints = matching.bundle.overlap_limits, len(matching.trajectories[0])
    if not limits:
        return
    stop = round(_segment(matching, state, state.rng).stop)
    stage = round((len(limits) - 1) * stop / (checkpoints - 1))
    thetas = [path[stop] for e, path in enumerate(matching.trajectories) if e % len(matching.nets) == 0][:3]

    def fresh(n: int, example: int) -> Tensor:
        return matching.shown(matching.fresh(state.targets[example].expand(n, -1), state.rng).to(state.images))

    shown = matching.shown(state.images)
    found = mitigate(matching.nets[0], thetas, shown, state.group, state.strength, limits[stage], fresh)
    for i, image in found:
        state.images[i], state.image_velocity[i] = reduce(image[None], matching.scale)[0], 0.0
        state.replaced += 1
        same = state.group == state.group[i]
        state.slow_until[same] = state.iteration + round(RETRAIN_FOR * matching.total)
        state.slow_until[i] = 0
