"""From a set to a release: whole, checked by the same checks that its readers run, or not at all."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedistill
from fedistill.errors import FedistillError
from fedistill.files import write_bytes
from fedistill.release.arrays import arrays_of, npz_bytes
from fedistill.release.audit import check_audit
from fedistill.release.card import readme
from fedistill.release.claim import Claim, check_conditions, read_claim
from fedistill.release.croissant import croissant
from fedistill.release.document import NAME, Card, document
from fedistill.release.ledger import check_summary
from fedistill.release.seal import PUBLIC_KEY, fingerprint, public_bytes, seal, sha256
from fedistill.release.text import check_words
from fedistill.release.verify import verify
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import captioned, sheet_of
from fedistill.synthetic.store import save_set

_SOFTWARE = ("torch", "numpy", "opacus", "dp-accounting", "safetensors", "cryptography")


def make_release(
    made: SyntheticSet,
    out: Path,
    card: Card,
    *,
    key: Ed25519PrivateKey | None = None,
    audit: Mapping[str, Any] | None = None,
    ledger: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the release to the new folder `out` and return what its `privacy.json` says.

    audit: as `release.audit.read_audit` returns it. ledger: a summary of the sites' books.
    Raises `FedistillError`: "exists", "bad-name", "real-images", "bad-privacy", "condition-failed", "audit-contradicts",
    "other-audit", "other-ledger", "conclusion", and "unsound" where the finished release does not pass its own verification.
    """
    if os.path.lexists(out):
        raise FedistillError("exists", f"{out} exists already: choose another folder, a release is never overwritten.")
    if not NAME.fullmatch(card.name):
        raise FedistillError(
            "bad-name", f"name='{card.name}' cannot name a file: use up to 64 letters, digits, - and _, a letter first."
        )
    claim = read_claim(made)
    check_conditions(claim)
    if audit is not None:
        check_audit(audit, claim)
    if ledger is not None:
        check_summary(ledger, claim)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        written = _write(made, claim, card, temporary, key, audit, ledger)
        check_words(temporary)
        checked = verify(temporary, None if key is None else key.public_key())
        if checked.problems:
            raise FedistillError("unsound", f"The set cannot be released: {' '.join(checked.problems)}")
        os.rename(temporary, out)
    except OSError as error:
        raise FedistillError(
            "not-writable", f"The release {out} cannot be written: {error.strerror or error}."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _write(
    made: SyntheticSet,
    claim: Claim,
    card: Card,
    folder: Path,
    key: Ed25519PrivateKey | None,
    audit: Mapping[str, Any] | None,
    ledger: Mapping[str, Any] | None,
) -> dict[str, Any]:
    save_set(made, folder)
    caption = [line for line in (claim.sentence, claim.banner, card.name) if line]
    captioned(sheet_of(made), caption).save(folder / "contact-sheet.png")
    write_bytes(folder / f"{card.name}.npz", npz_bytes(arrays_of(made)))
    if key is not None:
        write_bytes(folder / PUBLIC_KEY, public_bytes(key.public_key()))
    about = document(
        made,
        claim,
        card,
        audit=audit,
        ledger=ledger,
        files=files_of(folder),
        signature="unsigned" if key is None else f"Ed25519 over SHA256SUMS, key {fingerprint(key.public_key())}",
        versions=software(),
    )
    _write_json(folder / "privacy.json", about)
    write_bytes(folder / "README.md", readme(made, claim, card, about).encode())
    _write_json(folder / "croissant.json", croissant(made, claim, card, about, files_of(folder)))
    seal(folder, key)
    return about


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and checksum of every file of a folder."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir(), key=lambda p: p.name)
    }


def _write_json(path: Path, value: Any) -> None:
    """In the order of `value`: the guarantee stands first."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def software() -> dict[str, str]:
    """Versions of what a set depends on, here."""
    found = {"fedistill": fedistill.__version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
