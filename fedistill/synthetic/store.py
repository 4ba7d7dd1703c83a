"""A synthetic set as a folder: `set.safetensors`, `manifest.json` and a contact sheet for people."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedistill.errors import FedistillError
from fedistill.files import write_bytes, write_tensors
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import sheet_of
from fedistill.wire import decode, encode


def save_set(synthetic: SyntheticSet, folder: Path) -> None:
    """Write the folder whole or not at all; an older set in its place is replaced."""
    arrays, text = encode(synthetic)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary / "set.safetensors", {name: torch.from_numpy(a) for name, a in arrays.items()})
    write_bytes(temporary / "manifest.json", text.encode())
    sheet_of(synthetic).save(temporary / "contact-sheet.png")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_set(folder: Path | str) -> SyntheticSet:
    """The set of a folder that `save_set` wrote. Raises `FedistillError` if there is none, or if it is damaged."""
    folder = Path(folder)
    try:
        return decode(load_file(folder / "set.safetensors"), (folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise FedistillError(
            "no-set", f"{folder} holds no synthetic set (set.safetensors and manifest.json)."
        ) from None
    except (OSError, SafetensorError, UnicodeDecodeError):
        raise FedistillError(
            "bad-set", f"The synthetic set in {folder} cannot be read: its files are damaged."
        ) from None
