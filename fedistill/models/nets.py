"""Networks for experts, students and global models. All are free of batch statistics (Opacus accepts every layer)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedistill.errors import FedistillError, unknown


class Halve(nn.Module):
    """Average pooling 2x2 (2x2x2 of volumes), a last odd row left out, as `F.avg_pool2d(x, 2)`.

    By sums of neighbours: with torch's own pooling a ConvNet's training step takes a fifth longer on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # where one kernel beats several
            return F.avg_pool3d(x, 2) if x.dim() == 5 else F.avg_pool2d(x, 2)
        axes = range(2, x.dim())
        for i in axes:
            even, odd = x.narrow(i, 0, x.shape[i] // 2 * 2).unflatten(i, (-1, 2)).unbind(i + 1)
            x = even + odd
        return x / 2 ** len(axes)


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, GroupNorm(C, C), ReLU and 2x2 average pooling, then one linear layer.

    Volumes get the same blocks with 3x3x3 and 2x2x2. The classifier is sized by a dummy forward, so any size works.
    """

    def __init__(self, channels: int, classes: int, size: tuple[int, ...], *, width: int, depth: int) -> None:
        super().__init__()
        convolution = nn.Conv3d if len(size) == 3 else nn.Conv2d
        self.blocks = nn.Sequential()
        for i in range(depth):
            self.blocks.append(convolution(channels if i == 0 else width, width, 3, padding=1))
            self.blocks.append(nn.GroupNorm(width, width))
            self.blocks.append(nn.ReLU())
            self.blocks.append(Halve())
        with torch.no_grad():
            features = self.blocks(torch.zeros(1, channels, *size)).numel()
        self.classifier = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class MLP(nn.Module):
    """Two hidden layers: an architecture that shares nothing with a ConvNet."""

    def __init__(self, channels: int, classes: int, size: tuple[int, ...], *, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * math.prod(size), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(hidden, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, outside)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(32, outside))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images (3x3 stem, no max-pooling) with GroupNorm(32, C)."""

    def __init__(self, channels: int, classes: int, size: tuple[int, ...]) -> None:
        super().__init__()
        if len(size) != 2:
            raise FedistillError("only-2d", "resnet18 takes images and no volumes: use convnet or mlp.")
        self.stem = nn.Sequential(nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU())
        self.stages = nn.Sequential()
        inside = 64
        for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            self.stages.append(nn.Sequential(_Residual(inside, outside, stride), _Residual(outside, outside, 1)))
            inside = outside
        self.classifier = nn.Linear(512, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


MODELS: dict[str, Callable[..., nn.Module]] = {"convnet": ConvNet, "mlp": MLP, "resnet18": ResNet18}


def known_model(name: str) -> str:
    """`name` itself; raises `FedistillError` with the nearest valid name when there is no such architecture."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return name


def build(name: str, geometry: tuple[int, ...], classes: int, *, width: int = 32, depth: int = 3) -> nn.Module:
    """A network for images of `geometry` (C, H, W) or volumes (C, D, H, W). `width` and `depth` are the ConvNet's.

    Raises `FedistillError` on an unknown name, on more blocks than the images have room for, and on a network that takes
    no volumes.
    """
    known_model(name)
    channels, size = geometry[0], geometry[1:]
    if name == "convnet":
        if min(size) >> depth < 1:
            raise FedistillError(
                "too-deep", f"depth={depth} halves images of {min(size)} pixels to nothing: lower depth."
            )
        return ConvNet(channels, classes, size, width=width, depth=depth)
    return MODELS[name](channels, classes, size)
