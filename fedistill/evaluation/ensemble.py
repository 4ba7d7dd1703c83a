"""The experts themselves as the model: what a site could send instead of a set, and the bound of what private experts can teach."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset, Split
from fedistill.evaluation.fit import Result, predict_together
from fedistill.evaluation.metrics import score
from fedistill.experts.train import Task, architectures_of


def ensemble(config: Config, task: Task, trajectories: Sequence[Sequence[Tensor]], data: Dataset) -> Result:
    """One-shot ensemble (Guha et al., arXiv 1902.11175): the mean answer of the last checkpoints of all sites' experts.

    trajectories: `(T+1, P)` of each expert of each site.
    """
    began = time.monotonic()
    names = architectures_of(config)
    nets = [task.network(name, config) for name in names]
    thetas = [(nets[e % len(nets)], path[-1]) for site in trajectories for e, path in enumerate(site)]

    def scores(part: Split) -> list[dict[str, object]]:
        return [score(predict_together(thetas, part.images, task), part.labels, task.kind)]

    return Result(scores(data.test), scores(data.val), config.expert_lr, time.monotonic() - began, [])
