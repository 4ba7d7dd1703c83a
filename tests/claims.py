"""Small sets by hand, with and without a guarantee."""

from __future__ import annotations

from typing import Any

import torch

from fedistill.privacy.accounting import Mechanism, cross_check, epsilon_of
from fedistill.release.document import Card
from fedistill.synthetic.set import SyntheticSet, one_hot
from fedistill.wire import quantise

MECHANISM = Mechanism(name="dp-sgd", sample_rate=0.2, noise_multiplier=2.0, steps=60)
DELTA = 1e-4
CARD = Card(name="toy", date="2026-11-03", publisher="Hospital of Somewhere", license="CC-BY-4.0", description="A toy.")
NONE = {"epsilon": None, "delta": None, "statement": "No formal guarantee: experts without noise."}


def private(mechanism: Mechanism = MECHANISM, **changes: Any) -> dict[str, Any]:
    """What the manifest of a site with differential privacy says, with some fields changed; None takes a field out."""
    first, second = epsilon_of([mechanism], DELTA), cross_check([mechanism], DELTA)
    entry: dict[str, Any] = {
        "epsilon": first.epsilon,
        "delta": DELTA,
        "unit": "image",
        "adjacency": "zero-out",
        "clip_norm": 1.0,
        "accountant": first.accountant,
        "second": None if second is None else {"epsilon": second.epsilon, "accountant": second.accountant},
        "mechanisms": [mechanism.to_dict()],
        "conditions": [
            {"number": k, "name": "a condition", "status": "declared" if k == 5 else "passed", "how": f"Check {k}."}
            for k in range(1, 11)
        ],
        "public": ["phantoms for pretraining"],
        "statement": "Noise on every sum.",
    }
    return {k: v for k, v in (entry | changes).items() if v is not None}


def set_of(
    *privacy: dict[str, Any],
    kind: str = "multiclass",
    shape: tuple[int, ...] = (1, 28, 28),
    classes: int = 2,
    per_class: int = 6,
    soft: bool = False,
    about: dict[str, Any] | None = None,
) -> SyntheticSet:
    """A set of as many sites as there are privacy statements, exactly as it would lie on disk."""
    rng = torch.Generator().manual_seed(1)
    sites = tuple(f"site-{k}" for k in range(len(privacy)))
    m = classes * per_class * len(sites)
    labels = one_hot(torch.arange(m) % classes, classes)
    if kind == "multilabel":
        labels = torch.rand(m, classes, generator=rng)
    elif soft:
        labels = 0.8 * labels + 0.2 / classes
    manifest = {
        site: {"method": "ptm", "init": "noise", "iterations": 3, "versions": {"fedistill": "0.1.0"}, "privacy": entry}
        | (about or {})
        for site, entry in zip(sites, privacy, strict=True)
    }
    return quantise(
        SyntheticSet(
            images=1.5 * torch.randn(m, *shape, generator=rng),
            labels=labels,
            site=torch.arange(m) // (classes * per_class),
            sites=sites,
            class_names=tuple(f"class {k}" for k in range(classes)),
            mean=0.5,
            std=0.25,
            modality="xray",
            step_size=(0.02,) * len(sites),
            manifest=manifest,
            kind=kind,
        )
    )
