"""One-shot federated learning: every site sends one network that it trained alone, and the server makes of them what it can.

ensemble            the mean answer of the sites' networks (Guha et al., arXiv 1902.11175)
one-shot            their mean parameters, weighted by records: all begin at the same ones (one round of McMahan et al.)
ensemble-distilled  a fresh network that learns the ensemble's answers to public phantoms (after Lin et al., FedDF,
                    NeurIPS 2020, in one round)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.data.phantoms import phantoms_like
from fedistill.evaluation.arms import figures_beside
from fedistill.evaluation.average import mean_of, nets_of
from fedistill.evaluation.fit import LEARNING_RATES, Material, choose_and_test, predict_together, select_and_test
from fedistill.experts.train import Task
from fedistill.files import read_tensors, write_tensors
from fedistill.models.flat import Flat
from fedistill.seeding import generator
from fedistill.site.average import Local, name_of
from fedistill.site.describe import task_of

PHANTOMS = 2000
Ask = Callable[[list[str]], Mapping[str, Local]]  # names of networks -> what each site answers


def evaluate_alone(
    config: Config, data: Dataset, model: str, ask: Ask, folder: Path, arms: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Figures of those of the three arms that are asked for. What sites sent is kept in `folder` and not asked for again."""
    task = task_of(data)
    rates = (config.dp_lr,) if config.privacy == "dp" else LEARNING_RATES
    judged = partial(
        choose_and_test,
        config,
        task,
        model,
        val=data.val,
        test=data.test,
        rates=rates,
        nets=nets_of(config),
    )
    sites: list[int] = []

    def locals_of(todo: Sequence[tuple[float, int]]) -> dict[str, list[Local]]:
        names = [name_of(model, rate, seed) for rate, seed in todo]
        found = _stored(folder, names, ask)
        sites.append(len(found))
        return {name: [Local({name: local.thetas[name]}, local.records) for local in found] for name in names}

    def stacked(todo: Sequence[tuple[float, int]]) -> list[Tensor]:
        return [torch.stack([each.thetas[name] for each in found]) for name, found in locals_of(todo).items()]

    def means(todo: Sequence[tuple[float, int]]) -> list[Tensor]:
        return [mean_of(found)[name] for name, found in locals_of(todo).items()]

    def together(net: Flat, thetas: Tensor, images: Tensor, task: Task) -> Tensor:
        return predict_together([(net, theta) for theta in thetas], images, task)

    results = {}
    if "one-shot" in arms:
        results["one-shot"] = judged(train=means)
    if {"ensemble", "ensemble-distilled"} & set(arms):
        ensemble = judged(train=stacked, answer=together)
        if "ensemble" in arms:
            results["ensemble"] = ensemble
        if "ensemble-distilled" in arms:
            images = phantoms_like(data.geometry, PHANTOMS, generator(config.seed, "comparison phantoms"))
            answers = together(task.network(model, config), ensemble.thetas[0], images, task)
            results["ensemble-distilled"] = select_and_test(
                config, task, model, Material(images, answers), data.val, data.test
            )
    upload = sites[0] * 4 * task.network(model, config).size
    return {name: figures_beside(result, images=None, upload=upload, rounds=1) for name, result in results.items()}


def _stored(folder: Path, names: list[str], ask: Ask) -> list[Local]:
    """The answer of each site, in the order of their names."""
    file = folder / f"{hashlib.sha256('|'.join(names).encode()).hexdigest()[:12]}.safetensors"
    if not file.exists():
        answers = dict(sorted(ask(names).items()))
        parts = {f"{k}|{name}": a.thetas[name] for k, a in enumerate(answers.values()) for name in names}
        write_tensors(file, parts, {"records": [answer.records for answer in answers.values()]})
    found, about = read_tensors(file)
    return [
        Local({name: found[f"{k}|{name}"] for name in names}, int(records))
        for k, records in enumerate(about["records"])
    ]
