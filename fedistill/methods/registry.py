"""The methods by name. A method is a composition of small parts, not a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.errors import FedistillError, unknown
from fedistill.matching import trajectory
from fedistill.matching.objective import MASKS
from fedistill.matching.problem import Bundle, Matching
from fedistill.matching.schedule import Reach, Segment, continuous, fixed_window, growing_end, growing_window
from fedistill.matching.state import State
from fedistill.methods import distribution, gradient, selection, sketch, teach

Schedule = Callable[[int, int, Reach, torch.Generator], Segment]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line for people, its source, and the parts that it is made of.

    step: one iteration, in place. begin: what is done once before the first. prepare: what the steps need besides, from the
    configuration and the bundle. schedule, mask, shape, line, overlap and learned labels belong to trajectory matching.
    select: takes real images instead of making any (then there is no step).
    sees_images: whether it reads real images while it distils; then nothing that it makes can be private by post-processing.
    sketch, experts: what it needs to be made of the images beforehand.
    meets_others: in later rounds its experts are trained anew, on the site's images and on those that the other sites made.
    """

    summary: str
    source: str
    step: Callable[[Matching, State], None] | None = None
    begin: Callable[[Matching, State], None] | None = None
    prepare: Callable[[Config, Bundle], Any] | None = None
    select: Callable[[Matching, Tensor, torch.Generator], Tensor] | None = None
    schedule: Schedule | None = None
    soft_labels: bool = False
    mask: str = "none"
    overlap: bool = False
    shape: bool = False
    line: bool = False
    augments: bool = True
    experts: bool = True
    sketch: bool = False
    sees_images: bool = False
    meets_others: bool = False

    @property
    def learns_labels(self) -> bool:
        return self.soft_labels and self.schedule is not None

    @property
    def prepares(self) -> bool:
        """Whether a site has work to do (the phase "experts") before it distils."""
        return self.experts or self.sketch


_matching = partial(Method, step=trajectory.iterate, begin=trajectory.calibrate)
_reading = partial(Method, sees_images=True)

METHODS: dict[str, Method] = {
    "mtt": _matching(
        summary="trajectory matching, segments drawn from a fixed window",
        source="Cazenavette et al., CVPR 2022, arXiv 2203.11932",
        schedule=fixed_window,
    ),
    "ptm": _matching(
        summary="progressive trajectory matching: fixed start, growing end, overlap mitigation (our own definition of overlap)",
        source="Yu, Liu, Chen 2024, arXiv 2403.13469",
        schedule=growing_end,
        overlap=True,
    ),
    "prune": _matching(
        summary="as mtt, without the parameters that are hardest to match (our own definition of hard)",
        source="Li et al., AAAI-23 workshop, arXiv 2209.14603",
        schedule=fixed_window,
        mask="prune",
    ),
    "datm": _matching(
        summary="trajectory matching, the window grows towards later segments, learned soft labels",
        source="Guo et al., ICLR 2024, arXiv 2310.05773",
        schedule=growing_window,
        soft_labels=True,
    ),
    "hop": _matching(
        summary="growing window, three-point shape of the path, parameters from easy to complex",
        source="Bian et al. (HoP-TM), MICCAI 2025, arXiv 2509.24177",
        schedule=growing_window,
        mask="grow",
        shape=True,
    ),
    "line": _matching(
        summary="matching on straight surrogates of the trajectories, in continuous time",
        source="Zhong et al. (MCT), CVPR 2025, arXiv 2406.19827",
        schedule=continuous,
        line=True,
    ),
    "dc": _reading(
        summary="gradient matching; reads real images",
        source="Zhao, Mopuri, Bilen, ICLR 2021, arXiv 2006.05929",
        step=gradient.step,
        augments=False,
        experts=False,
    ),
    "dsa": _reading(
        summary="gradient matching with siamese augmentation; reads real images",
        source="Zhao and Bilen, ICML 2021, arXiv 2102.08259",
        step=gradient.step,
        experts=False,
    ),
    "dm": _reading(
        summary="distribution matching: mean features of random networks; reads real images",
        source="Zhao and Bilen, WACV 2023, arXiv 2110.04181",
        step=partial(distribution.step, features=distribution.random_network, distance=distribution.means),
        experts=False,
    ),
    "cf": _reading(
        summary="distribution matching: characteristic functions of the experts' features; reads real images",
        source="Wang et al. (NCFM), CVPR 2025, arXiv 2502.20653, without its sampling network",
        step=partial(distribution.step, features=distribution.between_experts, distance=distribution.characteristic),
        meets_others=True,
    ),
    "sketch": Method(
        summary="one pass over the images to a vector per class, to which the set is fitted; can be private with little noise",
        source="random features: Rahimi and Recht, NeurIPS 2007; noise: DP-MERF, Harder et al., AISTATS 2021",
        step=sketch.step,
        prepare=sketch.prepare,
        experts=False,
        sketch=True,
    ),
    "teach": Method(
        summary="function-space matching: students of the set answer as the experts do on public phantoms",
        source="meta-learning of a set: Wang et al., arXiv 1811.10959; teacher and probes are ours",
        step=teach.step,
        begin=teach.begin,
        prepare=teach.probes_of,
    ),
    "random": _reading(
        summary="random real images: the yardstick, never to be sent",
        source="-",
        select=selection.random,
        experts=False,
    ),
    "random-soft": _reading(
        summary="random real images with the experts' opinion as soft labels: the yardstick of methods with soft labels",
        source="Qin et al. 2024, arXiv 2406.10485",
        select=selection.random,
        soft_labels=True,
    ),
    "k-centre": _reading(
        summary="real images that cover the features of their class: a yardstick, never to be sent",
        source="Sener and Savarese, ICLR 2018, arXiv 1708.00489",
        select=selection.k_centre,
    ),
    "herding": _reading(
        summary="real images whose mean feature is that of their class: a yardstick, never to be sent",
        source="Welling, ICML 2009",
        select=selection.herding,
    ),
}


def method_of(config: Config) -> Method:
    """The method of `config` with its overrides (`labels`, `mask`, `overlap`) applied.

    Raises `FedistillError` on an unknown name, and on an override or a formation that the method has no use for.
    """
    if config.method not in METHODS:
        raise unknown("method", config.method, METHODS)
    chosen = METHODS[config.method]
    if chosen.schedule is None and (config.mask not in ("auto", "none") or config.overlap == "on"):
        raise FedistillError(
            "not-for-method",
            f"mask={config.mask} and overlap={config.overlap} belong to trajectory matching, and method={config.method} is none.",
        )
    if chosen.select is not None and config.formation > 1:
        raise FedistillError(
            "not-for-method",
            f"formation={config.formation} is for images that are made, and method={config.method} takes real ones: leave it at 1.",
        )
    if config.mask != "auto" and config.mask not in MASKS:
        raise unknown("value of mask", config.mask, MASKS)
    soft = chosen.soft_labels if config.labels == "auto" else config.labels == "soft"
    return replace(
        chosen,
        soft_labels=soft,
        experts=soft or (chosen.experts and chosen.select is not selection.random),
        mask=chosen.mask if config.mask == "auto" else config.mask,
        overlap=chosen.overlap if config.overlap == "auto" else config.overlap == "on",
    )
