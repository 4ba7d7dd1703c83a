"""What a study will roughly take: seconds, memory and disk per cell, from counts of steps and from what finished cells took.

The unit of time is one image through one training step of a ConvNet of width 32 and depth 3 at 28 pixels, on one core:

    experts      sites x experts x steps x batch                       once for all cells that share them
    distillation sites x rounds x iterations x images per iteration    (a trajectory's step counts four times: there and back twice)
    evaluation   arms x models x (5 learning rates + networks - 1) x steps x batch    the arms on real images once
    comparison   rounds x sites x steps x batch x learning rates that go on, for the arms that `compare` and `fl_rounds` ask for

Where cells of the study are finished, the ratio of what they took to what this says corrects it for this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedistill.config import Config, lightness
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.average import going_on, nets_of, rates_of, shown_rounds
from fedistill.evaluation.comparators import ALONE, comparators
from fedistill.evaluation.fit import LEARNING_RATES
from fedistill.experts.train import Task
from fedistill.matching.problem import horizon, images_per_class
from fedistill.methods.registry import method_of
from fedistill.study.plan import Cell

SECONDS_PER_IMAGE = 3e-4  # the unit, on a core of 2023
SECONDS_PER_RUN = 20.0  # start and end of an engine
MEMORY, MEMORY_PER_SITE, MEMORY_PER_CORE = (
    500_000_000,
    500_000_000,
    600_000_000,
)  # bytes: a run, a site at work, a core of the server
DISK_PER_SITE = 100_000  # bytes of reports and sets
UNKNOWN_CLASSES, UNKNOWN_SITES, UNKNOWN_PIXELS = 5, 3, 28  # of data that only the run will load


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one cell, in the order of the work. seconds: of its own processes, one after the other. networks: experts it trains."""

    seconds: float
    memory: int
    disk: int
    networks: int


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How many expert networks the cells use, and how many are trained for that."""

    used: int
    trained: int


def estimates(cells: Sequence[Cell], *, cores: int) -> list[Estimate]:
    """Of every cell, if the cells are worked off in this order. cores: that one cell may use."""
    trained: set[str] = set()
    compared: set[str] = set()
    return [_estimate(cell.config, cores, trained, compared) for cell in cells]


def sharing(cells: Sequence[Cell]) -> Sharing:
    using = [cell for cell in cells if method_of(cell.config).experts]
    first = {cell.experts: cell for cell in using}
    return Sharing(
        used=sum(_networks(cell.config) for cell in using),
        trained=sum(_networks(cell.config) for cell in first.values()),
    )


def disk_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _comparing(c: Config, sites: int, trainings: int, distilling: float) -> float:
    """Image passes of the arms that are only run for comparison."""
    names, private = comparators(c), c.privacy == "dp"
    shown, rates = shown_rounds(c), len(rates_of(c))
    rounds, before = 0, 0
    for round in shown if c.fl_rounds else ():
        rounds += rates * (round - before)
        rates, before = going_on(c, round, rates), round
    rounds += (nets_of(c) - 1) * c.fl_rounds
    work = rounds * c.fl_steps * sites * c.expert_batch * (1 + ("fedprox" in names))
    if set(ALONE) & set(names):
        work += c.expert_steps * c.expert_batch * sites if private else trainings * c.eval_steps * c.eval_batch * sites
    evaluated = trainings * c.eval_steps * c.eval_batch
    work += evaluated * sum(name.endswith("distilled") for name in names)
    if "fedavg-distilled" in names:
        work += c.iterations // lightness(c.method, c.ipc) * 4 * c.syn_steps * c.syn_batch
    return work + distilling * ("central-distilled" in names)


def _estimate(c: Config, cores: int, trained: set[str], compared: set[str]) -> Estimate:
    method, sites, classes = method_of(c), _sites(c), _classes(c)
    size = _pixels(c)
    weight = (size / 28) ** 2 * max(1, c.phantom_depth if c.data == "phantom" else 1) * (c.width / 32) ** 1.5
    networks, steps, parameters = 0, 0, 0
    if method.experts:
        steps = horizon(c, method) * c.checkpoint_every
        if c.key("data", "experts") not in trained:
            trained.add(c.key("data", "experts"))
            networks = _networks(c)
            parameters = _parameters(c, size, classes)
    experts = networks * steps * c.expert_batch
    kind = "multiclass" if c.task == "auto" else c.task
    images = images_per_class(c, Task((1, size, size), (), "", kind)) * classes
    if method.schedule is not None:
        per_iteration = 4 * c.syn_steps * min(images, c.syn_batch)
    elif method.sees_images and method.select is None:
        per_iteration = classes * c.real_batch + 2 * images
    else:
        per_iteration = 2 * images
    distilling = 0 if method.select else sites * c.rounds * c.iterations * per_iteration
    if method.meets_others:
        distilling += (c.rounds - 1) * sites * c.experts * steps * c.expert_batch
    made = min(c.eval_batch, sites * images)
    arms = 2 * made
    shared = f"{c.key('data')}, {c.eval_models}, {c.eval_nets}, {c.eval_steps}, {c.eval_batch}, {c.seed}"
    if shared not in compared:  # local only, and all real images
        compared.add(shared)
        arms += (sites + 1) * c.eval_batch
    trainings = len(LEARNING_RATES) + c.eval_nets - 1
    evaluation = len(architectures(c)) * trainings * c.eval_steps * arms
    compared_with = _comparing(c, sites, trainings, distilling)
    at_once = min(cores, sites)
    seeds = c.seeds
    work = experts + seeds * (distilling + evaluation + compared_with)
    return Estimate(
        seconds=SECONDS_PER_RUN + SECONDS_PER_IMAGE * weight * work / at_once,
        memory=MEMORY + MEMORY_PER_SITE * at_once + MEMORY_PER_CORE * cores,
        disk=int(
            networks * parameters * (2 * steps // c.checkpoint_every + 8)
            + seeds * sites * (DISK_PER_SITE + 3 * 4 * images * size * size)
        ),
        networks=networks,
    )


def _networks(c: Config) -> int:
    return c.experts * _sites(c) * c.seeds


def _sites(c: Config) -> int:
    return c.sites or UNKNOWN_SITES


def _classes(c: Config) -> int:
    return c.phantom_classes if c.data == "phantom" else UNKNOWN_CLASSES


def _pixels(c: Config) -> int:
    return c.image_size or (c.phantom_size if c.data == "phantom" else UNKNOWN_PIXELS)


def _parameters(c: Config, size: int, classes: int) -> int:
    """Of a ConvNet."""
    return 9 * c.width * (1 + (c.depth - 1) * c.width) + c.width * (size >> c.depth) ** 2 * classes
