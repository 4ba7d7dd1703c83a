"""What a distillation is given, and what stays fixed while it runs.

Nothing here can reach the site's images: the input is a `Bundle` of experts and public facts. Only methods that say so
(`Method.sees_images`) and `init="real"` are handed real images, by name, and a release says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import Config
from fedistill.data.phantoms import phantoms_like
from fedistill.data.public import normalise
from fedistill.errors import FedistillError
from fedistill.experts.train import Task, architectures_of
from fedistill.matching.schedule import Reach
from fedistill.matching.student import Loss, Student, student_of
from fedistill.models.enlarge import enlarge, shrink
from fedistill.models.flat import Flat, device_of
from fedistill.models.loss import answers_of, groups_of, loss_of, targets_of

if TYPE_CHECKING:
    from fedistill.matching.state import State
    from fedistill.methods.registry import Method

NOISE = 0.3  # deviation of noise images; with 1.0 the leftover noise hides the lesson where sites' sets are merged
FEW = 5  # real images of a class


def formation_of(config: Config, task: Task) -> int:
    """The side of an image over that of one as it is kept.

    Where the setting is 0: 2 where that did better on validation (docs/benchmark.md, "Smaller images, more of them"), else 1.
    """
    if config.formation:
        return config.formation
    sides = task.geometry[1:]
    measured = config.method == "dm" and task.kind == "multiclass" and len(sides) == 2
    return 2 if measured and all(side >= 28 and side % 2 == 0 for side in sides) else 1


def per_place(config: Config, task: Task) -> int:
    """Images in the place of one: 1, or several smaller ones (`formation_of`)."""
    return formation_of(config, task) ** len(task.geometry[1:])


def images_per_class(config: Config, task: Task) -> int:
    """Synthetic images per class and site: those of `ipc` places."""
    return config.ipc * per_place(config, task)


def budget_of(counts: Sequence[int], ipc: int, policy: str) -> list[int]:
    """Synthetic images per class: `ipc` on average over the classes that are there, never more than real images.

    equal: the same for all. proportional, sqrt: in proportion to the number of real images or its root, at least one.
    """
    present = [n for n in counts if n]
    if policy == "equal":
        return [min(ipc, n) for n in counts]
    weight = [n if policy == "proportional" else math.sqrt(n) for n in counts]
    total = ipc * len(present)
    return [min(n, max(1, round(total * w / sum(weight)))) if n else 0 for n, w in zip(counts, weight, strict=True)]


def most_images(task: Task, *, ipc: int, counts: Sequence[int], policy: str) -> int:
    """The most synthetic images that a site with `counts` real images per class may send."""
    return ipc * task.classes if task.kind == "multilabel" else sum(budget_of(counts, ipc, policy))


@dataclass(frozen=True)
class Bundle:
    """What expert training leaves behind.

    trajectories: `(T+1, P)` each; expert e has the e-th architecture of the pool, in turns.
    counts: real images per class (per finding for multi-label tasks). noisy: they hold noise, and say no more than was paid for.
    overlap_limits: one row per stored stage, one figure per class.
    findings: label vectors that occur and how often, for multi-label tasks only.
    sketch: sums of public features of each class, for the method that is made of them (`methods.sketch`).
    """

    task: Task
    trajectories: tuple[Tensor, ...]
    counts: tuple[int, ...]
    overlap_limits: tuple[tuple[float, ...], ...] = ()
    findings: tuple[tuple[tuple[int, ...], int], ...] = ()
    sketch: Tensor | None = None
    noisy: bool = False

    def size(self, config: Config) -> int:
        """Images that are to be made."""
        ipc = images_per_class(config, self.task)
        return most_images(self.task, ipc=ipc, counts=self.counts, policy=config.budget)

    def targets(self, config: Config) -> Tensor:
        """Targets `(m, K)` of the images to be made, sorted by class."""
        wanted = images_per_class(config, self.task)
        if self.task.kind == "multilabel":
            return cover(self.findings, wanted * self.task.classes)
        budget = budget_of(self.counts, wanted, config.budget)
        return targets_of(
            torch.cat([torch.full((n,), c) for c, n in enumerate(budget)]), self.task.classes, self.task.kind
        )

    def notes(self, config: Config) -> tuple[str, ...]:
        """What the budget of a class was cut to, and which classes have so few images that each of them shows."""
        if self.task.kind == "multilabel":
            return ()
        ipc = images_per_class(config, self.task)
        notes = []
        for name, n in zip(self.task.class_names, self.counts, strict=True):
            if self.noisy:
                if n < ipc:
                    why = f"a noisy count of {n}" if n else "no more images than noise"
                    notes.append(f"class {name}: {why}, so {n or 'no'} synthetic instead of {ipc}")
            elif n == 0:
                notes.append(f"class {name}: no image at this site, so none is synthesised")
            elif n < max(ipc, FEW):
                cut = f", so {n} synthetic instead of {ipc}" if n < ipc else ""
                close = "; what is made of so few may resemble them" if n < FEW else ""
                notes.append(f"class {name}: {n} real image{'s' * (n > 1)}{cut}{close}")
        return tuple(notes)


def cover(findings: Sequence[tuple[Sequence[int], int]], m: int) -> Tensor:
    """`m` label vectors `(m, K)` out of those that occur, by greedy coverage: always the one whose findings are rarest so far.

    No vector is taken more often than it occurs. Raises `FedistillError` when there are fewer than `m` real images.
    """
    left = [n for _, n in findings]
    if sum(left) < m:
        raise FedistillError("budget", f"{m} synthetic images are asked for, and the site has {sum(left)} images.")
    rows = torch.tensor([row for row, _ in findings], dtype=torch.float32)
    both = torch.cat([rows, 1 - rows.amax(1, keepdim=True)], 1)  # "no finding" counts as a finding
    seen, chosen = torch.zeros(both.shape[1]), []
    for _ in range(m):
        merit = (both / (1 + seen)).sum(1) / both.sum(1)
        merit[torch.tensor(left) == 0] = -1.0
        pick = int(merit.argmax())
        left[pick] -= 1
        seen += both[pick]
        chosen.append(rows[pick])
    return torch.stack(chosen)


def one_each(classes: int) -> list[list[int]]:
    """Label vectors of one finding each, and of none: what is left where it is not known which occur together."""
    return [[int(k == c) for k in range(classes)] for c in range(classes + 1)]


def membership(targets: Tensor, kind: str) -> Tensor:
    """Whether an image shows a class, `(m, K)` of 0 and 1; for multi-label `(m, K+1)`, the last column being "no finding"."""
    if kind == "multilabel":
        return torch.cat([targets, 1 - targets.amax(1, keepdim=True)], 1)
    return F.one_hot(targets.argmax(1), targets.shape[1]).to(targets.dtype)


@dataclass(frozen=True)
class Real:
    """A site's training images `(n, C, H, W)` uint8 and targets `(n, K)`, for what is allowed to see them."""

    images: Tensor
    targets: Tensor
    task: Task

    @cached_property
    def members(self) -> list[Tensor]:
        """Positions of the images that show each class (and, for multi-label, of those without a finding)."""
        return [torch.nonzero(column).flatten() for column in membership(self.targets, self.task.kind).T]

    @cached_property
    def groups(self) -> Tensor:
        """The group `(n,)` of each image: unlike `members`, no image is in two."""
        return groups_of(self.targets, self.task.kind)

    def of_group(self, c: int) -> Tensor:
        """Positions of the images of group `c`."""
        return torch.nonzero(self.groups == c).flatten()

    def batch(self, index: Tensor) -> Tensor:
        """Normalised images `(k, C, H, W)`."""
        return normalise(self.images[index], self.task.modality)


