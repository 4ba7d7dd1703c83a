"""Built-in phantoms: procedural images that look medical, for trying every method without any patient's data.

A body with smooth texture holds one lesion, whose shape is the class. Position, size, direction, contrast and polarity
(brighter or darker than its surroundings) are random, so neither the mean nor any fixed pixel tells the class. Three
scanners differ in contrast, noise, sharpness, field of view and, in colour, in tint.

With task=multilabel an image holds up to three lesions of different shapes; with task=ordinal none (grade 0) or one nodule
whose size is the grade. Volumes hold the same lesions, which taper off along the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset, Split
from fedistill.errors import FedistillError

CLASSES = ("nodule", "ring", "spiculated mass", "calcifications", "opacity", "band")


Span = tuple[float | Tensor, float | Tensor]  # limits of a random number, for all images or each one's own (n, 1, 1)


@dataclass(frozen=True)
class _Place:
    """One lesion of every image: its shape `(n,)`, an index into `CLASSES` or -1 for none, and where and how large it is."""

    shape: Tensor
    reach: Span  # from the middle, where the body ends at about 0.8
    angle: Span
    unit: Span  # about its radius


@dataclass(frozen=True)
class Scanner:
    """How one site takes pictures; brightness and noise on a 0..1 scale, field of view as a factor on lengths."""

    name: str
    contrast: float
    offset: float
    noise: float
    blur: float
    view: float
    round_view: bool
    tint: tuple[float, float, float]


SCANNERS = (
    Scanner("north", 1.0, 0.0, 0.03, 0.1, 1.0, False, (1.0, 0.82, 0.78)),
    Scanner("harbour", 0.8, 0.14, 0.045, 0.0, 0.9, False, (0.84, 0.8, 1.0)),
    Scanner("valley", 1.15, -0.06, 0.04, 0.5, 1.12, True, (1.0, 0.9, 0.62)),
)
_SITE_SHARES = (0.4, 0.35, 0.25)
_CHUNK = 256  # images drawn at a time: bounds the memory
_MOST = 3  # lesions in one image
_MOST_VALUES = 2**32  # of all training images: 16 GB while they are drawn
_WIDER, _LONGER = (
    1.2,
    2.0,
)  # lesions in volumes, of which they would fill too small a share to be learned: across, in depth


def phantom_data(config: Config) -> Dataset:
    """The phantoms that `config` asks for; the same seed gives the same bits.

    Validation has a quarter and test half as many images as training. Raises `FedistillError` on a number of classes,
    channels or images that cannot be made, or on more than fit into memory.
    """
    classes, channels, n = config.phantom_classes, config.phantom_channels, config.phantom_images
    kind = "multiclass" if config.task == "auto" else config.task
    _check(classes, channels)
    if n < 8 * classes:
        raise FedistillError(
            "bad-value", f"phantom_images={n} is too few for {classes} classes: it must be at least {8 * classes}."
        )
    values = n * channels * config.phantom_size**2 * max(1, config.phantom_depth)
    if values > _MOST_VALUES:
        raise FedistillError(
            "bad-value",
            f"phantom_images={n} of this size would have {values:,} values, and at most {_MOST_VALUES:,} are drawn: "
            "make them fewer or smaller.",
        )
    generator = torch.Generator().manual_seed(config.seed)
    sizes = {"train": n, "val": n // 4, "test": n // 2}
    parts = {}
    for key, count in sizes.items():
        labels, site = _labels_and_sites(count, classes + (kind == "multilabel"), generator)
        if kind == "multilabel":
            labels = _findings(labels, classes, generator)
        places = _places(labels, kind, classes, generator)
        images = _draw(places, site, channels, config.phantom_size, config.phantom_depth, generator)
        parts[key] = Split(images.mul_(255).round_().to(torch.uint8), labels, site)
    names = tuple(scanner.name for scanner in SCANNERS)
    class_names = tuple(f"grade {k}" for k in range(classes)) if kind == "ordinal" else CLASSES[:classes]
    return Dataset("phantom", "phantom", class_names, names, parts["train"], parts["val"], parts["test"], kind)


def phantom_images(n: int, channels: int, size: int, generator: torch.Generator, classes: int) -> tuple[Tensor, Tensor]:
    """`n` public phantoms `(n, C, size, size)` float32 in 0..1 and their labels `(n,)`, as even as `n` allows.

    The scanners take turns at random. Raises `FedistillError` on a number of classes or channels that cannot be drawn.
    """
    _check(classes, channels)
    labels = (torch.arange(n) % classes)[torch.randperm(n, generator=generator)]
    site = torch.randint(len(SCANNERS), (n,), generator=generator)
    return _draw(_places(labels, "multiclass", classes, generator), site, channels, size, 0, generator), labels


def phantoms_like(geometry: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
    """`n` public phantoms `(n, *geometry)` uint8 of all classes and scanners; volumes repeat one slice."""
    channels, *size = geometry
    images, _ = phantom_images(n, channels, max(size[-2:]), generator, len(CLASSES))
    images = images[:, :, : size[-2], : size[-1]]
    if len(size) == 3:
        images = images[:, :, None].expand(-1, -1, size[0], -1, -1)
    return (images * 255).round().to(torch.uint8)


def _check(classes: int, channels: int) -> None:
    if not 2 <= classes <= len(CLASSES):
        raise FedistillError("bad-value", f"phantom_classes={classes} is not possible: choose 2 to {len(CLASSES)}.")
    if channels not in (1, 3):
        raise FedistillError(
            "bad-value", f"phantom_channels={channels} is not possible: choose 1 (grey) or 3 (colour)."
        )


def _labels_and_sites(n: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class and scanner of `n` images: every scanner sees every class, some half as often as others."""
    share = torch.tensor(_SITE_SHARES, dtype=torch.float64)[:, None]
    phase = torch.arange(classes) / classes - torch.arange(len(_SITE_SHARES))[:, None] / len(_SITE_SHARES)
    joint = share * (1 + 0.4 * torch.cos(2 * torch.pi * phase))
    # Largest remainders: the table of counts adds up to n exactly.
    wanted = (joint / joint.sum() * n).flatten()
    counts = wanted.floor().long()
    counts[(wanted - counts).argsort(descending=True, stable=True)[: n - int(counts.sum())]] += 1
    cell = torch.repeat_interleave(torch.arange(len(counts)), counts)[torch.randperm(n, generator=generator)]
    return cell % classes, cell // classes


