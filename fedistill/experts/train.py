"""Local expert networks: plain SGD, class-weighted loss, a checkpoint every few steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.data.public import augmentations, normalise
from fedistill.experts import trajectory
from fedistill.files import read_tensors, write_tensors
from fedistill.memory import keep_freed_memory, one_thread
from fedistill.models.augment import augment, draw, parse_operations
from fedistill.models.flat import Flat, device_of
from fedistill.models.nets import build
from fedistill.seeding import generator


@dataclass(frozen=True)
class Task:
    """What is public about a task, and all that a network needs to know: no image, no label, no count."""

    geometry: tuple[int, int, int]
    class_names: tuple[str, ...]
    modality: str

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


def class_weights(labels: Tensor, classes: int, *, limit: float = 10.0) -> Tensor:
    """Inverse class frequency `(K,)`, mean 1 over the classes present, at most `limit`; absent classes get 1."""
    counts = torch.bincount(labels, minlength=classes).float()
    present = counts > 0
    weights = torch.ones(classes)
    weights[present] = (len(labels) / (present.sum() * counts[present])).clamp(max=limit)
    return weights


def train_experts(
    config: Config, task: Task, train: Split, folder: Path, *, site: str, until: float
) -> tuple[int, int]:
    """Train towards `config.experts` trajectories in `folder` until the clock (`time.monotonic`) says `until`.

    Returns (steps done, steps in total). Every expert keeps its own progress on disk, so a call continues where the last one
    stopped, bit for bit. Experts train in `config.workers` parallel processes of one thread each.
    """
    todo = [e for e in range(config.experts) if not finished(folder, e)]
    Parallel(n_jobs=min(config.worker_count(), max(len(todo), 1)), backend="loky")(
        delayed(_train_one)(config, task, train, folder, site, e, until) for e in todo
    )
    done = sum(_steps_done(folder, e, config) for e in range(config.experts))
    return done, config.experts * config.expert_steps


def finished(folder: Path, expert: int) -> bool:
    return _file(folder, expert).exists()


def load_trajectory(folder: Path, expert: int) -> Tensor:
    """Checkpoints `(T+1, P)` float32 of one expert."""
    return trajectory.decode(read_tensors(_file(folder, expert))[0])


def _file(folder: Path, expert: int, suffix: str = "") -> Path:
    return folder / f"expert-{expert:03d}{suffix}.safetensors"


def _steps_done(folder: Path, expert: int, config: Config) -> int:
    if finished(folder, expert):
        return config.expert_steps
    partial = _file(folder, expert, ".partial")
    return int(read_tensors(partial)[1]["step"]) if partial.exists() else 0


@one_thread()
def _train_one(config: Config, task: Task, train: Split, folder: Path, site: str, expert: int, until: float) -> None:
    """theta <- theta - lr * grad of the weighted cross-entropy, on batches drawn with replacement."""
    keep_freed_memory()
    net, operations = task.network(config.model, config), task.operations(config)
    device = device_of(config.device)
    weights = class_weights(train.labels, task.classes).to(device) if config.class_weights else None
    rng = generator(config.seed, "expert", site, expert)
    partial = _file(folder, expert, ".partial")
    if partial.exists():
        parts, about = read_tensors(partial)
        path, theta, step = list(parts["path"]), parts["theta"].to(device), int(about["step"])
        rng.set_state(parts["generator"])
    else:
        theta, step = net.initial(rng).to(device), 0
        path = [theta.cpu()]

    while step < config.expert_steps:
        index = torch.randint(len(train), (config.expert_batch,), generator=rng)
        x = augment(normalise(train.images[index], task.modality).to(device), draw(operations, rng))
        theta.requires_grad_(True)
        loss = F.cross_entropy(net(theta, x), train.labels[index].to(device), weight=weights)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta.detach() - config.expert_lr * gradient
        step += 1
        if step % config.checkpoint_every == 0:
            path.append(theta.clone().cpu())
            if time.monotonic() > until and step < config.expert_steps:
                state = {"path": torch.stack(path), "theta": theta, "generator": rng.get_state()}
                write_tensors(partial, state, {"step": step})
                return
    checkpoints = torch.stack(path)
    trajectory.check_moves(checkpoints, {"expert": expert, "checkpoint_every": config.checkpoint_every})
    write_tensors(_file(folder, expert), trajectory.encode(checkpoints), {"seed": config.seed, "steps": step})
    partial.unlink(missing_ok=True)
