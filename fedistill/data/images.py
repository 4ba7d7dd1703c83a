"""Image files from a folder or a manifest, decoded into one array."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fedistill.data.assemble import SPLITS, Part, assemble
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError, unknown
from fedistill.memory import check_memory

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Entry:
    """One image file with what is known of it; `split`, `site` and `patient` are empty when not given.

    label: the class, or the findings (none, one or several) of a data set where an image may have several.
    """

    path: Path
    label: str | tuple[str, ...]
    split: str = ""
    site: str = ""
    patient: str = ""


def split_word(word: str) -> str:
    """train, val or test for any usual word for it, else an empty string."""
    return _SPLIT_WORDS.get(word.strip().lower(), "")


def natural_order(names: set[str]) -> list[str]:
    """Sorted with numbers by value: "grade 2" before "grade 10"."""

    def key(name: str) -> tuple[list[tuple[int, int, str]], str]:
        pieces = re.findall(r"[0-9]+|[^0-9]+", name)
        return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in pieces], name

    return sorted(names, key=key)


def from_entries(name: str, entries: Sequence[Entry], classes: set[str], image_size: int) -> Dataset:
    """The data set of these files. `classes` may declare classes that no entry has, which is an error later.

    `image_size` above 0 resizes every image to that many pixels per side while reading, so that mixed sizes are fine.
    Either all entries name a split or none does. Raises `FedistillError` on an unreadable image and on images that
    differ in size or in colour.
    """
    class_names, site_names = natural_order(classes), natural_order({entry.site for entry in entries})
    pixels = read_images([entry.path for entry in entries], image_size)
    class_of = {text: k for k, text in enumerate(class_names)}
    site_of = {text: k for k, text in enumerate(site_names)}
    several = any(isinstance(entry.label, tuple) for entry in entries)
    labels = np.zeros((len(entries), len(classes)) if several else len(entries), dtype=np.int64)
    for i, entry in enumerate(entries):
        if isinstance(entry.label, tuple):
            labels[i, [class_of[text] for text in entry.label]] = 1
        else:
            labels[i] = class_of[entry.label]
    site = np.array([site_of[entry.site] for entry in entries], dtype=np.int64)
    # An image without a patient is its own group, but no patient: it may show anyone.
    who = [entry.patient or f"\0{i}" for i, entry in enumerate(entries)]
    together = np.unique(np.array(who), return_inverse=True)[1] if entries else np.zeros(0, dtype=np.int64)
    whole = Part(pixels, labels, site, together, together if all(entry.patient for entry in entries) else None)
    parts = {"train": whole}
    if any(entry.split for entry in entries):
        split = np.array([entry.split for entry in entries])
        chosen = {key: np.flatnonzero(split == key) for key in SPLITS}
        parts = {key: whole.take(index) for key, index in chosen.items() if len(index)}
        if "train" not in parts:
            raise FedistillError("too-few-images", f"{name} has no training images: one split must be called train.")
    kind = "multilabel" if several else "multiclass"
    return assemble(name, "generic", class_names, [text or "all" for text in site_names], parts, kind)


def read_images(paths: Sequence[Path], image_size: int) -> np.ndarray:
    """`(n, H, W, C)` uint8, C 1 for grey and 3 for colour, in the order of `paths`; resized when `image_size` > 0."""
    if len(paths) < 2:
        return np.zeros((len(paths), 1, 1, 1), dtype=np.uint8)  # `assemble` reports it
    first = _read(paths[0], image_size)
    check_memory(len(paths) * first.nbytes, f"{len(paths)} images of {_size(first)} pixels")
    out = np.empty((len(paths), *first.shape), dtype=np.uint8)

    def fill(i: int) -> None:
        pixels = _read(paths[i], image_size)
        if pixels.shape[2] != first.shape[2]:
            grey, colour = (paths[0], paths[i]) if first.shape[2] == 1 else (paths[i], paths[0])
            raise FedistillError(
                "mixed-images", f"{grey} is grey and {colour} is colour: convert all images to the same mode."
            )
        if pixels.shape != first.shape:
            raise FedistillError(
                "mixed-images",
                f"{paths[0]} has {_size(first)} pixels and {paths[i]} has {_size(pixels)}: "
                f"set image_size to resize all images to one size.",
            )
        out[i] = pixels

    # Decoding releases the interpreter lock, so threads help; each writes into its own row.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(fill, range(len(paths))):
                pass
        except FedistillError:
            pool.shutdown(cancel_futures=True)
            raise
    return out


def _read(path: Path, image_size: int) -> np.ndarray:
    """`(H, W, C)` uint8."""
    try:
        with Image.open(path) as file:
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                raise FedistillError("bad-image", f"{path} holds {_frames(file)} frames: save one image per file.")
            image = ImageOps.exif_transpose(file) if file.format in ("JPEG", "MPO") else file
            image = _grey_or_colour(path, image)
            if image_size:
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, reducing_gap=None)
            pixels = np.asarray(image)
    except FileNotFoundError:
        raise FedistillError("missing-file", f"The image {path} does not exist.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise FedistillError("bad-image", f"Cannot read {path} as an image: replace or remove it.") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _grey_or_colour(path: Path, image: Image.Image) -> Image.Image:
    """Mode L or RGB, only where that loses nothing."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "RGBA", "P", "PA"):
        if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
            image = image.convert("LA" if image.mode == "LA" else "RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                raise FedistillError("bad-image", f"{path} has transparent pixels: save it on an opaque background.")
            return image.convert("L" if image.mode == "LA" else "RGB")
        palette = np.array(image.getpalette() or [0, 0, 0]).reshape(-1, 3)
        return image.convert("L" if (palette == palette[:, :1]).all() else "RGB")
    if image.mode.startswith(("I", "F")):
        what = f"{path} has more than 8 bits per pixel: choose a grey window and save it with 8 bits."
        raise FedistillError("bad-image", what)
    raise FedistillError("bad-image", f"{path} has the colour mode {image.mode}: save it as grey or RGB.")


def _frames(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def known_split(word: str, where: str) -> str:
    """The split that `word` stands for; raises `FedistillError` when there is none."""
    found = split_word(word)
    if not found:
        error = unknown("split", word, SPLITS)
        raise FedistillError(error.code, f"{where}: {error.sentence}")
    return found
