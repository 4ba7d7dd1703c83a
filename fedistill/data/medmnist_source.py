"""The sets of MedMNIST (Yang et al. 2023, Scientific Data 10:41), by their flag."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedistill.data.dataset import Dataset
from fedistill.data.npz import load_npz
from fedistill.errors import FedistillError


@dataclass(frozen=True)
class _Flag:
    modality: str
    class_names: tuple[str, ...]
    kind: str = "multiclass"


_ORGANS: tuple[str, ...] = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
)
_ORGANS += ("lung-right", "pancreas", "spleen")

# The package `medmnist` holds the same names, but importing it takes seconds: it is only loaded to download.
MEDMNIST: dict[str, _Flag] = {
    "pathmnist": _Flag(
        "pathology",
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
    ),
    "dermamnist": _Flag(
        "dermatoscopy",
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
    ),
    "octmnist": _Flag("oct", ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")),
    "pneumoniamnist": _Flag("xray", ("normal", "pneumonia")),
    "retinamnist": _Flag("fundus", ("0", "1", "2", "3", "4"), "ordinal"),
    "breastmnist": _Flag("ultrasound", ("malignant", "normal, benign")),
    "bloodmnist": _Flag(
        "microscopy",
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
    ),
    "tissuemnist": _Flag(
        "microscopy",
        (
            "Collecting Duct, Connecting Tubule",
            "Distal Convoluted Tubule",
            "Glomerular endothelial cells",
            "Interstitial endothelial cells",
            "Leukocytes",
            "Podocytes",
            "Proximal Tubule Segments",
            "Thick Ascending Limb",
        ),
    ),
    "organamnist": _Flag("ct", _ORGANS),
    "organcmnist": _Flag("ct", _ORGANS),
    "organsmnist": _Flag("ct", _ORGANS),
    "chestmnist": _Flag(
        "xray",
        (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        "multilabel",
    ),
    "organmnist3d": _Flag(
        "ct",
        (
            "liver",
            "kidney-right",
            "kidney-left",
            "femur-right",
            "femur-left",
            "bladder",
            "heart",
            "lung-right",
            "lung-left",
            "spleen",
            "pancreas",
        ),
    ),
    "nodulemnist3d": _Flag("ct", ("benign", "malignant")),
    "adrenalmnist3d": _Flag("mask", ("normal", "hyperplasia")),
    "fracturemnist3d": _Flag("ct", ("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture")),
    "vesselmnist3d": _Flag("mask", ("vessel", "aneurysm")),
    "synapsemnist3d": _Flag("microscopy", ("inhibitory synapse", "excitatory synapse")),
}
_LARGER = (64, 128, 224)  # pixels per side of the larger editions; the plain file has 28
_LARGER_VOLUMES = (64,)
_NETWORK_SECONDS = 20.0


def load_medmnist(flag: str, image_size: int) -> Dataset:
    """The set called `flag`, from `$MEDMNIST_ROOT` or `~/.medmnist`, downloaded when the file is not there.

    `image_size` 64, 128 or 224 (of volumes 64) selects the edition of that size; any other size uses the 28-pixel edition.
    Raises `FedistillError` when the file is absent and cannot be downloaded.
    """
    larger = _LARGER_VOLUMES if flag.endswith("3d") else _LARGER
    edition = f"_{image_size}" if image_size in larger else ""
    root = Path(os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist").expanduser()
    path = root / f"{flag}{edition}.npz"
    if not path.is_file():
        _download(flag, image_size if edition else 28, path)
    return load_flag(path, flag, name=flag)


def load_flag(path: Path, flag: str, *, name: str = "") -> Dataset:
    """The file at `path`, which holds the set called `flag`."""
    about = MEDMNIST[flag]
    return load_npz(path, name=name, modality=about.modality, class_names=about.class_names, kind=about.kind)


def flag_of(stem: str) -> str:
    """The flag that the stem of a file name stands for ("pathmnist_64" is pathmnist), or an empty string."""
    flag = stem.removesuffix("_64").removesuffix("_128").removesuffix("_224")
    return flag if flag in MEDMNIST else ""


def _download(flag: str, size: int, path: Path) -> None:
    """Fetch the official file with the package `medmnist`, which checks its MD5, and move it to `path`."""
    import medmnist
    from medmnist.info import INFO

    address = INFO[flag][f"url_{size}" if size != 28 else "url"].split("?")[0]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_SECONDS)  # the package sets none and could wait for ever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Into a folder of its own: a download that breaks off must not leave half a file that looks like the data.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            source = getattr(medmnist, INFO[flag]["python_class"])
            source(split="val", root=folder, size=size, download=True, mmap_mode=None)
            os.replace(Path(folder) / path.name, path)
    except (RuntimeError, OSError):
        raise FedistillError(
            "no-data", f"{path} is missing and could not be downloaded: fetch it from {address} and put it there."
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
