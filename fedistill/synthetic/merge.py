"""The union of the sites' synthetic sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedistill.errors import FedistillError
from fedistill.synthetic.set import SyntheticSet


def merge(sets: Sequence[SyntheticSet]) -> SyntheticSet:
    """Concatenate sets of different sites in the order of the sites' names, so that the order of arrival does not matter.

    Raises `FedistillError` ("unlike-sets") naming the sites that disagree on classes, kind of task, geometry or
    normalisation, and on two sets that claim the same site.
    """
    if not sets:
        raise FedistillError("no-sets", "There is no synthetic set to merge.")
    ordered = sorted(sets, key=lambda s: s.sites)
    first = ordered[0]
    for other in ordered[1:]:
        for what in ("class_names", "kind", "geometry", "scale", "modality", "mean", "std"):
            if getattr(first, what) != getattr(other, what):
                raise FedistillError(
                    "unlike-sets",
                    f"The sets of {', '.join(first.sites)} and {', '.join(other.sites)} cannot be merged: "
                    f"{what} is {getattr(first, what)} and {getattr(other, what)}.",
                )
    sites = tuple(name for s in ordered for name in s.sites)
    if len(set(sites)) != len(sites):
        raise FedistillError("same-site", f"Two sets come from the same site: {', '.join(sites)}.")
    offsets = [sum(len(s.sites) for s in ordered[:i]) for i in range(len(ordered))]
    return SyntheticSet(
        images=torch.cat([s.images for s in ordered]),
        labels=torch.cat([s.labels for s in ordered]),
        site=torch.cat([s.site + offset for s, offset in zip(ordered, offsets, strict=True)]),
        sites=sites,
        class_names=first.class_names,
        mean=first.mean,
        std=first.std,
        modality=first.modality,
        step_size=tuple(a for s in ordered for a in s.step_size),
        # a set speaks for its own sites alone
        manifest={name: about for s in ordered for name, about in s.manifest.items() if name in s.sites},
        kind=first.kind,
        scale=first.scale,
    )