@dataclass(frozen=True)
class Matching:
    """Everything that stays fixed while one site distils."""

    config: Config
    method: Method
    nets: tuple[Flat, ...]  # the pool of architectures
    students: tuple[Student, ...]
    operations: tuple[str, ...]
    bundle: Bundle
    trajectories: tuple[Tensor, ...]  # on the device
    reach: Reach
    real: Real | None
    context: tuple[Tensor, Tensor] | None  # images and labels of other sites, constant, from an earlier round
    round: int = 1
    prepared: Any = None  # what the method made of the bundle before its first step

    @property
    def device(self) -> torch.device:
        return device_of(self.config.device)

    @property
    def scale(self) -> int:
        """The side of an image as it is shown over that of one as it is kept."""
        return formation_of(self.config, self.bundle.task)

    @property
    def total(self) -> int:
        """Iterations over all rounds."""
        return self.config.iterations * self.config.rounds

    @property
    def goal(self) -> int:
        """Iterations after which this round is done."""
        return self.config.iterations * self.round

    def net_of(self, expert: int) -> Flat:
        return self.nets[expert % len(self.nets)]

    def seen(self) -> Real:
        """The real images. Raises `FedistillError` where this distillation was not given any."""
        if self.real is None:
            raise FedistillError(
                "no-real-images",
                f"method={self.config.method} with init={self.config.init} needs the site's images, "
                "and this distillation has no access to them.",
            )
        return self.real

    def fresh(self, targets: Tensor, rng: torch.Generator) -> Tensor:
        """Starting images `(n, C, h, w)`, normalised and as small as they are kept, for `targets (n, K)`."""
        n, (channels, *size) = len(targets), self.bundle.task.geometry
        if self.config.init == "noise":
            return NOISE * torch.randn((n, channels, *(side // self.scale for side in size)), generator=rng)
        if self.config.init == "phantom":
            whole = normalise(phantoms_like(self.bundle.task.geometry, n, rng), self.bundle.task.modality)
        else:
            whole = self.seen().batch(draw_like(targets.cpu(), self.seen(), rng))
        return shrink(whole, self.scale)

    def shown(self, images: Tensor) -> Tensor:
        """Images `(n, C, H, W)` as networks see them, of those that are kept."""
        return enlarge(images, self.scale)

    def labels(self, state: State) -> Tensor:
        """Labels `(m, K)` as they are now: fixed, learned, or the experts' opinion of the images."""
        kind = self.bundle.task.kind
        if not self.method.soft_labels:
            return state.targets
        if self.method.learns_labels:
            return answers_of(kind, state.logits)
        return answers_of(kind, self.opinions(state.images, state.targets))

    @torch.no_grad()
    def opinions(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean logits `(m, K)` of the final experts that classify an image as it is meant; confident ones where none does.

        images: as they are kept.
        """
        images = self.shown(images)
        logits = torch.stack([self.net_of(e)(t[-1], images) for e, t in enumerate(self.trajectories)])  # (E, m, K)
        if self.bundle.task.kind == "multilabel":
            right = ((logits > 0) == (targets > 0.5)).float().mean(2, keepdim=True) > 0.5
            sure = 6.0 * targets - 3.0
        else:
            right = (logits.argmax(2) == targets.argmax(1)).unsqueeze(2)
            sure = 4.0 * targets
        count = right.sum(0)
        return torch.where(count > 0, (logits * right).sum(0) / count.clamp_min(1), sure)


def draw_like(targets: Tensor, real: Real, rng: torch.Generator) -> Tensor:
    """Positions `(n,)` of random real images that show what `targets (n, K)` ask for, each at most once where there are enough."""
    if real.task.kind == "multilabel":
        distance = torch.cdist(targets, real.targets.float(), p=1)
        distance += 0.5 * torch.rand(distance.shape, generator=rng)  # ties at random
        chosen: list[int] = []
        for row in distance:
            row[chosen] = math.inf
            chosen.append(int(row.argmin()))
        return torch.tensor(chosen)
    index = torch.empty(len(targets), dtype=torch.int64)
    for c, pool in enumerate(real.members):
        wanted = torch.nonzero(targets.argmax(1) == c).flatten()
        order = torch.randperm(len(pool), generator=rng)
        if len(wanted):
            index[wanted] = pool[order.repeat(-(-len(wanted) // len(pool)))[: len(wanted)]]
    return index


def horizon(config: Config, method: Method) -> int:
    """Checkpoints of an expert that are needed after the first: what the schedule can reach, or all where the end counts.

    All of a private expert, too: its steps are paid for together, and what comes later makes what comes before less noisy.
    """
    total = config.expert_steps // config.checkpoint_every
    if method.schedule is None or method.soft_labels or config.privacy == "dp":
        return total
    return reach_of(config).end + config.segment


def reach_of(config: Config) -> Reach:
    checkpoints = config.expert_steps // config.checkpoint_every
    return Reach(config.segment, round(config.window_share() * (checkpoints - config.segment)))


def check_segment(config: Config, method: Method) -> None:
    """Raise `FedistillError` when an expert has no room for one segment of what is matched."""
    if method.schedule is not None and config.segment > config.expert_steps // config.checkpoint_every:
        raise FedistillError(
            "segment-too-long",
            f"segment={config.segment} needs more checkpoints than an expert has "
            f"({config.expert_steps // config.checkpoint_every + 1}): raise expert_steps or lower segment.",
        )


def prepare(
    config: Config,
    method: Method,
    bundle: Bundle,
    *,
    real: Real | None = None,
    context: tuple[Tensor, Tensor] | None = None,
    round: int = 1,
) -> Matching:
    """Check that the configuration fits the experts. Raises `FedistillError` where it does not."""
    check_segment(config, method)
    task = bundle.task
    compiled = worth_compiling(config, task, bundle.size(config) + (len(context[0]) if context else 0))
    nets = tuple(task.network(name, config) for name in architectures_of(config))
    return Matching(
        config=config,
        method=method,
        nets=nets,
        students=tuple(student_of(_loss(task.kind, net), compiled=compiled) for net in nets),
        operations=task.operations(config) if method.augments else (),
        bundle=bundle,
        trajectories=tuple(t.to(device_of(config.device)) for t in bundle.trajectories),
        reach=reach_of(config),
        real=real,
        context=context,
        round=round,
        prepared=method.prepare(config, bundle) if method.prepare is not None else None,
    )


def _loss(kind: str, net: Flat) -> Loss:
    return lambda theta, x, y: loss_of(kind, net(theta, x), y)


def worth_compiling(config: Config, task: Task, images: int) -> bool:
    """Whether compilation (half a minute, once per shape of batch) is expected to pay. images: that batches are drawn from.

    It saves about a third of the time of a width-32 ConvNet and half of a width-128 one.
    """
    if config.compile != "auto":
        return config.compile == "on"
    pixels = math.prod(task.geometry[1:])
    work = config.iterations * config.syn_steps * min(config.syn_batch, images) * pixels * config.width**2
    return work > 1.5e11  # about a minute saved on one core
