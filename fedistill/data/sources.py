"""One way in: `load_data` turns the setting `data` into a `Dataset`, whatever kind of source it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedistill.config import Config
from fedistill.data.assemble import check_classes
from fedistill.data.dataset import Dataset, of_task
from fedistill.data.folder import load_folder
from fedistill.data.manifest import load_manifest
from fedistill.data.medmnist_source import MEDMNIST, flag_of, load_flag, load_medmnist
from fedistill.data.npz import load_npz
from fedistill.data.phantoms import phantom_data
from fedistill.data.public import known_modality
from fedistill.errors import FedistillError, unknown
from fedistill.memory import check_memory


def load_data(config: Config) -> Dataset:
    """The data set that `config.data` names, square, at `config.image_size`, under `config.modality` and `config.task`.

    Raises `FedistillError` when there is no such source, when it cannot be read, on an unknown modality, on a task that the
    labels do not fit, and on a class without images; not with privacy=dp, where the names of the classes are public and
    whether a site has images of them is not.
    """
    if config.modality != "auto":
        known_modality(config.modality)  # before the work of reading
    loaded = _load(config)
    if config.privacy == "none":
        check_classes(loaded)
    data = resized(of_task(loaded, config.task), config.image_size)
    height, width = data.geometry[-2:]
    if height != width:
        raise FedistillError(
            "not-square", f"The images of {data.name} have {width}x{height} pixels: set image_size to make them square."
        )
    return data if config.modality == "auto" else replace(data, modality=config.modality)


def _load(config: Config) -> Dataset:
    source, path = config.data.strip(), place_of(config.data)
    if path is None:
        return phantom_data(config) if source == "phantom" else load_medmnist(source, config.image_size)
    if path.is_dir():
        return load_folder(path, config.image_size)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        flag = flag_of(path.stem)
        return load_flag(path, flag) if flag else load_npz(path)
    if suffix == ".csv":
        return load_manifest(path, config.image_size, config.task)
    raise FedistillError("bad-data", f"{path} is neither an .npz file, a .csv manifest nor an image folder.")


def is_name(source: str) -> bool:
    """Whether a data source is `phantom` or a MedMNIST flag, which come before files and folders of the same name."""
    return source.strip() == "phantom" or source.strip() in MEDMNIST


def place_of(source: str) -> Path | None:
    """The file or folder that a data source names; None where its name is all. Raises `FedistillError` where there is none."""
    source = source.strip()
    if is_name(source):
        return None
    path = Path(source)
    try:
        path = path.expanduser()
        if source and (path.is_dir() or path.is_file()):
            return path
    except (OSError, RuntimeError):  # a name too long for a file, an unknown ~user, a folder that may not be entered
        pass
    if path.suffix.lower() in (".npz", ".csv") or "/" in source or "\\" in source:
        raise FedistillError("missing-file", f"data={source}: there is no file or folder {path.absolute()}.")
    raise unknown("data source", source, ["phantom", *MEDMNIST])


def resized(data: Dataset, size: int) -> Dataset:
    """Square images, or cubes, of `size` pixels per side; unchanged when `size` is 0."""
    if size == 0 or set(data.geometry[1:]) == {size}:
        return data
    pixels = size ** (len(data.geometry) - 1) * data.geometry[0]
    check_memory(pixels * sum(map(len, data.splits.values())), f"image_size={size} for the images of {data.name}")
    train, val, test = (replace(split, images=resize(split.images, size)) for split in data.splits.values())
    return replace(data, train=train, val=val, test=test)


def resize(images: Tensor, size: int) -> Tensor:
    """`(n, C, H, W)` or `(n, C, D, H, W)` uint8 to `size` along every axis of space, linear with antialiasing."""
    sides = images.dim() - 2
    out = torch.empty(*images.shape[:2], *[size] * sides, dtype=torch.uint8)
    step = 512 if sides == 2 else 32
    for start in range(0, len(images), step):  # in pieces: floats take four times the memory
        small = _linear(images[start : start + step].flatten(1, -3).to(torch.float32), size, size)
        if sides == 3:  # slice by slice, then along the depth
            small = small.reshape(len(small), images.shape[1], -1, size * size)
            small = _linear(small, size, size * size).reshape(len(small), -1, size, size, size)
        out[start : start + step] = small.round_().clamp_(0, 255).to(torch.uint8)
    return out


def _linear(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)
