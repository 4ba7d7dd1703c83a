"""`privacy.json`: what a data-protection officer has to know, in the order of NIST SP 800-226 (March 2025).

The guarantee comes first, then its unit and its size, what was and was not released, the conditions under which it holds, what
it does not cover, how it was attacked, and what the data are. Facts only: the law is for the reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedistill.release.arrays import clipped_share
from fedistill.release.claim import ADJACENCIES, UNITS, Claim, SiteClaim, certainty
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import encode

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # of a release: it becomes that of a file
FORMAT = "fedistill-release/1"
UNSPECIFIED = "unspecified: ask the publisher before any use"
NOT_RELEASED = (
    "real images and labels of patients",
    "networks, their checkpoints and gradients",
    "numbers of real images, in all and per class",
    "losses, accuracies and other figures of training",
    "seeds of noise and sampling",
)
NOT_COVERED = (
    "Facts about groups, such as how a disease looks: learning them is the purpose, and differential privacy does not stop it.",
    "A guess at a person's attribute from such facts, for people in the data and for people who are not.",
    "Settings that were chosen by looking at the private data, unless condition 6 says otherwise.",
    "Attacks on floating-point noise (Mironov, CCS 2012) and on side channels such as running time.",
    "The quality of the machine's random numbers, beyond condition 10.",
    "Whatever the sites publish besides this release: budgets add up.",
)
INTENDED = "Training and comparing image classifiers for research on the named classes."
PROHIBITED = "Diagnosis or any decision about a patient, and any attempt to find out who is behind the images."
WITHDRAWAL = "A release cannot be recalled: whoever holds a copy keeps it, also after a person has withdrawn consent."


@dataclass(frozen=True, kw_only=True)
class Card:
    """What people say of a release. date: of publication, YYYY-MM-DD."""

    name: str
    date: str
    publisher: str = ""
    license: str = UNSPECIFIED
    description: str = ""


def claimed(made: SyntheticSet, claim: Claim) -> dict[str, Any]:
    """The parts of the document that follow from the set alone, so that whoever holds the set can check them.

    Without a guarantee there is no epsilon for the whole, and none for a site that gives none.
    """
    size = {"epsilon": claim.epsilon, "delta": claim.delta} if claim.formal else {}
    return {
        "guarantee": " ".join(filter(None, (claim.sentence, claim.banner))),
        "format": FORMAT,
        "formal": claim.formal,
        **size,
        "meaning": _meaning(claim),
        "unit": _unit(claim),
        "accounting": [_accounting(site) for site in claim.sites],
        "conditions": [asdict(condition) for condition in claim.conditions()],
    }


def document(
    made: SyntheticSet,
    claim: Claim,
    card: Card,
    *,
    audit: Mapping[str, Any] | None,
    ledger: Mapping[str, Any] | None,
    files: Mapping[str, Mapping[str, Any]],
    signature: str,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The whole document. files: bytes and sha256 of the files that hold the set. signature: how it is signed."""
    beyond = list(NOT_COVERED)
    if audit is not None:
        beyond.append("The figures of the audit: they were computed from the private data and are quoted as they are.")
    return claimed(made, claim) | {
        "trust": (
            "Noise is added at the site, before anything leaves it. Whoever merges the sets, and every reader of this release, is "
            "assumed to be curious and to know everything else."
        ),
        "ledger": "not given" if ledger is None else dict(ledger),
        "released": _released(made),
        "not_released": list(NOT_RELEASED),
        "not_covered": beyond,
        "audit": "not audited" if audit is None else {k: v for k, v in audit.items() if k != "copies"},
        "copies": dict(audit["copies"]) if audit and audit["copies"] else "not computed",
        "utility": "not computed: `fedistill evaluate` measures it on data of your own",
        "data": _data(made, card),
        "versions": dict(versions),
        "sites": {name: _versions(made.manifest.get(name)) for name in made.sites},
        "files": {name: dict(about) for name, about in files.items()},
        "signature": signature,
    }


