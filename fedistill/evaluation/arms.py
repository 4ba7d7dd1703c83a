"""The arms of every report, all under one protocol (`evaluation.fit`): what the distilled union is compared with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import ALGORITHM, Config, listed
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import Partition
from fedistill.errors import FedistillError
from fedistill.evaluation.fit import LEARNING_RATES, Material, Result, fit_all, of_split, predict, select_and_test
from fedistill.evaluation.metrics import counts_of, mean_std
from fedistill.experts.train import Task
from fedistill.files import read_json, read_tensors, write_json, write_tensors
from fedistill.models.flat import Flat, device_of
from fedistill.models.nets import known_model
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import encode, size

Notify = Callable[[int, int, str], None]  # (step, total, message)


@dataclass(frozen=True)
class Arm:
    """One thing to train on; `local_only` has one per site, whose figures are averaged."""

    name: str
    materials: list[Material]
    upload_bytes: int
    rounds: int | None = None  # after which it is judged, where there are several

    @property
    def images(self) -> float:
        return sum(len(m.images) for m in self.materials) / len(self.materials)


def architectures(config: Config) -> list[str]:
    """The global models of a run, the headline first. Raises `FedistillError` on an unknown name."""
    return [known_model(name) for name in listed(config.eval_models)] or ["convnet"]


def random_real(data: Dataset, part: Partition, counts: dict[str, list[int]], seed: int) -> Split:
    """Random real training images: as many per site and class as `counts` says the site released."""
    chosen = []
    for name, index in zip(part.names, part.index, strict=True):
        local, rng = data.train.take(index["train"]), generator(seed, "random-real", name)
        if name in counts:
            chosen.append(index["train"][draw_as_many(local.labels, counts[name], rng)])
    return data.train.take(torch.cat(chosen))


def budget_in_whole_images(made: SyntheticSet, counts: Tensor) -> list[int]:
    """As many images of the whole size per class as take the bytes of `counts (K,)` images of the set, rounded up."""
    return [-(-n // made.per_place) for n in counts.tolist()]


def draw_of_each(labels: Tensor, counts: Sequence[int], rng: torch.Generator) -> Tensor:
    """Random positions in `labels` `(n,)`, `counts[c]` of each class c; in labels of several findings `(n, K)` as many in all."""
    if labels.dim() == 2:
        return torch.randperm(len(labels), generator=rng)[: sum(counts)]
    chosen = []
    for c, n in enumerate(counts):
        of_class = torch.nonzero(labels == c).flatten()
        chosen.append(of_class[torch.randperm(len(of_class), generator=rng)[:n]])
    return torch.cat(chosen)


def draw_as_many(labels: Tensor, counts: Sequence[int], rng: torch.Generator) -> Tensor:
    """As `draw_of_each`; what a class lacks, since learned labels may favour it too often, is made up for from the others."""
    found = draw_of_each(labels, counts, rng)
    left = torch.ones(len(labels), dtype=torch.bool)
    left[found] = False
    rest = torch.nonzero(left).flatten()
    return torch.cat([found, rest[torch.randperm(len(rest), generator=rng)[: sum(counts) - len(found)]]])


def all_arms(
    config: Config, data: Dataset, part: Partition, merged: SyntheticSet, rounds: Sequence[SyntheticSet] = ()
) -> Iterator[Arm]:
    """The four arms of one seed; sites that are not in the merged set are left out of "random real" and "local only" too.

    rounds: the merged set of every round, where there were several. An upload is that of all rounds up to then; that of the union
        counts all that were done, though an earlier one may have been the best.
    """
    counts = {
        name: budget_in_whole_images(
            merged, torch.bincount(merged.groups[merged.of_site(name)], minlength=data.classes)
        )
        for name in merged.sites
    }
    task = task_of(data)
    pixels = math.prod(data.geometry)  # bytes of a real image
    sent, chosen = 0, None
    for round, made in enumerate(rounds, start=1):
        sent += size(*encode(made))
        if torch.equal(made.images, merged.images):
            chosen = round
        else:
            yield Arm(f"distilled-{round}", [Material(made.images, made.labels)], sent, round)
    yield Arm("distilled", [Material(merged.images, merged.labels)], sent or size(*encode(merged)), chosen)
    random = random_real(data, part, counts, config.seed)
    yield Arm("random_real", [of_split(random, task)], len(random) * pixels)
    local = [data.train.take(i["train"]) for name, i in zip(part.names, part.index, strict=True) if name in counts]
    yield Arm("local_only", [of_split(split, task) for split in local], 0)
    everything = data.train.take(torch.cat([index["train"] for index in part.index]).sort().values)
    yield Arm("centralised", [of_split(everything, task)], len(everything) * pixels)


def evaluate_arms(
    config: Config,
    data: Dataset,
    part: Partition,
    merged: SyntheticSet,
    folder: Path,
    notify: Notify,
    rounds: Sequence[SyntheticSet] = (),
) -> dict[str, dict[str, Any]]:
    """Figures of one seed: `{architecture: {arm: figures}}`. Every arm that is finished is kept in `folder` and not done again.

    Two runs that share `folder` share the arms that do not depend on the synthetic set. rounds: see `all_arms`.
    """
    task, todo = task_of(data), list(all_arms(config, data, part, merged, rounds))
    names = architectures(config)
    jobs = [(model, arm) for model in names for arm in todo]
    results: dict[str, dict[str, Any]] = {model: {} for model in names}
    for step, (model, arm) in enumerate(jobs):
        notify(step, len(jobs), f"{arm.name} with {model}")
        results[model][arm.name] = _evaluate(config, task, data, model, arm, folder)
    notify(len(jobs), len(jobs), "")
    return results


def _evaluate(config: Config, task: Task, data: Dataset, model: str, arm: Arm, folder: Path) -> dict[str, Any]:
    path = folder / f"{arm.name}-{_key(config, model, arm.materials, data.fingerprint)}.json"
    if path.exists():
        return read_json(path)
    runs = [select_and_test(config, task, model, material, data.val, data.test) for material in arm.materials]
    figures = figures_of(runs) | {"images": arm.images, "upload_bytes": arm.upload_bytes}
    if arm.rounds:
        figures["rounds"] = arm.rounds
    if arm.name == "distilled":
        write_tensors(folder / f"model-{_key(config, model, arm.materials)}.safetensors", {"theta": runs[0].thetas[0]})
    write_json(path, figures)
    return figures


def global_models(config: Config, merged: SyntheticSet, folder: Path) -> dict[str, Tensor]:
    """Parameters `(P,)` of the first network per architecture that `evaluate_arms` trained on the merged set."""
    material = [Material(merged.images, merged.labels)]
    return {
        model: read_tensors(folder / f"model-{_key(config, model, material)}.safetensors")[0]["theta"]
        for model in architectures(config)
    }


def candidates(
    config: Config, task: Task, merged: SyntheticSet, rates: Sequence[float] = LEARNING_RATES
) -> dict[str, Tensor]:
    """One network per architecture and learning rate, as "model@rate": for a server that has no data to choose with.

    Networks that diverged are left out.
    """
    material = Material(merged.images, merged.labels)
    todo = [(rate, config.seed) for rate in rates]
    return {
        f"{model}@{rate}": theta
        for model in architectures(config)
        for (rate, _), theta in zip(todo, fit_all(config, task, model, material, todo), strict=True)
        if torch.isfinite(theta).all()
    }


def confusion_at(
    config: Config, data: Dataset, model: str, theta: Tensor, split: str, weights: Tensor | None = None
) -> Tensor:
    """Counts of a network's answers on one split: additive over sites, so federated evaluation needs no image.

    `(K, K)`, or `(K, 2, 2)` of an image's findings (see `evaluation.metrics`). weights: what each image counts, if not 1.

    Raises `FedistillError` on parameters that do not fit the network.
    """
    task, part = task_of(data), data.splits[split]
    net = fitting_network(config, task, model, theta)
    answers = predict(net, theta.to(device_of(config.device)), part.images, task)
    return counts_of(answers, part.labels, task.kind, weights)


def fitting_network(config: Config, task: Task, model: str, theta: Tensor) -> Flat:
    """The network of a global model. Raises `FedistillError` on parameters that do not fit it."""
    net = task.network(model, config)
    if theta.shape != (net.size,) or not torch.isfinite(theta).all():
        raise FedistillError("bad-model", f"The global model does not fit: {model} has {net.size} finite parameters.")
    return net


def figures_of(runs: Sequence[Result]) -> dict[str, Any]:
    """The mean over sites of the mean over networks, with the deviation over networks of that mean over sites.

    "validation" holds the means on validation images, for choices between runs: what is chosen on test is not tested.
    """
    names = [name for name in runs[0].scores[0] if name != "per_class_recall"]
    classes = range(len(runs[0].scores[0]["per_class_recall"]))
    figures: dict[str, Any] = {name: _over_sites([[s[name] for s in run.scores] for run in runs]) for name in names}
    figures["validation"] = {
        name: _over_sites([[s[name] for s in run.val_scores] for run in runs])["mean"] for name in names
    }
    figures["per_class_recall"] = [
        _over_sites([[s["per_class_recall"][c] for s in run.scores] for run in runs]) for c in classes
    ]
    figures["learning_rate"] = [run.learning_rate for run in runs]
    figures["seconds"] = sum(run.seconds for run in runs)
    return figures


def _over_sites(sites: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """Mean and deviation over networks of the mean over sites. sites: a figure of each network of each site."""
    return mean_std([mean_std(list(network))["mean"] for network in zip(*sites, strict=True)])


def figures_beside(result: Result, *, images: int | None, upload: int, rounds: int) -> dict[str, Any]:
    """Figures of an arm of comparison. images: None where it is made of none. upload: bytes of all sites over all rounds."""
    return figures_of([result]) | {"images": images, "upload_bytes": upload, "rounds": rounds}


def _key(config: Config, model: str, materials: Sequence[Material], tested_on: str = "") -> str:
    """Everything that an arm's figures depend on, so that a stored result is never taken for another."""
    settings = (
        config.eval_nets,
        config.eval_steps,
        config.eval_batch,
        config.class_weights,
        config.augment,
        config.modality,
        config.task,
    )
    digest = hashlib.sha256(
        repr((ALGORITHM, model, tested_on, config.seed, LEARNING_RATES, settings, config.width, config.depth)).encode()
    )
    for material in materials:
        digest.update(material.images.numpy().tobytes())
        digest.update(material.labels.numpy().tobytes())
    return digest.hexdigest()[:16]
