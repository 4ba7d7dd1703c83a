"""Which piece of an expert's trajectory is matched at iteration k. The unit is checkpoints; lines may be cut anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """From checkpoint `start` to checkpoint `stop`."""

    start: float
    stop: float


@dataclass(frozen=True)
class Reach:
    """What a schedule may use: segments of `length` checkpoints, the last of which starts at checkpoint `end`."""

    length: int
    end: int


def fixed_window(k: int, total: int, reach: Reach, rng: torch.Generator) -> Segment:
    """MTT: the start is uniform in 0..end from the first iteration on (Cazenavette et al., CVPR 2022)."""
    start = int(torch.randint(reach.end + 1, (1,), generator=rng))
    return Segment(start, start + reach.length)


def growing_window(k: int, total: int, reach: Reach, rng: torch.Generator) -> Segment:
    """DATM: the start is uniform in 0..U(k), and U grows to `end` over the first half (Guo et al., ICLR 2024)."""
    upper = min(reach.end, int((reach.end + 1) * (0.25 + 1.5 * k / max(1, total))))
    start = int(torch.randint(upper + 1, (1,), generator=rng))
    return Segment(start, start + reach.length)


def growing_end(k: int, total: int, reach: Reach, rng: torch.Generator) -> Segment:
    """PTM: the start stays at 0 and the end moves away, easier to harder (Yu, Liu, Chen 2024; arXiv 2403.13469)."""
    grown = min(reach.end, (reach.end + 1) * k // max(1, total))
    return Segment(0, reach.length + grown)


def continuous(k: int, total: int, reach: Reach, rng: torch.Generator) -> Segment:
    """MCT: as MTT, with a start between checkpoints (Zhong et al., CVPR 2025; arXiv 2406.19827)."""
    start = reach.end * float(torch.rand(1, generator=rng))
    return Segment(start, start + reach.length)
