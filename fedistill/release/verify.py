"""Every way in which a release can be wrong that its files alone can show."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from fedistill.errors import FedistillError
from fedistill.files import plain_members, read_plain
from fedistill.privacy.accounting import HOPELESS, PRECISION, Accounted, agree, cross_check, epsilon_of
from fedistill.release.arrays import arrays_of
from fedistill.release.audit import check_audit, checked_audit
from fedistill.release.claim import NOTHING, Claim, SiteClaim, check_conditions, read_claim
from fedistill.release.document import NAME, claimed
from fedistill.release.ledger import check_summary
from fedistill.release.seal import SUMS, broken_files, check_signature, sha256
from fedistill.release.text import escaped
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set
from fedistill.wire import read_npy, strict_json

SLACK = 1e-3  # of an epsilon: accountants of different versions differ by less
HEADER = 1024  # bytes at most in front of an array in a .npz file
LARGEST = 2**24  # bytes of a text: README.md, privacy.json and croissant.json
MOST_DIFFERENT = 50  # mechanisms of one site: accountants take time and memory for each
_SHAPE: dict[str, type | tuple[type, ...]] = {
    "guarantee": str,
    "format": str,
    "formal": bool,
    "meaning": str,
    "unit": (str, dict),
    "accounting": list,
    "conditions": list,
    "ledger": (str, dict),
    "released": list,
    "not_released": list,
    "not_covered": list,
    "audit": (str, dict),
    "copies": (str, dict),
    "data": dict,
    "files": dict,
    "signature": str,
}


@dataclass(frozen=True)
class Verified:
    """problems: one sentence each, none where the release is sound. notes: what could not be checked. signature: what it shows.

    guarantee: what the set itself promises.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    signature: str
    guarantee: str


def verify(folder: Path, public_key: Ed25519PublicKey | None = None) -> Verified:
    """Check files, signature, set, privacy statement, accounts and audit of a release.

    public_key: the publisher's, if it is known from elsewhere; then a release without its signature is a problem.
    Raises `FedistillError` ("no-release") where `folder` is no release at all.
    """
    check_is_release(folder)
    problems = broken_files(folder)
    signature, wrong = check_signature(folder, public_key)
    problems += wrong
    notes = [] if signature != "unsigned" else ["The release is not signed: nothing shows who made it."]
    if signature.startswith("by the enclosed"):
        notes.append("The key lies in the release itself: compare it with the publisher's, or give --public-key.")
    document = _or_problem(lambda: read_document(folder), problems)
    made = _or_problem(lambda: load_set(folder), problems)
    claim = _or_problem(lambda: read_claim(made), problems) if made is not None else None
    if document is not None and made is not None and claim is not None:
        problems += _disagreements(folder, document, made, claim, signature)
    if claim is not None:
        for site in claim.sites:
            found, noted = check_accounts(site)
            problems += found
            notes += [note for note in noted if note not in notes]
        _or_problem(lambda: check_conditions(claim), problems)
    guarantee = f"{NOTHING}: the set cannot be read." if claim is None else f"{claim.sentence} {claim.banner}".strip()
    return Verified(tuple(problems), tuple(notes), signature, guarantee)


def check_is_release(folder: Path) -> None:
    if not folder.is_dir() or not any((folder / name).exists() for name in (SUMS, "privacy.json")):
        raise FedistillError("no-release", f"{folder} is no release: `fedistill release make` makes one from a set.")


def read_document(folder: Path) -> dict[str, Any]:
    """`privacy.json`, with the types that its readers rely on. Raises `FedistillError` ("bad-release")."""
    document = _json(folder / "privacy.json")
    for key, kind in _SHAPE.items():
        if not isinstance(document.get(key), kind):
            raise FedistillError("bad-release", f"privacy.json has no '{key}' of the right kind.")
    if not all(isinstance(document["data"].get(key), str) for key in ("name", "date", "publisher", "license")):
        raise FedistillError("bad-release", "privacy.json has no name, date, publisher and license of its data.")
    if not NAME.fullmatch(document["data"]["name"]):
        raise FedistillError("bad-release", "The name of the data in privacy.json cannot be that of a file.")
    fields = {"number": int, "of": str, "bytes": int}
    for entry in document["released"]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), t) for k, t in fields.items()):
            raise FedistillError("bad-release", "privacy.json does not say what was released, in numbers and bytes.")
    if not all(isinstance(line, str) for key in ("not_released", "not_covered") for line in document[key]):
        raise FedistillError("bad-release", "privacy.json does not say in sentences what it leaves out.")
    unit = document["unit"]
    if isinstance(unit, dict) and not all(isinstance(unit.get(k), str) for k in ("protected", "meaning", "overlap")):
        raise FedistillError("bad-release", "privacy.json does not say what its unit is.")
    if isinstance(document["audit"], dict):
        copies = document["copies"] if isinstance(document["copies"], dict) else {}
        document["audit"] = checked_audit({**document["audit"], "copies": copies}, "privacy.json")
    return document


