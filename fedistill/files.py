"""Files that are either whole or absent, whatever kills the process."""

from __future__ import annotations

import json
import os
import stat
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedistill.errors import FedistillError


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write atomically: a reader sees the old file or the new one. private: for the owner's eyes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # with whatever rights a killed process left it
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(os.open(temporary, flags, 0o600 if private else 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power; what the files hold is not meant."""
    if os.name == "nt":  # which opens no folders
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def write_once(path: Path, content: bytes) -> bytes:
    """Write atomically, for the owner's eyes alone, unless the file is there: returns what it holds, which never changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # fails where another process was first, unlike a replacement
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path.read_bytes()


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


class BrokenFile(FedistillError, ValueError):
    """A file of our own that is not as it was written."""


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Raises `BrokenFile` where what is done with a file cannot be done because it is torn; one that is missing is missing."""
    try:
        yield
    except (ValueError, KeyError, TypeError, SafetensorError):
        raise BrokenFile(
            "broken-file", f"{path} is not as it was written: remove it, and what it held is made anew."
        ) from None


def read_json(path: Path) -> Any:
    with whole(path):
        return json.loads(path.read_text())


def read_plain(path: Path, most: int) -> bytes:
    """What a plain file of at most `most` bytes holds, for files that somebody else made.

    Raises `OSError` on one that is longer, and on what is no file: a pipe would be waited for, and a device has no end.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            raise OSError(f"{path} is not a file of at most {most} bytes")
        return file.read(most)


def plain_members(archive: ZipFile) -> list[ZipInfo]:
    """What an archive that somebody else made holds. Raises `ValueError` where a member is neither stored nor deflated: with other
    methods the archive chooses how much memory is taken."""
    found = archive.infolist()
    if any(member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for member in found):
        raise ValueError("an archive's member is neither stored nor deflated")
    return found


def read_toml(path: Path, code: str) -> dict[str, Any]:
    """The table in a file. Raises `FedistillError`, with this code, on a file that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FedistillError(code, f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FedistillError(code, f"{path} is not a readable TOML file: {error}.") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Tensors and a JSON value in one safetensors file, so that both change together."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(plain, metadata={"about": json.dumps(about or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote."""
    with whole(path):
        return load_file(path), read_about(path)


def read_about(path: Path) -> dict[str, Any]:
    """The JSON value of `write_tensors`, without reading the tensors."""
    with whole(path), open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return dict(json.loads(header["__metadata__"]["about"]))
