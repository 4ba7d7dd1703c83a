"""What of a finished run is meant for others: a clean copy, without the sites' single sets and without the server's own notes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedistill.errors import FedistillError

_OF_RUN = ("report.html", "summary.json", "results.md")
_OF_SEED = ("merged", "model-*.safetensors")


def fetch(run: Path, to: Path) -> list[Path]:
    """Copy the results of the finished run in `run` to the new folder `to`, whole or not at all: what it holds, relative to it.

    Raises `FedistillError`: "not-finished", "exists", and "not-writable".
    """
    if not (run / "summary.json").exists():
        raise FedistillError(
            "not-finished", f"The run {run.name} has not finished: `fedistill server status` says why."
        )
    if os.path.lexists(to):
        raise FedistillError("exists", f"{to} exists already: choose another folder, nothing is overwritten.")
    found = [run / name for name in _OF_RUN if (run / name).exists()]
    found += [path for part in _OF_SEED for path in sorted(run.glob(f"seed-*/{part}"))]
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        for path in found:
            there = temporary / path.relative_to(run)
            there.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, there)
        os.rename(temporary, to)
    except OSError as error:
        raise FedistillError("not-writable", f"{to} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [path.relative_to(run) for path in found]
