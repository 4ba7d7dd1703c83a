"""All that there is to see of a set before it leaves, beside it in the outbox.

look/contact-sheet.png        as readers will see it; -slice-07 for each slice of volumes
look/stretched.png            each image over its own range: a sheet as readers see it hides what is darker than black
look/privacy.json             what it promises, and what it does not
audit/audit.json              what an attack found (`fedistill site audit`), where somebody asked for that
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedistill.files import write_json
from fedistill.release.audit import read_audit
from fedistill.release.claim import read_claim
from fedistill.release.document import Card, document
from fedistill.release.make import files_of, software
from fedistill.site.gate import Request
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import sheet_of


def lay_out(request: Request, made: SyntheticSet) -> Path:
    """Write what there is to see; its folder. made: of `request.load`."""
    folder = request.folder / "look"
    folder.mkdir(exist_ok=True)
    for name, shown in (("contact-sheet", made), ("stretched", stretched(made))):
        for what, part in slices(shown):
            sheet_of(part).save(folder / f"{name}{what}.png")
    card = Card(name=made.sites[0], date=request.made[:10])
    files = files_of(request.folder / "set")
    about = document(
        made,
        read_claim(made),
        card,
        audit=audit_of(request),
        ledger=None,
        files=files,
        signature="unsigned",
        versions=software(),
    )
    write_json(folder / "privacy.json", about)
    return folder


def audit_of(request: Request) -> dict[str, Any] | None:
    """What an attack on this set's job found; None where nobody asked."""
    file = request.folder / "audit" / "audit.json"
    return read_audit(file) if file.exists() else None


def stretched(made: SyntheticSet) -> SyntheticSet:
    """The same images, each from black to white."""
    low, high = made.images.flatten(1).aminmax(dim=1)
    shape = (-1, *[1] * (made.images.dim() - 1))
    images = (made.images - low.view(shape)) / (high - low).clamp_min(1e-12).view(shape)
    return replace(made, images=images, mean=0.0, std=1.0)


def slices(made: SyntheticSet) -> list[tuple[str, SyntheticSet]]:
    """A set as it is, and of volumes a set for each slice, with the end of its file's name."""
    if made.images.dim() == 4:
        return [("", made)]
    depth = made.images.shape[2]
    return [("", made)] + [(f"-slice-{k:02d}", replace(made, images=made.images[:, :, k])) for k in range(depth)]
