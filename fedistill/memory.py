"""How a training process uses the machine: one thread, and memory that it keeps."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