def check_accounts(site: SiteClaim) -> tuple[list[str], list[str]]:
    """(what is wrong, what could not be checked) with the epsilon of a site: both accountants are asked again."""
    if site.epsilon is None or site.delta is None or not site.mechanisms:
        return [], []
    said = f"Site {site.site} claims epsilon {site.epsilon:g}"
    if len({(m.noise_multiplier, m.sample_rate) for m in site.mechanisms}) > MOST_DIFFERENT:
        return [f"{said}, of more than {MOST_DIFFERENT} different mechanisms: that is too many to check."], []
    try:
        first = epsilon_of(site.mechanisms, site.delta)
    except FedistillError:
        return [f"{said}, but its noise shows no finite epsilon."], []
    problems = []
    if site.epsilon < first.epsilon - SLACK:
        problems.append(f"{said}, but its mechanisms come to {first.epsilon:.4f} by {first.accountant}.")
    claim = Accounted(epsilon=site.epsilon, delta=site.delta, accountant=site.accountant)
    if site.second is not None:
        quoted = Accounted(epsilon=site.second[0], delta=site.delta, accountant=site.second[1])
        if not agree(claim, quoted):
            problems.append(f"{said}, and the second accountant that it quotes disagrees: {quoted.epsilon:g}.")
    try:
        second = cross_check(site.mechanisms, site.delta) if first.epsilon < HOPELESS else None
    except FedistillError as error:
        return [*problems, f"{said}. {error.sentence}"], []
    if second is None:
        return problems, ["The second accountant was not asked: it is not installed, or epsilon is hopelessly large."]
    if not agree(first, second) or second.epsilon > site.epsilon + SLACK:
        problems.append(f"{said}, but the second accountant finds {second.epsilon:.4f} ({second.accountant}).")
    if site.second is not None and abs(second.epsilon - site.second[0]) > PRECISION:
        problems.append(
            f"{said} and quotes {site.second[0]:g} of the second accountant, which finds {second.epsilon:.4f}."
        )
    return problems, []


def _disagreements(
    folder: Path, document: Mapping[str, Any], made: SyntheticSet, claim: Claim, signature: str
) -> list[str]:
    """Where the parts of a release tell different stories."""
    expected = claimed(made, claim)
    found = [
        f"privacy.json disagrees with the manifest of the set about '{key}'."
        for key, value in expected.items()
        if document.get(key) != value
    ]
    if not claim.formal and ({"epsilon", "delta"} & set(document)):
        found.append("privacy.json claims an epsilon, but the set has no guarantee.")
    if (document["signature"] == "unsigned") != (signature == "unsigned"):
        found.append("privacy.json and the files disagree about whether the release is signed.")
    if isinstance(document["audit"], dict):
        _or_problem(lambda: check_audit(document["audit"], claim), found)
    if isinstance(document["ledger"], dict):
        _or_problem(lambda: check_summary(document["ledger"], claim), found)
    described = _or_problem(lambda: _json(folder / "croissant.json"), found) or {}
    same = described.get("fedistill:guarantee") == claim.sentence
    if (
        not same
        or described.get("fedistill:epsilon") != claim.epsilon
        or described.get("fedistill:delta") != claim.delta
    ):
        found.append("croissant.json disagrees with the manifest of the set about the guarantee.")
    entries = described.get("distribution")
    held = {str(e.get("name")): e for e in entries if isinstance(e, dict)} if isinstance(entries, list) else {}
    for source, listed in (("privacy.json", document["files"]), ("croissant.json", held)):
        found += [f"{source} describes another {name}." for name in _others(folder, listed)]
    found += _card(folder, claim) + _arrays(folder / f"{document['data']['name']}.npz", made)
    return found


def _others(folder: Path, listed: Mapping[str, Any]) -> list[str]:
    """The files of the release whose checksum is not the one that `listed` gives for them."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if isinstance(about := listed.get(path.name), dict) and path.is_file() and about.get("sha256") != sha256(path)
    ]


def _card(folder: Path, claim: Claim) -> list[str]:
    try:
        text = read_plain(folder / "README.md", LARGEST).decode()
    except (OSError, UnicodeDecodeError):
        return ["README.md is missing or cannot be read."]
    lacking = [s for s in (claim.sentence, claim.banner) if s and escaped(s) not in text]
    return ["README.md does not state the guarantee of the set."] if lacking else []


def _arrays(path: Path, made: SyntheticSet) -> list[str]:
    """Whether the MedMNIST file holds the images of the set."""
    expected = arrays_of(made)
    most = sum(a.nbytes + HEADER for a in expected.values())
    try:
        with ZipFile(io.BytesIO(read_plain(path, 2 * most + LARGEST))) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > most:  # it is not read at all
                return [f"{path.name} holds more than the images and labels of the set."]
            held = {member.filename: archive.read(member) for member in plain_members(archive)}
        same = set(held) == {f"{name}.npy" for name in expected} and len(members) == len(expected)
        same = same and all(_is_array(held[f"{name}.npy"], array) for name, array in expected.items())
    except Exception:  # zipfile raises half a dozen kinds for a damaged archive
        return [f"{path.name} cannot be read."]
    return [] if same else [f"{path.name} does not hold the images and labels of the set."]


def _is_array(content: bytes, array: NDArray[Any]) -> bool:
    """Whether a `.npy` file holds this array."""
    try:
        return np.array_equal(read_npy(content, [array.dtype.str]), array)
    except FedistillError:
        return False


def _json(path: Path) -> dict[str, Any]:
    try:
        value = strict_json(read_plain(path, LARGEST).decode(), most=LARGEST)
    except (OSError, ValueError):
        raise FedistillError("bad-release", f"{path.name} is missing, or is not JSON.") from None
    if not isinstance(value, dict):
        raise FedistillError("bad-release", f"{path.name} is not a record.")
    return value


def _or_problem(ask: Callable[[], Any], problems: list[str]) -> Any:
    """What `ask` returns; None, and its sentence among `problems`, where it raises."""
    try:
        return ask()
    except FedistillError as error:
        problems.append(error.sentence)
        return None
