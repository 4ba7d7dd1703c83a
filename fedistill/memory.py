"""How a training process uses the machine: one thread, memory that it keeps, and none that is not there."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedistill.errors import FedistillError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc's allocator to reuse memory; without effect elsewhere.

    A training step allocates and frees activations of a few megabytes. By default each comes from the system anew, page by
    page, which took more time than the arithmetic on virtual machines where page faults are slow.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc accepts
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 * 2**20)


@contextmanager
def one_thread() -> Iterator[None]:
    """Train with one thread, and leave the caller the threads it had; the process keeps the memory that it frees.

    Small networks gain little from a second thread, lose much when other processes want the core, and their bits
    depend on the number of threads.
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_memory(size: int, what: str) -> None:
    """Raise `FedistillError` ("no-memory") where `size` bytes for `what` are more than the machine has left: it would be killed."""
    left = free_memory()
    if left is not None and size > left:
        raise FedistillError(
            "no-memory", f"{what} takes {size / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are free: ask for less."
        )


def free_memory() -> int | None:
    """Bytes that programs can have without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
