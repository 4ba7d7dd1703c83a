"""Which code a server may run at a site: that which is installed there anyway, or what a person approved by its hash.

    <work>/site-<name>/code/<id>/            app.fab, and request.json: when it came

A Flower app travels as a zip archive. What decides is the archive as it came, before any of it is unpacked.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import tomllib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.errors import FedistillError
from fedistill.files import read_json, write_bytes, write_json
from fedistill.simulation import app_folder
from fedistill.site.folder import site_folder
from fedistill.site.gate import DIGITS, MOST_WAITING, Decision, decided, now, read_log
from fedistill.site.policy import Policy

MARK = "app-"  # how the id of code begins
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
    return MARK + hashlib.sha256(archive).hexdigest()[:DIGITS]


def check_code(policy: Policy, archive: bytes) -> None:
    """Raise `FedistillError` ("code") on an app that must not run here; it is kept for a person to read."""
    folder = site_folder(policy.work, policy.name)
    name = identity_of(archive)
    other = differences(archive)
    decision = decided(folder, name)
    if decision is None and policy.code == "installed" and not other:
        return
    if decision is None:
        _keep(policy, name, archive)
        raise FedistillError("code", f"The code of this job, {name}, was not approved by a person at this site yet.")
    if not decision.approved:
        raise FedistillError("code", f"The code of this job, {name}, was rejected at this site.")


def files_of(archive: bytes) -> dict[str, bytes]:
    """Path -> content, in memory. Raises `FedistillError` ("bad-code") on what is no archive, or a trap."""
    try:
        if len(archive) > LARGEST:
            raise ValueError
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            entries = opened.infolist()
            plain = all(e.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for e in entries)
            once = len({e.filename for e in entries}) == len(entries)
            if not plain or not once or sum(e.file_size for e in entries) > UNPACKED:
                raise ValueError
            return {e.filename: opened.read(e) for e in entries}
    except (ValueError, OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise FedistillError("bad-code", "The code of this job is no archive that can be read.") from None


def differences(archive: bytes) -> list[str]:
    """Paths whose content is not as in this installation: code that was changed, added or left out, and what is started."""
    theirs, ours = files_of(archive), _installed()
    started = _started(theirs.pop(_PROJECT, b""))
    for name in _NO_CODE:
        theirs.pop(name, None)
    other = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if started is None or started != _started((app_folder() / _PROJECT).read_bytes()):
        other.append(_PROJECT)
    return sorted(other)


def changes(archive: bytes) -> str:
    """What differs from this installation, as `diff -u` tells it."""
    theirs, ours = files_of(archive), _installed() | {_PROJECT: (app_folder() / _PROJECT).read_bytes()}
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
        for file in (folder / "code").glob(f"{MARK}*/request.json")
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
    root = app_folder()
    files = (file for part in _PARTS for file in (root / part).rglob("*.py"))
    found = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if name not in _STAYS}


def _started(project: bytes) -> Any:
    """What Flower starts of an app, by its project file; None where that says nothing."""
    try:
        return tomllib.loads(project.decode())["tool"]["flwr"]["app"]["components"]
    except (ValueError, KeyError, TypeError):
        return None
