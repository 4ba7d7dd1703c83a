"""All of a distillation that changes: enough to continue bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.files import read_tensors, write_tensors


@dataclass
class State:
    """The synthetic set in the making, its optimiser and its random numbers."""

    images: Tensor  # (m, C, h, w), as they are kept: smaller than they are shown where `formation_of` is above 1
    logits: Tensor  # (m, K): learned labels are the answers of these logits
    targets: Tensor  # (m, K): what the images were made for; the labels where labels are not learned
    group: Tensor  # (m,) the class of an image, K for a multi-label image without any finding
    log_step: Tensor  # (A,) logarithm of the student's step size alpha, one per architecture of the pool
    image_velocity: Tensor
    image_square: Tensor  # running mean of squared gradients
    label_velocity: Tensor
    strength: Tensor  # (m,) running mean of the gradient norm of each image
    slow_until: Tensor  # (m,) iteration before which an image moves slowly
    network: Tensor  # (P,) the network that gradient matching trains beside the set; empty for other methods
    rng: torch.Generator
    iteration: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rate: float = 1.0  # of the learning rate of the images; halved when iterations keep being skipped
    replaced: int = 0
    made_of: str = ""  # a word for the private results that it is made of; empty without privacy
    medians: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def step_size(self) -> Tensor:
        """Step sizes `(A,)`."""
        return self.log_step.exp()


_TENSORS = tuple(name for name, kind in State.__annotations__.items() if kind == "Tensor")
_NUMBERS = tuple(name for name in State.__annotations__ if name not in (*_TENSORS, "rng"))


def save_state(state: State, path: Path) -> None:
    tensors = {name: getattr(state, name) for name in _TENSORS} | {"rng": state.rng.get_state()}
    write_tensors(path, tensors, {name: getattr(state, name) for name in _NUMBERS})


def load_state(path: Path, device: torch.device) -> State:
    tensors, numbers = read_tensors(path)
    rng = torch.Generator()
    rng.set_state(tensors.pop("rng"))
    values: dict[str, Any] = {k: v.to(device) for k, v in tensors.items()} | numbers
    return State(**values, rng=rng)
