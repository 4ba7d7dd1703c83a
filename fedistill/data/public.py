"""Public constants of each imaging modality. None of them depends on anybody's data, so they cost no privacy."""

from __future__ import annotations

import torch
from torch import Tensor

from fedistill.errors import unknown

# Mean and standard deviation of the pixels, on a 0..1 scale, the same for every channel. Round figures by intent: they
# centre a modality well enough for training, and every site can know them without looking at an image.
NORMALISATION: dict[str, tuple[float, float]] = {
    "generic": (0.5, 0.25),
    "xray": (0.5, 0.25),
    "ct": (0.45, 0.25),
    "microscopy": (0.6, 0.25),
    "pathology": (0.7, 0.2),
    "dermatoscopy": (0.65, 0.2),
    "ultrasound": (0.3, 0.2),
    "oct": (0.2, 0.2),
    "fundus": (0.35, 0.25),
    "mask": (0.1, 0.3),  # the outline of an organ or vessel, white on black
    "phantom": (0.4, 0.25),
}

_MILD = ("rotate", "scale", "crop", "cutout", "brightness", "contrast")

# Operations that keep the label true. A flip moves the heart to the right and the liver to the left, so it is left out
# wherever the side of an organ, the depth below a probe or the order of layers is part of what is seen.
AUGMENT: dict[str, tuple[str, ...]] = {
    "generic": _MILD,
    "xray": _MILD,
    "ct": _MILD,
    "microscopy": ("flip", "vflip", "rot90", *_MILD, "saturation"),
    "pathology": ("flip", "vflip", "rot90", *_MILD, "saturation"),
    "dermatoscopy": ("flip", "vflip", "rot90", *_MILD, "saturation"),
    "ultrasound": _MILD,
    "oct": ("flip", *_MILD),  # a left eye becomes a right eye; the retinal layers keep their order
    "fundus": ("flip", *_MILD, "saturation"),  # likewise: a mirrored left eye is a right eye
    "mask": ("flip", "rotate", "scale", "crop", "cutout"),  # a left gland becomes a right one
    "phantom": ("flip", "vflip", "rot90", *_MILD, "saturation"),
}


def normalise(images: Tensor, modality: str) -> Tensor:
    """`(n, C, ..., H, W)` uint8 to float32 with the public mean and standard deviation of `modality`.

    Raises `FedistillError` on an unknown modality.
    """
    mean, std = NORMALISATION[known_modality(modality)]
    return images.to(torch.float32).div_(255.0).sub_(mean).div_(std)


def augmentations(modality: str, channels: int) -> tuple[str, ...]:
    """The names of the operations that are safe for images of `modality` with this many channels.

    Raises `FedistillError` on an unknown modality.
    """
    names = AUGMENT[known_modality(modality)]
    return names if channels == 3 else tuple(name for name in names if name != "saturation")


def known_modality(name: str) -> str:
    """`name` itself; raises `FedistillError` with the nearest valid name when there is no such modality."""
    if name not in NORMALISATION:
        raise unknown("modality", name, NORMALISATION)
    return name
