"""`README.md`: a data set card for people, with the header that Hugging Face reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedistill.release.claim import Claim
from fedistill.release.document import INTENDED, PROHIBITED, UNSPECIFIED, WITHDRAWAL, Card
from fedistill.release.seal import PUBLIC_KEY, SUMS
from fedistill.release.show import audit_line, condition_lines, mechanism_line
from fedistill.release.text import escaped, plain, quoted
from fedistill.synthetic.set import SyntheticSet

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LICENSES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "odbl")


def readme(made: SyntheticSet, claim: Claim, card: Card, document: dict[str, Any]) -> str:
    """The card as Markdown. document: of `privacy.json`."""
    sections = [
        _header(made, claim, card),
        f"# {escaped(card.name)}",
        "\n".join(
            f"> **{escaped(line)}**" + ("" if end else "\n>")
            for line, end in _last(filter(None, (claim.sentence, claim.banner)))
        ),
        escaped(document["meaning"]),
        *([escaped(card.description)] if card.description else []),
        "## What it is\n\n" + _what(made, card),
        "## How to load it\n\n" + _load(made, card, document["data"]["clipped_share"]),
        "## How it was made\n\n" + _made(made, document),
        f"## Intended use\n\n{INTENDED}",
        f"## Out of scope\n\n{PROHIBITED} Not for diagnosis: the images are training aids, and need not look like patients.",
        "## Limits\n\n" + _limits(made, document),
        "## Images per class\n\n" + _counts(made),
        "## Privacy\n\n" + _privacy(claim, document),
        f"## Withdrawal\n\n{WITHDRAWAL}",
        "## Is it genuine?\n\n" + _genuine(document),
        "## Sources\n\n" + _sources(made),
    ]
    return "\n\n".join(sections) + "\n"


def citation(card: Card) -> str:
    who = f"{plain(card.publisher)}. " if card.publisher else ""
    return f"{who}{card.name}: a distilled synthetic data set made with fedistill. {card.date[:4]}."


def _header(made: SyntheticSet, claim: Claim, card: Card) -> str:
    known = card.license.lower() if card.license.lower() in _LICENSES else ""
    license = known or ("unknown" if card.license == UNSPECIFIED else "other")
    size = next((word for most, word in _SIZES if len(made) < most), "1M<n<10M")
    tags = ["medical", "synthetic", "dataset-distillation", "federated-learning", made.modality, "fedistill"]
    if claim.formal:
        tags.append("differential-privacy")
    lines = [
        "---",
        f"license: {license}",
        *([f"license_name: {quoted(card.license)}"] if license == "other" else []),
        "task_categories:",
        "- image-classification",
        "tags:",
        *(f"- {quoted(tag)}" for tag in tags),
        "size_categories:",
        f"- {size}",
        f"pretty_name: {quoted(card.name)}",
        "---",
    ]
    return "\n".join(lines)


def _what(made: SyntheticSet, card: Card) -> str:
    channels, *axes = made.geometry
    what = "volumes" if len(axes) == 3 else "images"
    kept = f" (kept as {'x'.join(str(side // made.scale) for side in axes)} and enlarged)" if made.scale > 1 else ""
    return (
        f"{len(made)} synthetic {what} of {'x'.join(map(str, axes))} pixels{kept} with {channels} channel{'s' * (channels > 1)} "
        f"(modality {escaped(made.modality)}), distilled at {_count(len(made.sites), 'site')}: {_words(made.sites)}. A network "
        f"that is trained on them is meant to behave like one that was trained on the sites' own images. The task is {made.kind} "
        f"with {len(made.class_names)} classes: {_words(made.class_names)}.\n\n"
        f"License: {escaped(card.license)}. Publisher: {escaped(card.publisher or 'not stated')}. Date: {card.date}."
    )


def _load(made: SyntheticSet, card: Card, clipped: float) -> str:
    volume, grey = len(made.geometry) == 4, made.geometry[0] == 1
    flag, name = ("pneumoniamnist", "PneumoniaMNIST") if grey else ("pathmnist", "PathMNIST")
    if made.kind == "multilabel":
        flag, name = "chestmnist", "ChestMNIST"
    if volume:
        flag, name = "organmnist3d", "OrganMNIST3D"
    rounding = (
        "a finding is 1 where its probability is at least one half"
        if made.kind == "multilabel"
        else "a label is the most likely class"
    )
    scale = ", and the `scale` by which `fedistill.models.enlarge` enlarges them" if made.scale > 1 else ""
    return f"""With fedistill, complete and with soft labels, as a torch data set:

```python
import fedistill, torch
made = fedistill.load_set("{card.name}")  # this folder
loader = torch.utils.data.DataLoader(made, batch_size=32, shuffle=True)  # images, distributions over the classes
```

As a MedMNIST file, in 8 bits (`{card.name}.npz`; nothing in it is pickled):

```python
import numpy as np
file = np.load("{card.name}.npz")
images, labels = file["train_images"], file["train_labels"]
```