def _findings(first: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Findings `(n, K)`: the class `first (n,)` (K: none) and up to two others."""
    n = len(first)
    labels = F.one_hot(first, classes + 1)[:, :classes]
    others = torch.rand(n, classes, generator=generator) * (1 - labels)
    wanted = torch.rand(n, 1, generator=generator)
    more = (wanted > 0.45).long() + (wanted > 0.8).long()
    rank = others.argsort(1, descending=True).argsort(1)
    return labels | ((rank < more) & (others > 0) & (first < classes)[:, None]).long()


def _places(labels: Tensor, kind: str, classes: int, generator: torch.Generator) -> list[_Place]:
    """The lesions that show `labels`: a class or grade `(n,)`, or findings `(n, K)`."""
    turn = 2 * torch.pi
    if kind == "multiclass":
        return [_Place(labels, (0, 0.42), (0, turn), (0.27, 0.38))]
    if kind == "ordinal":
        step = 0.40 / (classes - 1)
        middle = 0.12 + step * labels[:, None, None]
        return [_Place((labels > 0).long() - 1, (0, 0.35), (0, turn), (middle - 0.5 * step, middle + 0.5 * step))]
    order = (labels * (1 + torch.rand(labels.shape, generator=generator))).argsort(1, descending=True)
    first = turn * torch.rand(len(labels), 1, 1, generator=generator)
    places = []
    for j in range(min(_MOST, classes)):  # in three directions, so that they stay apart
        shape = torch.where(labels.sum(1) > j, order[:, j], -1)
        angle = first + j * turn / _MOST
        places.append(_Place(shape, (0.32, 0.45), (angle - 0.35, angle + 0.35), (0.22, 0.32)))
    return places


def _draw(
    places: list[_Place], site: Tensor, channels: int, size: int, depth: int, generator: torch.Generator
) -> Tensor:
    """`(n, C, size, size)`, or `(n, C, depth, size, size)`, float32 in 0..1."""
    out = torch.empty(len(site), channels, *([depth] if depth else []), size, size)
    chunk = max(1, _CHUNK // max(1, depth))
    for start in range(0, len(site), chunk):
        piece = slice(start, start + chunk)
        mine = [_Place(p.shape[piece], p.reach, _part(p.angle, piece), _part(p.unit, piece)) for p in places]
        out[piece] = _draw_chunk(mine, site[piece], channels, size, depth, generator)
    return out


def _part(span: Span, piece: slice) -> Span:
    low, high = (limit[piece] if isinstance(limit, Tensor) else limit for limit in span)
    return low, high


def _draw_chunk(
    places: list[_Place], site: Tensor, channels: int, size: int, depth: int, generator: torch.Generator
) -> Tensor:
    n = len(site)

    def between(low: float | Tensor, high: float | Tensor) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def scanner(what: str) -> Tensor:
        return torch.tensor([float(getattr(s, what)) for s in SCANNERS])[site][:, None, None]

    # The slices of a volume lie below each other in one tall picture: what follows is the same for both.
    slices = max(1, depth)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = axis.repeat(slices)[:, None] / scanner("view"), axis[None, :] / scanner("view")
    z = ((torch.arange(slices) + 0.5) / slices * 2 - 1).repeat_interleave(size)[:, None]
    pixel = 2.0 / size

    # The body: an ellipse of tissue with smooth texture, and a darker surround.
    turn = between(0, torch.pi)
    u, v = _turned(x - between(-0.08, 0.08), y - between(-0.08, 0.08), turn)
    radius = ((u / between(0.82, 1.02)).square() + (v / between(0.68, 0.88)).square() + z.square()).sqrt()
    body = torch.sigmoid((1 - radius) / 0.05)
    texture = _texture(n, 4, size, depth, generator) * 0.10 + _texture(n, 9, size, depth, generator) * 0.05
    tissue = between(0.38, 0.55) + texture + 0.08 * torch.exp(-((radius - 0.97) / 0.06).square())

    # The lesions, each in its own turned coordinates, where it has about unit radius.
    marked, lesion = torch.zeros_like(radius), torch.zeros_like(radius)
    for place in places:
        reach, angle = between(*place.reach), between(*place.angle)
        unit = between(*place.unit) * (_WIDER if depth else 1)
        turn = between(0, 2 * torch.pi)
        stretch = between(0.85, 1.18)
        u, v = _turned(x - reach * torch.cos(angle), y - reach * torch.sin(angle), turn)
        u, v = u / unit * stretch, v / unit / stretch
        if depth:
            w = (z - between(-0.3, 0.3)) / (_LONGER * unit)
            taper = (1 - w.square()).clamp_min(0.05).sqrt()
            shape = _lesions(u / taper, v / taper, place.shape, pixel / unit, generator) * (w.abs() < 1)
        else:
            shape = _lesions(u, v, place.shape, pixel / unit, generator)
        polarity = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
        lesion = lesion + polarity * between(0.28, 0.42) * shape
        marked = torch.maximum(marked, shape)

    grey = 0.04 + body * (tissue - 0.04 + lesion)
    blur = scanner("blur")
    for _ in range(max(1, round(size / 28))):
        smooth = _smooth(grey.view(-1, size, size)).view(grey.shape)
        grey = grey + blur * (smooth - grey)
    grey = (grey - 0.04) * scanner("contrast") + 0.04 + scanner("offset")
    outside = (scanner("round_view") > 0) & ((x.square() + y.square()) * scanner("view").square() > 1)
    noise = scanner("noise")
    if channels == 1:
        images = (grey + noise * torch.randn(grey.shape, generator=generator))[:, None]
    else:
        tint = torch.tensor([s.tint for s in SCANNERS])[site][:, :, None, None]
        # A lesion has a hue of its own, random so that colour does not tell the class either.
        hue = 0.14 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5) * (body * marked)[:, None]
        grain = noise[:, None] * torch.randn(n, 3, *grey.shape[1:], generator=generator)
        images = (grey[:, None] + hue) * tint + grain
    images = images.masked_fill(outside[:, None], 0.0).clamp_(0, 1)
    return images.view(n, channels, depth, size, size) if depth else images


def _lesions(u: Tensor, v: Tensor, labels: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """The lesion of each image, 0..1, `(n, H, W)`; `pixel` is the width of a pixel in the same coordinates."""
    out = torch.zeros_like(u)
    for k, draw in enumerate((_nodule, _ring, _spiculated, _calcifications, _opacity, _band)):
        mine = torch.nonzero(labels == k).flatten()
        if len(mine):
            out[mine] = draw(u[mine], v[mine], pixel[mine], generator)
    return out


def _nodule(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    return torch.sigmoid((0.85 - _radius(u, v)) / (0.3 * pixel))


def _ring(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    width = 0.12 + 0.4 * pixel
    return torch.exp(-((_radius(u, v) - 0.85) / width).square())


def _spiculated(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """A small core with rays, their number and lengths random."""
    n = len(u)
    arms = torch.randint(5, 8, (n, 1, 1), generator=generator).to(u.dtype)
    phase = torch.rand(n, 1, 1, generator=generator) * 2 * torch.pi
    angle = torch.atan2(v, u)
    sharp = torch.cos(0.5 * arms * angle).abs().pow(5)  # 5, 6 or 7 rays
    length = 0.75 + 0.2 * torch.cos(angle + phase)
    edge = 0.45 + length * sharp
    return torch.sigmoid((edge - _radius(u, v)) / (0.3 * pixel))


def _calcifications(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """A cluster of six to nine specks."""
    n = len(u)
    out = torch.zeros_like(u)
    wide = (0.09 + 0.42 * pixel).square()
    for k in range(9):
        # Golden-angle spiral with jitter: specks spread over the cluster and rarely touch.
        jitter = torch.rand(n, 3, 1, 1, generator=generator)
        r = 1.15 * ((k + 0.5) / 9) ** 0.5 + 0.25 * (jitter[:, 0] - 0.5)
        angle = 2.39996 * k + 0.7 * (jitter[:, 1] - 0.5)
        speck = torch.exp(-((u - r * angle.cos()).square() + (v - r * angle.sin()).square()) / wide)
        shown = (jitter[:, 2] < 0.6) if k >= 6 else torch.ones_like(r, dtype=torch.bool)
        out = torch.maximum(out, speck * shown)
    return out


def _opacity(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """A large patch without an edge."""
    return torch.exp(-_radius(u, v).square() / 1.4)


def _band(u: Tensor, v: Tensor, pixel: Tensor, generator: torch.Generator) -> Tensor:
    """A straight streak, about five times as long as wide."""
    width = 0.15 + 0.35 * pixel
    return torch.exp(-(v / width).square()) * torch.sigmoid((1.5 - u.abs()) / 0.1)


def _radius(u: Tensor, v: Tensor) -> Tensor:
    return (u.square() + v.square()).sqrt()


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _texture(n: int, grid: int, size: int, depth: int, generator: torch.Generator) -> Tensor:
    """Smooth noise of about unit size: random values on a coarse grid, interpolated."""
    if depth:
        coarse = torch.randn(n, 1, grid, grid, grid, generator=generator)
        fine = F.interpolate(coarse, (depth, size, size), mode="trilinear", align_corners=True)
        return fine.view(n, depth * size, size)
    coarse = torch.randn(n, 1, grid, grid, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[:, 0]


def _smooth(images: Tensor) -> Tensor:
    """A binomial 3x3 blur, by shifted sums: the same bits with any number of threads, unlike a convolution."""
    p = F.pad(images[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    p = 0.25 * p[:, :-2] + 0.5 * p[:, 1:-1] + 0.25 * p[:, 2:]
    return 0.25 * p[:, :, :-2] + 0.5 * p[:, :, 1:-1] + 0.25 * p[:, :, 2:]
