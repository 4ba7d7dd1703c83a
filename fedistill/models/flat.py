"""A network as a pure function of one flat parameter vector."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedistill.errors import FedistillError


class Flat:
    """`net(theta, x)` for a flat vector theta `(P,)`: what trajectory matching compares and differentiates."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._shapes = {name: p.shape for name, p in net.named_parameters()}
        self.device = next(net.parameters()).device
        self.shapes = tuple(self._shapes.values())
        self.sizes = tuple(s.numel() for s in self.shapes)
        self.size = sum(self.sizes)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits `(n, K)` of images `(n, C, H, W)` or volumes `(n, C, D, H, W)`."""
        return functional_call(self._net, self._views(theta), (x,))

    def features(self, theta: Tensor, x: Tensor) -> Tensor:
        """Penultimate features `(n, D)`."""
        return functional_call(_Features(self._net), {f"net.{k}": v for k, v in self._views(theta).items()}, (x,))

    def _views(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def initial(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters `(P,)`: PyTorch's own default ranges, drawn from `generator` on the CPU."""
        fan_in = {}
        for name, shape in self._shapes.items():
            if len(shape) > 1:
                fan_in[name.rpartition(".")[0]] = math.prod(shape[1:])
        parts = []
        for name, shape in self._shapes.items():
            layer, _, kind = name.rpartition(".")
            if layer in fan_in:
                bound = 1 / math.sqrt(fan_in[layer])
                parts.append((torch.rand(shape, generator=generator) * 2 - 1).mul_(bound).flatten())
            else:  # a normalisation layer
                parts.append((torch.ones if kind == "weight" else torch.zeros)(shape).flatten())
        return torch.cat(parts)


class _Features(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        features: Callable[[Tensor], Tensor] = self.net.features  # type: ignore[assignment]
        return features(x)


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `mps` names. Raises `FedistillError` when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise FedistillError(
            "no-device", f"device={name} is not available on this machine: use device=auto or device=cpu."
        )
    return torch.device(name)
