"""Small files with the names that the documentation uses, in place of the reader's own: phantoms, never patients.

python examples.py FOLDER       writes them all
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.data.sources import load_data
from fedistill.rehearsal import write_npz


def write_examples(folder: Path) -> None:
    small = phantoms(phantom_images=320, phantom_classes=3, phantom_size=16)
    with_sites(folder / "wbc_sites.npz", small)
    for name in ("north.npz", "pneumonia600.npz"):
        write_npz(folder / name, phantoms(phantom_images=600, phantom_classes=2, phantom_size=16))
    (folder / "medmnist").mkdir()
    write_npz(folder / "medmnist" / "pneumoniamnist.npz", phantoms(phantom_images=240, phantom_classes=2))
    manifest(folder, small)
    (folder / "clients.json").write_text(
        json.dumps({"north": list(range(160)), "south": list(range(160, len(small.train)))})
    )


def phantoms(**settings: int) -> Dataset:
    return load_data(make_config(settings))


def with_sites(path: Path, data: Dataset) -> None:
    """An `.npz` file that says at which of three sites each image was taken."""
    write_npz(path, data)
    arrays = dict(np.load(path))
    for part, split in data.splits.items():
        arrays[f"{part}_site"] = np.arange(len(split)) % 3
    np.savez(path, site_names=np.array(["north", "south", "east"]), **arrays)


def manifest(folder: Path, data: Dataset) -> None:
    """`scans/`, one folder per class, and `study.csv` with patients and splits of the same images."""
    rows = []
    for split, images in data.splits.items():
        for i, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            name = data.class_names[int(label)]
            path = Path("scans") / name / f"{split}-{i}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / path)
            rows.append([str(path), name, split, ("north", "south")[i % 2], f"{split}-{i // 2}"])
    with open(folder / "study.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "site", "patient"], *rows])


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]))
