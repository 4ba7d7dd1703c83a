"""Private experts: DP-SGD (Abadi et al., CCS 2016) with Opacus, a checkpoint every few steps.

    theta <- theta - lr / B ( sum_i clip(g_i, C) + sigma C z ),   z ~ N(0, I),   B = sample_rate * records

A record takes part in a step by a coin of its own (Poisson sampling); a step without any record still adds its noise. With
unit=patient a record is a patient, who takes part with one image, drawn anew each time.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.data.public import normalise
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.experts import trajectory
from fedistill.experts.train import Task, architectures_of, expert_file, steps_done
from fedistill.files import read_tensors, write_tensors
from fedistill.memory import one_thread
from fedistill.models.augment import augment, draw
from fedistill.models.flat import device_of
from fedistill.models.loss import targets_of
from fedistill.models.nets import build
from fedistill.privacy.accounting import Mechanism
from fedistill.privacy.noise import secret_generator
from fedistill.privacy.plan import expert_steps, records_by_unit
from fedistill.seeding import generator

CHUNK = 64  # images whose gradients are in memory at the same time


def train_private_experts(
    config: Config, task: Task, train: Split, folder: Path, *, mechanism: Mechanism, weights: Tensor, until: float
) -> tuple[int, int]:
    """Train towards `config.experts` trajectories in `folder` until the clock says `until`: (steps done, steps in total).

    mechanism: what the plan allows. weights `(K,)`: of the classes, public or paid for. All experts begin at the same public
    parameters, so that their noise averages out. Raises `FedistillError` ("budget-spent") rather than take one step too many.
    """
    goal = expert_steps(config)
    if config.experts * goal > mechanism.steps:
        raise FedistillError(
            "budget-spent", f"The plan allows {mechanism.steps} steps and {config.experts * goal} are asked for."
        )
    todo = [e for e in range(config.experts) if steps_done(folder, e) < goal]
    Parallel(n_jobs=min(config.worker_count(), max(len(todo), 1)), backend="loky")(
        delayed(_train_one)(config, task, train, folder, e, goal, mechanism, weights, until) for e in todo
    )
    return sum(steps_done(folder, e) for e in range(config.experts)), config.experts * goal


@one_thread()
def _train_one(
    config: Config,
    task: Task,
    train: Split,
    folder: Path,
    expert: int,
    goal: int,
    mechanism: Mechanism,
    weights: Tensor,
    until: float,
) -> None:
    names, device = architectures_of(config), device_of(config.device)
    name = names[expert % len(names)]
    file = expert_file(folder, expert)
    if file.exists():
        parts, about = read_tensors(file)
        theta, step = parts.pop("theta"), int(about["step"])
    else:  # every expert of an architecture begins here
        theta, step = task.network(name, config).initial(generator(config.seed, "private-start", name)), 0
        parts = trajectory.begin(theta)
    sgd = PrivateSGD(config, task, name, theta.to(device), mechanism, train, weights)
    new: list[Tensor] = []
    while step < goal:
        sgd.step()
        step += 1
        if step % config.checkpoint_every == 0:
            new.append(sgd.theta().cpu())
            if time.monotonic() > until:
                break
    write_tensors(file, trajectory.extend(parts, new) | {"theta": sgd.theta().cpu()}, {"step": step})


class PrivateSGD:
    """One network under DP-SGD: `step()` by `step()`, on the records of `train`. Its randomness is secret."""

    def __init__(
        self,
        config: Config,
        task: Task,
        name: str,
        theta: Tensor,
        mechanism: Mechanism,
        train: Split,
        weights: Tensor,
    ) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self._task, self._train, self._mechanism = task, train, mechanism
        self._operations = task.operations(config)
        self._device, self._weights = theta.device, weights.to(theta.device)
        self._records = records_by_unit(train, config.unit)
        self._targets = targets_of(train.labels, task.classes, task.kind)
        net = build(name, task.geometry, task.classes, width=config.width, depth=config.depth).to(self._device)
        vector_to_parameters(theta.clone(), net.parameters())  # which makes views: the steps would change `theta`
        self._net = GradSampleModule(net)
        self._secret = secret_generator()
        self._optimizer = DPOptimizer(
            torch.optim.SGD(self._net.parameters(), lr=config.dp_lr),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip_norm,
            expected_batch_size=mechanism.sample_rate * len(self._records),
            generator=secret_generator(self._device),
            secure_mode=True,  # half the sum of four draws, as in `noisy`
        )

    def theta(self) -> Tensor:
        """The parameters `(P,)`."""
        return parameters_to_vector(self._net.parameters()).detach().clone()

    def step(self) -> None:
        """One noisy step; the loss of an image depends on no other image."""
        index = sample(self._records, self._mechanism.sample_rate, self._secret)
        operation = draw(self._operations, self._secret)
        chunks = index.split(CHUNK) if len(index) else (index,)
        for place, chunk in enumerate(chunks):
            if len(chunk):
                x = augment(normalise(self._train.images[chunk], self._task.modality).to(self._device), operation)
                y = self._targets[chunk].to(self._device)
                each = per_image_loss(self._task.kind, self._net(x), y, self._weights)
                with warnings.catch_warnings():  # of a hook that Opacus sets, where images need no gradient
                    warnings.filterwarnings("ignore", "Full backward hook is firing")
                    each.mean().backward()
                for parameter in self._net.parameters():  # what overflows has no length that could be clipped
                    parameter.grad_sample.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            else:  # nobody was drawn: the noise is added all the same
                for parameter in self._net.parameters():
                    parameter.grad_sample = torch.zeros((0, *parameter.shape), device=self._device)
            self._optimizer.signal_skip_step(do_skip=place < len(chunks) - 1)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def per_image_loss(kind: str, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted losses `(b,)`: weights `(K,)` of the classes, of the positive side of each finding for multilabel."""
    if kind == "multilabel":
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        ).mean(1)
    return -(targets * weights * logits.log_softmax(1)).sum(1)


def sample(records: Records, rate: float, secret: torch.Generator) -> Tensor:
    """Poisson sampling: each record by a coin of its own, and of a record that is drawn one random image."""
    coins, picks = torch.rand((2, len(records)), generator=secret, dtype=torch.float64)
    drawn = torch.nonzero(coins < rate).flatten()
    return records.one_each(drawn, picks[drawn])
