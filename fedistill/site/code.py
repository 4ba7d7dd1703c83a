"""Which code a server may run at a site: that which is installed there anyway, or what a person approved by its hash.

    <work>/site-<name>/code/<id>/            app.fab, and request.json: when it came

A Flower app travels as a zip archive. What decides is the archive as it came, before any of it is unpacked; and where it says what
is installed anyway, the installed files run, and the archive is thrown away. Flower's own unpacking is not used: it takes a folder
of an earlier app for this one where eight digits agree, and its list of hashes can name any file of the machine.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import shutil
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedistill.errors import FedistillError
from fedistill.files import plain_members, read_json, write_bytes, write_json
from fedistill.simulation import app_folder
from fedistill.site.folder import site_folder
from fedistill.site.gate import CODE_MARK, DIGITS, MOST_WAITING, Decision, decided, now, read_log
from fedistill.site.policy import Policy

LARGEST = 10_485_760  # bytes of an archive: Flower's own limit
UNPACKED = 4 * LARGEST
_PARTS = ("client", "server")
_STAYS = ("client/guard.py",)  # the site's own, and never sent
_NO_CODE = ("README.md", "LICENSE", ".info/CONTENT")
_PROJECT = "pyproject.toml"


@dataclass(frozen=True)
class Code:
    """An app that a server sent: its id, its folder, when it came first, and what was decided."""

    id: str
    folder: Path
    made: str
    decision: Decision | None

    def load(self) -> bytes:
        """The archive. Raises `FedistillError` where it is not what the id stands for."""
        found = (self.folder / "app.fab").read_bytes()
        if identity_of(found) != self.id:
            raise FedistillError("bad-code", f"{self.folder / 'app.fab'} was changed after it came.")
        return found


def identity_of(archive: bytes) -> str:
    """A hash over all of it."""
    return CODE_MARK + hashlib.sha256(archive).hexdigest()[:DIGITS]


def check_code(policy: Policy, archive: bytes) -> Path:
    """The folder to load an app from that may run here: that of this installation, or a fresh copy of what was approved.

    Raises `FedistillError`: "code" on an app that must not run; it is kept for a person to read. "bad-code" on what is no archive.
    """
    folder = site_folder(policy.work, policy.name)
    name = identity_of(archive)
    other = differences(archive)
    decision = decided(folder, name)
    allowed = decision.approved if decision is not None else policy.code == "installed" and not other
    if allowed:
        return _unpacked(folder / "code" / name / "app", archive) if other else app_folder()
    if decision is not None:
        raise FedistillError("code", f"The code of this job, {name}, was rejected at this site.")
    _keep(policy, name, archive)
    raise FedistillError("code", f"The code of this job, {name}, was not approved by a person at this site yet.")


def files_of(archive: bytes) -> dict[str, bytes]:
    """Path -> content, in memory. Raises `FedistillError` ("bad-code") on what is no archive, or a trap."""
    try:
        if len(archive) > LARGEST:
            raise ValueError
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            entries = plain_members(opened)
            names = [PurePosixPath(e.filename) for e in entries]
            inside = all(not name.is_absolute() and ".." not in name.parts and name.parts for name in names)
            once = len({str(name).casefold() for name in names}) == len(entries)
            if not (inside and once) or sum(e.file_size for e in entries) > UNPACKED:
                raise ValueError
            return {str(name): opened.read(e) for name, e in zip(names, entries, strict=True)}
    except Exception:  # archives are refused with a dozen kinds of errors, some of them undocumented
        raise FedistillError("bad-code", "The code of this job is no archive that can be read.") from None


def differences(archive: bytes) -> list[str]:
    """Paths whose content is not as in this installation: code that was changed, added or left out, and the project file, which
    says what is started. Texts that nothing reads may differ."""
    theirs, ours = _told(files_of(archive)), _told(_installed())
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def changes(archive: bytes) -> str:
    """What differs from this installation, as `diff -u` tells it."""
    theirs, ours = _told(files_of(archive)), _told(_installed())
    lines: list[str] = []
    for name in differences(archive):
        old, new = (
            side.get(name, b"").decode(errors="backslashreplace").splitlines(keepends=True) for side in (ours, theirs)
        )
        lines += difflib.unified_diff(old, new, f"installed/{name}", f"job/{name}")
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def codes(policy: Policy) -> list[Code]:
    """Every app that came and was not simply the installed one, the oldest first."""
    folder = site_folder(policy.work, policy.name)
    last = {decision.id: decision for decision in read_log(folder)}
    found = [
        Code(file.parent.name, file.parent, read_json(file)["made"], last.get(file.parent.name))
        for file in (folder / "code").glob(f"{CODE_MARK}*/request.json")
    ]
    return sorted(found, key=lambda code: (code.made, code.id))


def code_of(policy: Policy, name: str) -> Code:
    """The app whose id begins with `name`. Raises `FedistillError` where there is none, or more than one."""
    found = [code for code in codes(policy) if code.id.startswith(name)]
    if len(found) != 1 or not name:
        what = "No code" if not found else "More than one job's code"
        raise FedistillError("no-request", f"{what} at this site has an id that begins with '{name}'.")
    return found[0]


def _keep(policy: Policy, name: str, archive: bytes) -> None:
    place = site_folder(policy.work, policy.name) / "code" / name
    if (place / "request.json").exists():
        return
    if sum(code.decision is None for code in codes(policy)) >= MOST_WAITING:
        raise FedistillError(
            "code", f"The code of {MOST_WAITING} jobs waits for a decision at this site: no more until then."
        )
    write_bytes(place / "app.fab", archive)
    write_json(place / "request.json", {"made": now()})


def _installed() -> dict[str, bytes]:
    """The app of this installation, as Flower would pack it."""
    root = app_folder()
    files = [file for part in _PARTS for file in (root / part).rglob("*.py")] + [root / _PROJECT]
    found = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if name not in _STAYS}


def _told(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What is compared: all but texts, and of the project file what it says, in one spelling, since Flower writes it anew."""
    told = {name: content for name, content in files.items() if name not in _NO_CODE}
    try:
        project = tomllib.loads(told[_PROJECT].decode())
        project.get("tool", {}).get("flwr", {}).pop("federations", None)
        told[_PROJECT] = json.dumps(project, indent=1, sort_keys=True, default=str).encode()
    except (ValueError, KeyError, AttributeError):
        pass  # then it differs
    return told


def _unpacked(folder: Path, archive: bytes) -> Path:
    """The files of an approved archive in a folder that holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files_of(archive).items():
        write_bytes(folder / name, content)
    return folder
