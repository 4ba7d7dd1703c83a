"""The methods by name. A method is a composition of small parts, not a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedistill.config import Config
from fedistill.errors import unknown
from fedistill.matching.schedule import Reach, Segment, fixed_window, growing_end, growing_window


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line for people, its source, and the parts that it is made of."""

    summary: str
    source: str
    schedule: Callable[[int, int, Reach, torch.Generator], Segment]
    soft_labels: bool = False
    mask: str = "none"
    overlap: bool = False


METHODS: dict[str, Method] = {
    "mtt": Method(
        summary="trajectory matching, segments drawn from a fixed window",
        source="Cazenavette et al., CVPR 2022, arXiv 2203.11932",
        schedule=fixed_window,
    ),
    "datm": Method(
        summary="trajectory matching, the window grows towards later segments, learned soft labels",
        source="Guo et al., ICLR 2024, arXiv 2310.05773",
        schedule=growing_window,
        soft_labels=True,
    ),
    "ptm": Method(
        summary="progressive trajectory matching: fixed start, growing end, overlap mitigation (our own definition of overlap)",
        source="Yu, Liu, Chen 2024, arXiv 2403.13469",
        schedule=growing_end,
        overlap=True,
    ),
    "prune": Method(
        summary="as mtt, without the parameters that are hardest to match (our own definition of hard)",
        source="Li et al., AAAI-23 workshop, arXiv 2209.14603",
        schedule=fixed_window,
        mask="prune",
    ),
}


def method_of(config: Config) -> Method:
    """The method of `config` with its overrides (`labels`, `mask`, `overlap`) applied. Raises on an unknown name."""
    if config.method not in METHODS:
        raise unknown("method", config.method, METHODS)
    chosen = METHODS[config.method]
    return Method(
        summary=chosen.summary,
        source=chosen.source,
        schedule=chosen.schedule,
        soft_labels=chosen.soft_labels if config.labels == "auto" else config.labels == "soft",
        mask=chosen.mask if config.mask == "auto" else config.mask,
        overlap=chosen.overlap if config.overlap == "auto" else config.overlap == "on",
    )


def recommended_method(ipc: int) -> str:
    """The method to take at a budget of `ipc` images per class: one for all budgets, until a benchmark says otherwise."""
    return Config().method
