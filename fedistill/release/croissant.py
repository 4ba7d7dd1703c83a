"""`croissant.json`: the release in the vocabulary of MLCommons (Croissant 1.1 with RAI 1.0), which search engines read.

There is no word for differential privacy in it: the guarantee stands as text under `rai:personalSensitiveInformation`, and its
numbers under a name space of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedistill.release.card import citation
from fedistill.release.claim import Claim
from fedistill.release.document import INTENDED, PROHIBITED, WITHDRAWAL, Card
from fedistill.release.text import plain
from fedistill.synthetic.set import SyntheticSet

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "fedistill": "urn:fedistill:",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown",
    ".npz": "application/zip",
    ".pem": "application/x-pem-file",
    ".png": "image/png",
    ".safetensors": "application/octet-stream",
}


def croissant(
    made: SyntheticSet, claim: Claim, card: Card, document: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The JSON-LD. files: bytes and sha256 of every file that the release holds beside this one and its checksums."""
    what = plain(f"{claim.sentence} {claim.banner} {card.description}")
    described = f"{what} {len(made)} synthetic {made.modality} images distilled at {len(made.sites)} site(s)."
    numbers: dict[str, Any] = (
        {} if claim.epsilon is None else {"fedistill:epsilon": claim.epsilon, "fedistill:delta": claim.delta}
    )
    if claim.formal:
        numbers |= {"fedistill:unit": claim.unit, "fedistill:adjacency": " or ".join(claim.adjacencies)}
    who = {"@type": "Organization", "name": plain(card.publisher)} if card.publisher else None
    return {
        "@context": CONTEXT,
        "@type": "Dataset",
        "name": card.name,
        "description": described,
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "citeAs": citation(card),
        "datePublished": card.date,
        "license": card.license,
        "version": "1.0.0",
        "keywords": ["synthetic data", "medical images", "dataset distillation", "federated learning", made.modality],
        **({"creator": who, "publisher": who} if who else {}),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "contentUrl": name,
                "contentSize": f"{about['bytes']} B",
                "encodingFormat": _TYPES["." + name.rpartition(".")[2]],
                "sha256": about["sha256"],
            }
            for name, about in files.items()
        ],
        "recordSet": [_classes(made)],
        "rai:dataCollection": (
            "Distilled at each site from its own images; only the synthetic images, their labels and a step size left the site."
        ),
        "rai:dataCollectionType": ["Software Collection", "Other"],
        "rai:dataPreprocessingProtocol": [
            f"Images are normalised with public constants: mean {made.mean:g}, deviation {made.std:g} on a scale of 0 to 1."
        ],
        "rai:dataBiases": [
            "The images carry the imbalance, scanners and mistakes of the sites' own data; rare classes suffer first."
        ],
        "rai:dataLimitations": [PROHIBITED, "Not for diagnosis."],
        "rai:dataUseCases": [INTENDED],
        "rai:dataSocialImpact": "Sites that may not share images can share what a network would learn from them.",
        "rai:personalSensitiveInformation": [
            "Made from medical images of patients.",
            claim.sentence,
            *filter(None, [claim.banner]),
            str(document["meaning"]),
        ],
        "rai:dataReleaseMaintenancePlan": WITHDRAWAL,
        "fedistill:guarantee": claim.sentence,
        "fedistill:formal": claim.formal,
        **numbers,
    }


def _classes(made: SyntheticSet) -> dict[str, Any]:
    """The names of the classes, which the labels count from 0."""

    def field(name: str, kind: str) -> dict[str, Any]:
        return {"@type": "cr:Field", "@id": f"classes/{name}", "name": name, "dataType": kind}

    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "description": "The classes, or findings, in the order of the labels.",
        "key": {"@id": "classes/index"},
        "field": [field("index", "sc:Integer"), field("name", "sc:Text")],
        "data": [{"classes/index": k, "classes/name": name} for k, name in enumerate(made.class_names)],
    }
