"""Two other places to distil at, with the budget of the union of the sites' sets.

central-distilled   all images at one place, by the method of the run: what the division over sites costs
fedavg-distilled    the server, which is sent no image and no set: the *global* way of federated averaging is the one expert
                    that trajectory matching (Cazenavette et al., CVPR 2022) follows. Under differential privacy that costs
                    nothing beyond the averaging
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fedistill.config import Config, lightness
from fedistill.data.dataset import Dataset
from fedistill.evaluation.arms import figures_beside
from fedistill.evaluation.fit import Material, select_and_test
from fedistill.experts.train import Task
from fedistill.matching.distil import distil, start
from fedistill.matching.problem import Bundle, one_each, prepare
from fedistill.methods.registry import METHODS, method_of
from fedistill.site.describe import task_of
from fedistill.site.job import Progress, advance, released_set
from fedistill.synthetic.set import SyntheticSet

EVERYWHERE = "all sites"


def ipc_of(merged: SyntheticSet) -> int:
    """Places per class of one set as large as the union."""
    return max(1, round(len(merged) / merged.per_place / len(merged.class_names)))


def distil_centrally(
    config: Config, pooled: Dataset, merged: SyntheticSet, work: Path, notify: Callable[[Progress], None]
) -> SyntheticSet:
    """The set that one site with all images would send, of as much work as all sites' sets together.

    It is kept in `work`, with the ledger that private work needs, and goes on there after a stop.
    """
    iterations = config.iterations * config.rounds
    if method_of(config).schedule is not None:  # whose iterations see a batch of the set, and not all of it
        iterations *= len(merged.sites)
    whole = dataclasses.replace(config, ipc=ipc_of(merged), rounds=1, iterations=iterations)
    while True:
        progress = advance(whole, pooled, EVERYWHERE, work, seconds=config.slice_seconds)
        if progress.done:
            return released_set(whole, pooled, EVERYWHERE, work)
        notify(progress)


def distil_path(config: Config, task: Task, model: str, path: Tensor, ipc: int) -> Material:
    """A set whose training leads a `model` along the global parameters `path` `(R+1, P)` of averaging."""
    about = dataclasses.replace(
        config, method="mtt", model=model, experts=1, checkpoint_every=1, expert_steps=len(path) - 1, ipc=ipc, rounds=1,
        formation=1, budget="equal", init="noise", labels="auto", mask="auto", overlap="auto", denoise="none", window=1.0,
        iterations=max(1, config.rounds * config.iterations // lightness(config.method, config.ipc)),
    )  # fmt: skip
    most = ipc * task.classes  # which findings occur together is not known to the server
    findings = tuple((tuple(row), most) for row in one_each(task.classes)) if task.kind == "multilabel" else ()
    bundle = Bundle(task=task, trajectories=(path,), counts=(ipc,) * task.classes, findings=findings)
    matching = prepare(about, METHODS["mtt"], bundle)
    state = start(matching, EVERYWHERE)
    distil(matching, state, until=math.inf)
    return Material(state.images.cpu(), matching.labels(state).cpu())


def figures_of_set(
    config: Config, data: Dataset, model: str, material: Material, upload: int, rounds: int
) -> dict[str, Any]:
    result = select_and_test(config, task_of(data), model, material, data.val, data.test)
    return figures_beside(result, images=len(material.images), upload=upload, rounds=rounds)
