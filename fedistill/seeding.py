"""Named random generators: one seed, one stream per purpose."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the purpose `names`, derived from `seed`: streams of different names are independent.

    Never for privacy mechanisms: their randomness must be fresh and secret.
    """
    digest = hashlib.sha256(repr((seed, *map(str, names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