def _meaning(claim: Claim) -> str:
    if claim.epsilon is None:
        return "Nothing bounds what can be learned about one person; read the audit, if there is one."
    return (
        f"Someone who is 50 % certain that a given {claim.unit} was used becomes at most {certainty(claim.epsilon)} % certain by "
        f"reading this release, whatever else is known (up to delta)."
    )


def _unit(claim: Claim) -> dict[str, Any] | str:
    if not claim.formal:
        return "not applicable: there is no guarantee"
    overlap = (
        "One site: nothing is composed."
        if len(claim.sites) == 1
        else "Patients are taken to be at one site each, so the largest epsilon of the sites holds for each of them (parallel "
        "composition); for a patient who was at k sites the epsilons of these sites add up."
    )
    return {
        "protected": claim.unit,
        "meaning": UNITS[claim.unit],
        "adjacency": {name: ADJACENCIES[name] for name in claim.adjacencies},
        "overlap": overlap,
    }


def _accounting(site: SiteClaim) -> dict[str, Any]:
    if not site.formal:
        return {"site": site.site, "statement": site.statement}
    second: Any = "not computed"
    if site.second is not None:
        second = {"epsilon": site.second[0], "accountant": site.second[1]}
    return {
        "site": site.site,
        "epsilon": site.epsilon,
        "delta": site.delta,
        "unit": site.unit,
        "adjacency": site.adjacency,
        "accountant": site.accountant,
        "second": second,
        "mechanisms": [m.to_dict() for m in site.mechanisms],
        "public": list(site.public),
        "statement": site.statement,
    }


def _released(made: SyntheticSet) -> list[dict[str, Any]]:
    """What leaves, with the bytes it takes on the wire."""
    arrays, text = encode(made)
    soft = arrays["labels"].ndim == 2
    counts = (
        made.labels.round().sum(0)
        if made.kind == "multilabel"
        else made.hard_labels.bincount(minlength=len(made.class_names))
    )
    uneven = len({int(n) for n in counts}) > 1
    about = {"number": len(made), "of": "synthetic images", "bytes": arrays["pixels"].nbytes + arrays["range"].nbytes}
    labels = {
        "number": len(made),
        "of": "labels, " + ("soft: learned, or the experts' opinion" if soft else "one class per image"),
        "bytes": arrays["labels"].nbytes,
    }
    if uneven:
        labels["note"] = (
            "Classes have different numbers of synthetic images, which may follow those of the real images."
        )
    return [
        about,
        labels,
        {
            "number": len(made.sites),
            "of": "learned step sizes, and the site of each image",
            "bytes": arrays["site"].nbytes,
        },
        {"number": 1, "of": "manifest: methods, versions and privacy of the sites", "bytes": len(text.encode())},
    ]


def _data(made: SyntheticSet, card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "date": card.date,
        "publisher": card.publisher or "not stated",
        "license": card.license,
        "description": card.description or "not stated",
        "legal_basis": "to be stated by the publisher",
        "modality": made.modality,
        "task": made.kind,
        "classes": list(made.class_names),
        "sites": list(made.sites),
        "geometry": list(made.geometry),
        "preprocessing": {"mean": made.mean, "std": made.std, "source": "public constants of the modality"},
        "clipped_share": round(clipped_share(made), 6),
        "intended_use": INTENDED,
        "prohibited_use": PROHIBITED,
        "withdrawal": WITHDRAWAL,
    }


def _versions(about: Any) -> dict[str, Any]:
    """Method, start and software of a site, as far as its manifest says them."""
    about = about if isinstance(about, Mapping) else {}
    kept = {key: about[key] for key in ("method", "init", "iterations") if isinstance(about.get(key), str | int)}
    versions = about.get("versions")
    if isinstance(versions, Mapping):
        kept["versions"] = {k: v for k, v in versions.items() if isinstance(k, str) and isinstance(v, str)}
    return kept
