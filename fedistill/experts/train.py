"""Local expert networks: plain SGD, class-weighted loss, a checkpoint every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch import Tensor

from fedistill.config import Config, listed
from fedistill.data.dataset import Split
from fedistill.data.public import augmentations, normalise
from fedistill.errors import FedistillError
from fedistill.experts import trajectory
from fedistill.files import read_about, read_tensors, write_tensors
from fedistill.memory import one_thread
from fedistill.models.augment import augment, draw, parse_operations
from fedistill.models.flat import Flat, device_of
from fedistill.models.loss import class_weights, loss_of, targets_of
from fedistill.models.nets import build, known_model
from fedistill.seeding import generator


@dataclass(frozen=True)
class Task:
    """What is public about a task, and all that a network needs to know: no image, no label, no count."""

    geometry: tuple[int, ...]
    class_names: tuple[str, ...]
    modality: str
    kind: str = "multiclass"

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def network(self, name: str, config: Config) -> Flat:
        return Flat(
            build(name, self.geometry, self.classes, width=config.width, depth=config.depth).to(
                device_of(config.device)
            )
        )

    def operations(self, config: Config) -> tuple[str, ...]:
        """The augmentations in use: those that are safe for the modality, or the ones that `config.augment` lists."""
        if config.augment == "auto":
            return augmentations(self.modality, self.geometry[0])
        return parse_operations(config.augment)


def architectures_of(config: Config) -> list[str]:
    """The pool of architectures: expert e has the e-th, in turns. Raises `FedistillError` where there is none, or no such one."""
    names = [known_model(name) for name in listed(config.model)]
    if not names:
        raise FedistillError("bad-value", "model is empty: name at least one architecture.")
    return names


def train_experts(
    config: Config, task: Task, train: Split, folder: Path, *, site: str, checkpoints: int, until: float
) -> tuple[int, int]:
    """Train towards `config.experts` trajectories of `checkpoints` steps' worth in `folder` until the clock says `until`.

    Returns (steps done, steps in total). Every expert keeps its progress on disk, so a call continues where the last one
    stopped, bit for bit; one that needs more checkpoints than an earlier one trains on. Experts train in
    `config.workers` parallel processes of one thread each.
    """
    goal = checkpoints * config.checkpoint_every
    todo = [e for e in range(config.experts) if steps_done(folder, e) < goal]
    Parallel(n_jobs=min(config.worker_count(), max(len(todo), 1)), backend="loky")(
        delayed(_train_one)(config, task, train, folder, site, e, goal, until) for e in todo
    )
    return sum(min(steps_done(folder, e), goal) for e in range(config.experts)), config.experts * goal


def load_trajectory(folder: Path, expert: int, checkpoints: int) -> Tensor:
    """The first `checkpoints + 1` checkpoints `(T+1, P)` float32 of one expert."""
    return trajectory.read(expert_file(folder, expert), checkpoints)


def expert_file(folder: Path, expert: int) -> Path:
    return folder / f"expert-{expert:03d}.safetensors"


def steps_done(folder: Path, expert: int) -> int:
    file = expert_file(folder, expert)
    return int(read_about(file)["step"]) if file.exists() else 0


def sgd(
    config: Config, task: Task, net: Flat, train: Split, rate: float, rng: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """theta -> theta - rate * grad of the weighted loss, on a batch that `rng` draws with replacement."""
    operations, device = task.operations(config), device_of(config.device)
    targets = targets_of(train.labels, task.classes, task.kind)
    weights = class_weights(targets, kind=task.kind).to(device) if config.class_weights else None

    def step(theta: Tensor) -> Tensor:
        index = torch.randint(len(train), (config.expert_batch,), generator=rng)
        x = augment(normalise(train.images[index], task.modality).to(device), draw(operations, rng))
        theta = theta.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss_of(task.kind, net(theta, x), targets[index].to(device), weights), theta)
        return theta.detach() - rate * gradient

    return step


@one_thread()
def _train_one(
    config: Config, task: Task, train: Split, folder: Path, site: str, expert: int, goal: int, until: float
) -> None:
    names = architectures_of(config)
    net, device = task.network(names[expert % len(names)], config), device_of(config.device)
    rng = generator(config.seed, "expert", site, expert)
    file = expert_file(folder, expert)
    if file.exists():
        parts, about = read_tensors(file)
        theta, step = parts.pop("theta").to(device), int(about["step"])
        rng.set_state(parts.pop("generator"))
    else:
        theta, step = net.initial(rng).to(device), 0
        parts = trajectory.begin(theta.cpu())

    new: list[Tensor] = []
    train_step = sgd(config, task, net, train, config.expert_lr, rng)
    while step < goal:
        theta = train_step(theta)
        step += 1
        if step % config.checkpoint_every == 0:
            new.append(theta.clone().cpu())
            if time.monotonic() > until:
                break
    parts = trajectory.extend(parts, new)
    trajectory.check_moves(trajectory.decode(parts), {"expert": expert, "checkpoint_every": config.checkpoint_every})
    write_tensors(file, parts | {"theta": theta, "generator": rng.get_state()}, {"seed": config.seed, "step": step})
