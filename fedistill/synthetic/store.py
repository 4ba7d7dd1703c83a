"""A synthetic set as a folder: `set.safetensors`, `manifest.json` and a contact sheet for people."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedistill.errors import FedistillError
from fedistill.files import read_plain, write_bytes, write_tensors
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import sheet_of
from fedistill.wire import MAX_BYTES, MAX_TEXT, Arrays, decode, encode

_DTYPES = ("U8", "U16", "F16", "F32")  # those of `encode`; numpy has no word for some others


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
        return decode(_arrays(folder / "set.safetensors"), read_plain(folder / "manifest.json", MAX_TEXT).decode())
    except FileNotFoundError:
        raise FedistillError(
            "no-set", f"{folder} holds no synthetic set (set.safetensors and manifest.json)."
        ) from None
    except (OSError, SafetensorError, UnicodeDecodeError):
        raise FedistillError(
            "bad-set", f"The synthetic set in {folder} cannot be read: its files are damaged."
        ) from None


def _arrays(path: Path) -> Arrays:
    """The arrays in a file that may be somebody else's. Raises `OSError` or `SafetensorError` where they are not those of a set."""
    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
        raise OSError(f"{path} is not a file of at most {MAX_BYTES} bytes")
    with safe_open(path, "np") as file:
        names = file.keys()
        if len(names) > 4 or any(file.get_slice(name).get_dtype() not in _DTYPES for name in names):
            raise OSError(f"{path} holds other arrays than those of a set")
        return {name: file.get_tensor(name) for name in names}
