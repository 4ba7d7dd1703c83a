"""The arms of comparison that take messages, or minutes: what `fedistill.evaluation` says of them, with the sites behind Flower."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedistill.data.dataset import Dataset
from fedistill.data.partition import Partition
from fedistill.errors import FedistillError
from fedistill.evaluation.alone import evaluate_alone
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.average import averaged_models, evaluate_average, path_of
from fedistill.evaluation.comparators import ALONE, AVERAGED, arm_of, comparators
from fedistill.evaluation.distilled import distil_centrally, distil_path, figures_of_set, ipc_of
from fedistill.evaluation.fit import Material
from fedistill.files import read_json, write_json
from fedistill.site.average import Local
from fedistill.site.describe import task_of
from fedistill.site.job import Progress
from fedistill.synthetic.set import SyntheticSet
from server.collect import job, with_arrays
from server.replies import read_local
from server.stages import Run, _ask, _below

Figures = dict[str, dict[str, Any]]  # of each arm


def compare(
    run: Run, nodes: Mapping[int, str], data: Dataset, parts: Partition, merged: SyntheticSet, needed: int
) -> dict[str, Figures]:
    """Figures per architecture of all that the configuration compares with; what is finished is in the run folder.

    Raises `FedistillError` ("quorum") where fewer than `needed` sites answer.
    """
    config, names = run.config, comparators(run.config)
    nodes = {node: site for node, site in nodes.items() if site in merged.sites}  # as in the other arms
    needed = min(needed, len(nodes))
    results: dict[str, Figures] = {model: {} for model in architectures(config)}

    def keep(name: str, model: str, work: Callable[[], Figures]) -> None:
        file = run.folder / "compare" / f"{name}-{model}.json"
        if not file.exists():
            run.note("", "evaluate", "progress", message=f"{name} with {model}")
            try:
                write_json(file, work())
            except FedistillError as error:
                if error.code == "quorum":
                    raise
                run.note("", "evaluate", "note", message=f"{name} with {model} is left out: {error.sentence}")
                return
        results[model] |= {arm_of(config, arm): figures for arm, figures in read_json(file).items()}

    for model in averaged_models(config):
        folder = run.folder / "compare" / model
        for name in (AVERAGED, "fedprox"):
            if config.fl_rounds and name in (AVERAGED, *names):
                keep(name, model, partial(_averaged, run, nodes, data, model, name, folder, needed))
        if alone := [name for name in ALONE if name in names]:
            keep("alone", model, partial(_alone, run, nodes, data, model, alone, folder, needed))
        if "fedavg-distilled" in names:
            averaged = results[model][arm_of(config, AVERAGED)]
            keep("path", model, partial(_of_path, run, data, model, merged, averaged, folder))
    if "central-distilled" in names:
        for model in architectures(config):
            keep("central", model, partial(_central, run, data, parts, model, merged))
    return results


def _averaged(
    run: Run, nodes: Mapping[int, str], data: Dataset, model: str, name: str, folder: Path, needed: int
) -> Figures:
    """A site that fails is left out of that round; one that is late, of all that follow."""
    config, left = run.config, dict(nodes)
    proximal = {"proximal-mu": config.fl_mu} if name == "fedprox" else {}  # as Flower's own strategy calls it

    def ask(round: int, thetas: dict[str, Tensor]) -> dict[str, Local]:
        run.note("", "evaluate", "progress", step=round - 1, total=config.fl_rounds, message=arm_of(config, name))
        arrays = {name: theta.numpy() for name, theta in thetas.items()}
        content = with_arrays(job(config, round=round, run=run.word, **proximal), "models", arrays)
        sizes = {name: len(theta) for name, theta in thetas.items()}
        return _locals(run, "train.fedavg", nodes, left, content, sizes, needed)

    return evaluate_average(config, data, model, ask, folder / name, name)


def _alone(
    run: Run, nodes: Mapping[int, str], data: Dataset, model: str, arms: list[str], folder: Path, needed: int
) -> Figures:
    size = task_of(data).network(model, run.config).size

    def ask(names: list[str]) -> dict[str, Local]:
        content = job(run.config, networks=json.dumps(names), run=run.word)
        return _locals(run, "train.alone", nodes, dict(nodes), content, dict.fromkeys(names, size), needed)

    return evaluate_alone(run.config, data, model, ask, folder / "alone", arms)


def _locals(
    run: Run,
    kind: str,
    nodes: Mapping[int, str],
    left: dict[int, str],
    content: RecordDict,
    sizes: Mapping[str, int],
    needed: int,
) -> dict[str, Local]:
    """The parameters that the nodes in `left` answer with; those that are late are taken out of it."""
    answers: dict[str, Local] = {}

    def receive(node: int, reply: RecordDict) -> None:
        answers[nodes[node]] = read_local(reply, sizes)

    failures = _ask(run, kind, dict.fromkeys(left, content), receive, nodes, run.config.deadline)
    if len(answers) < needed:
        raise _below(needed, len(answers), [(nodes[node], f.reason) for node, f in failures.items()])
    for node, failure in failures.items():
        if failure.status == "late":
            del left[node]
    return dict(sorted(answers.items()))  # a sum in floating point depends on its order


def _of_path(
    run: Run, data: Dataset, model: str, merged: SyntheticSet, averaged: Mapping[str, Any], folder: Path
) -> Figures:
    config, task = run.config, task_of(data)
    path = path_of(config, task, model, folder / AVERAGED, averaged["learning_rate"][0])
    material = distil_path(config, task, model, path, ipc_of(merged))
    upload = averaged["upload_bytes"]
    return {"fedavg-distilled": figures_of_set(config, data, model, material, upload, config.fl_rounds)}


def _central(run: Run, data: Dataset, parts: Partition, model: str, merged: SyntheticSet) -> Figures:
    there = [index for name, index in zip(parts.names, parts.index, strict=True) if name in merged.sites]
    index = {key: torch.cat([of_site[key] for of_site in there]).sort().values for key in data.splits}
    pooled = dataclasses.replace(data.at(index, data.name), site_names=("all",))

    def notify(now: Progress) -> None:
        run.note("", "evaluate", "progress", step=now.step, total=now.total, message="central-distilled")

    made = distil_centrally(run.config, pooled, merged, Path(run.config.work) / "central", notify)
    upload = pooled.train.images.numel()
    return {"central-distilled": figures_of_set(run.config, data, model, Material(made.images, made.labels), upload, 1)}
