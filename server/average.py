"""The arm of federated averaging: the same rounds as `fedistill.evaluation.average`, with the sites at the other end of Flower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import RecordDict
from torch import Tensor

from fedistill.data.dataset import Dataset
from fedistill.evaluation.average import arm_of, averaged_models, evaluate_average
from fedistill.site.average import Local
from server.collect import job, with_arrays
from server.replies import read_local
from server.stages import Run, _ask, _below


def average(run: Run, nodes: Mapping[int, str], data: Dataset, needed: int) -> dict[str, dict[str, Any]]:
    """Figures of the arm for every architecture that is averaged.

    A site that fails is left out of that round; one that is late, of all that follow. Raises `FedistillError` ("quorum") where
    fewer than `needed` sites answer a round. Finished rounds are in the run folder.
    """
    config, arm, left = run.config, arm_of(run.config), dict(nodes)

    def ask(round: int, thetas: dict[str, Tensor]) -> dict[str, Local]:
        run.note("", "evaluate", "progress", step=round - 1, total=config.fl_rounds, message=arm)
        answers: dict[str, Local] = {}

        def receive(node: int, content: RecordDict) -> None:
            answers[nodes[node]] = read_local(content, {name: len(theta) for name, theta in thetas.items()})

        arrays = {name: theta.numpy() for name, theta in thetas.items()}
        content = with_arrays(job(config, round=round, run=run.word), "models", arrays)
        failures = _ask(run, "train.fedavg", dict.fromkeys(left, content), receive, nodes, config.deadline)
        if len(answers) < needed:
            raise _below(needed, len(answers), [(nodes[node], f.reason) for node, f in failures.items()])
        for node, failure in failures.items():
            if failure.status == "late":
                del left[node]
        return dict(sorted(answers.items()))  # a sum in floating point depends on its order

    return {
        model: {arm: evaluate_average(config, data, model, ask, run.folder / "average" / model)}
        for model in averaged_models(config)
    }
