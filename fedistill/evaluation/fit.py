"""The protocol that every arm shares: fresh networks, a learning rate chosen on validation, test looked at once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.data.public import normalise
from fedistill.evaluation.metrics import merit, score
from fedistill.experts.train import Task
from fedistill.memory import one_thread
from fedistill.models.augment import augment, draw
from fedistill.models.flat import Flat, device_of
from fedistill.models.loss import answers_of, class_weights, loss_of, targets_of
from fedistill.seeding import generator

Train = Callable[[Sequence[tuple[float, int]]], list[Tensor]]  # (learning rate, seed) of each network -> its parameters

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Material:
    """What a global network is trained on: images or volumes, uint8 or already normalised float32, and labels `(n, K)`."""

    images: Tensor
    labels: Tensor


def of_split(split: Split, task: Task) -> Material:
    return Material(split.images, targets_of(split.labels, task.classes, task.kind))


def fit(config: Config, task: Task, model: str, material: Material, *, lr: float, seed: int) -> Tensor:
    """Parameters `(P,)` of a fresh network: SGD, momentum 0.9, weight decay 5e-4, rate x0.1 after half the steps, augmentation."""
    net, operations, device = task.network(model, config), task.operations(config), device_of(config.device)
    rng = generator(seed, "global", model)
    theta = net.initial(rng).to(device)
    velocity = torch.zeros_like(theta)
    weights = class_weights(material.labels, kind=task.kind).to(device) if config.class_weights else None
    batch = min(config.eval_batch, len(material.images))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(config.eval_steps):
        if len(order) < batch:
            order = torch.randperm(len(material.images), generator=rng)
        index, order = order[:batch], order[batch:]
        x = augment(_batch(material.images[index], task.modality).to(device), draw(operations, rng))
        y = material.labels[index].to(device)
        theta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(task.kind, net(theta, x), y, weights), theta)
        theta = theta.detach()
        velocity = 0.9 * velocity + gradient + 5e-4 * theta
        theta = theta - (lr if step < config.eval_steps // 2 else 0.1 * lr) * velocity
    return theta.cpu()


def _batch(images: Tensor, modality: str) -> Tensor:
    return normalise(images, modality) if images.dtype == torch.uint8 else images


@torch.no_grad()
def predict(net: Flat, theta: Tensor, images: Tensor, task: Task) -> Tensor:
    """Probabilities `(n, K)` of uint8 images, on the device of `net`; a network that diverged gives every class the same."""
    theta = theta.to(net.device)
    logits = [net(theta, _batch(part, task.modality).to(theta.device)).cpu() for part in images.split(256)]
    probabilities = answers_of(task.kind, torch.cat(logits))
    return probabilities.nan_to_num(nan=1 / probabilities.shape[1])


def predict_together(members: Iterable[tuple[Flat, Tensor]], images: Tensor, task: Task) -> Tensor:
    """The mean answer `(n, K)` of several networks, each with its parameters `(P,)`."""
    return torch.stack([predict(net, theta, images, task) for net, theta in members]).mean(0)


@dataclass(frozen=True)
class Result:
    """One arm with one architecture: scores of each network, the learning rate chosen, and the work it took.

    scores: on the test images. val_scores: on the validation images, for choices that must not see the test images.
    """

    scores: list[dict[str, Any]]
    val_scores: list[dict[str, Any]]
    learning_rate: float
    seconds: float
    thetas: list[Tensor]
    rates: tuple[float, ...] = ()


def select_and_test(config: Config, task: Task, model: str, material: Material, val: Split, test: Split) -> Result:
    """Choose the learning rate on `val` with one network each, train `eval_nets` networks with it, score them on `test`."""
    train = functools.partial(fit_all, config, task, model, material)
    return choose_and_test(config, task, model, train, val, test, rates=LEARNING_RATES, nets=config.eval_nets)


@one_thread()
def choose_and_test(
    config: Config,
    task: Task,
    model: str,
    train: Train,
    val: Split,
    test: Split,
    *,
    rates: Sequence[float],
    nets: int,
    answer: Callable[[Flat, Tensor, Tensor, Task], Tensor] = predict,
) -> Result:
    """As `select_and_test`, whatever `train` does to get its networks: at each of `rates`, then `nets` at the best.

    answer: the probabilities `(n, K)` that what `train` returns gives for images.
    """
    began = time.monotonic()
    net = task.network(model, config)
    searched = train([(lr, config.seed) for lr in rates])
    worth = [
        merit(score(answer(net, theta, val.images, task), val.labels, task.kind), task.kind)
        if torch.isfinite(theta).all()
        else (-math.inf,)
        for theta in searched
    ]
    order = sorted(range(len(rates)), key=lambda i: worth[i], reverse=True)
    chosen = order[0]
    lr = rates[chosen]
    more = [(lr, config.seed + 1000 * n) for n in range(1, nets)]
    thetas = [searched[chosen], *(train(more) if more else ())]
    on_test, on_val = (
        [score(answer(net, theta, part.images, task), part.labels, task.kind) for theta in thetas]
        for part in (test, val)
    )
    return Result(on_test, on_val, lr, time.monotonic() - began, thetas, tuple(rates[i] for i in order))


def fit_all(
    config: Config, task: Task, model: str, material: Material, todo: Sequence[tuple[float, int]]
) -> list[Tensor]:
    """Parameters of one network per (learning rate, seed), trained in parallel processes."""
    images, labels = material.images.numpy(), material.labels.numpy()  # numpy: shared by memory map, not copied
    jobs = (delayed(_fit_one)(config, task, model, images, labels, lr, seed) for lr, seed in todo)
    return [torch.from_numpy(theta) for theta in Parallel(n_jobs=config.worker_count(), backend="loky")(jobs)]


@one_thread()
def _fit_one(
    config: Config, task: Task, model: str, images: np.ndarray, labels: np.ndarray, lr: float, seed: int
) -> np.ndarray:
    material = Material(torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels)))
    return fit(config, task, model, material, lr=lr, seed=seed).numpy()
