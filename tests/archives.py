"""Zip archives that are not as they were made."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

Files = dict[str, bytes]


def changed(archive: bytes, change: Callable[[Files], object]) -> bytes:
    """The archive anew, after `change` had its files, by their paths, in its hands."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    change(files)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return out.getvalue()