or with `fedistill simulate --data {card.name}.npz` (which cuts images to test with out of them, and so needs several per class), or
with the classes of `medmnist`, which know files by the names of their own sets: copy the file to a folder under the name of one of
the same shape, and correct the number of images that is known for it:

```python
from medmnist import INFO, {name}
INFO["{flag}"]["n_samples"]["train"] = {len(made)}
data = {name}(split="train", root="folder with {flag}.npz")
```

The file holds a train split alone; val and test are empty, since a model must be tested on real images. Pixels are mapped back to
0..255 by the public normalisation (mean {made.mean:g}, deviation {made.std:g}) and clipped: {100 * clipped:.2f} % of the values
were outside. Labels are rounded: {rounding}; the soft ones are in the set itself. Without fedistill, `set.safetensors` holds
`pixels` (8 bits), the `range` of each image that they span, `labels` and `site`; `manifest.json` holds the constants{scale}."""


def _made(made: SyntheticSet, document: dict[str, Any]) -> str:
    lines = ["| site | images | method | start | iterations | versions |", "|---|---|---|---|---|---|"]
    for k, site in enumerate(made.sites):
        about = document["sites"][site]
        versions = ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
        cells = (about.get("method", "-"), about.get("init", "-"), about.get("iterations", "-"), versions or "-")
        images = int((made.site == k).sum())
        lines.append(f"| {escaped(site)} | {images} | " + " | ".join(escaped(str(c)) for c in cells) + " |")
    return "\n".join(lines)


def _limits(made: SyntheticSet, document: dict[str, Any]) -> str:
    lines = [
        "The images carry what the sites' own data carry: their scanners, their patients, their mistakes and their imbalance.",
        "Rare classes suffer first, all the more under differential privacy: look at every class of a model by itself.",
        "Few images train a network quickly, but not as well as the real ones; accuracy depends on the network that is trained.",
        "Utility was not measured for this card.",
    ]
    lines += [entry["note"] for entry in document["released"] if "note" in entry]
    return "\n".join(f"- {line}" for line in lines)


def _counts(made: SyntheticSet) -> str:
    lines = ["| class | images |", "|---|---|"]
    if made.kind == "multilabel":
        counts = (made.labels >= 0.5).sum(0).tolist()
        names = [*made.class_names, "(no finding)"]
        counts.append(int((made.labels < 0.5).all(1).sum()))
    else:
        names, counts = list(made.class_names), made.hard_labels.bincount(minlength=len(made.class_names)).tolist()
    return "\n".join(lines + [f"| {escaped(n)} | {c} |" for n, c in zip(names, counts, strict=True)])


def _privacy(claim: Claim, document: dict[str, Any]) -> str:
    lines = [escaped(document["guarantee"])]
    if claim.formal:
        unit = document["unit"]
        lines.append(f"Protected: {escaped(unit['meaning'])}. {escaped(unit['overlap'])}")
        lines.append("\n".join(f"- {escaped(s.site)}: {escaped(mechanism_line(s))}" for s in claim.sites))
        lines.append(
            "Conditions:\n\n" + "\n".join(f"- {escaped(line)}" for line in condition_lines(claim.conditions()))
        )
    lines.append("Audit: " + escaped(audit_line(document["audit"])))
    lines.append("Not covered:\n\n" + "\n".join(f"- {escaped(line)}" for line in document["not_covered"]))
    lines.append("Not released:\n\n" + "\n".join(f"- {escaped(line)}" for line in document["not_released"]))
    return "\n\n".join(lines) + "\n\n`privacy.json` says all of this for machines."


def _genuine(document: dict[str, Any]) -> str:
    if document["signature"] == "unsigned":
        signed = "This release is **not signed**: the checksums show accidents, not forgery."
    else:
        signed = (
            f"This release is signed ({escaped(document['signature'])}). `{PUBLIC_KEY}` shows which key it was; ask the "
            "publisher, by another way, whether it is theirs."
        )
    return f"`fedistill release verify FOLDER` checks everything; `sha256sum -c {SUMS}` checks the files alone.\n\n{signed}"


def _sources(made: SyntheticSet) -> str:
    from fedistill.methods.registry import METHODS

    used = {about.get("method") for about in made.manifest.values() if isinstance(about, dict)}
    lines = [f"- {name}: {method.source}" for name, method in METHODS.items() if name in used]
    lines.append("- The layout of the .npz file: Yang et al., MedMNIST v2, Scientific Data 10:41, 2023")
    lines.append("- Conditions of the guarantee: post-processing of DP-SGD (Abadi et al., CCS 2016, arXiv 1607.00133)")
    lines.append("- The form of the privacy statement: NIST SP 800-226, March 2025")
    return "\n".join(lines)


def _words(names: Iterable[str]) -> str:
    return ", ".join(map(escaped, names))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def _last(lines: Iterable[str]) -> list[tuple[str, bool]]:
    """Each line, and whether it is the last."""
    kept = list(lines)
    return [(line, i == len(kept) - 1) for i, line in enumerate(kept)]
