"""`fedistill release make | show | verify | keygen`: a set as a folder that others can use and check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedistill.commands.shared import AsJson, screen

if TYPE_CHECKING:
    from fedistill.release.verify import Verified

app = typer.Typer(help="Publish a synthetic set, and check one.", no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="The release.")]


@app.command()
def make(
    made: Annotated[str, typer.Argument(metavar="SET", help="Folder of the synthetic set.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the release; it must not exist.")],
    name: Annotated[str, typer.Option(help="Name of the release, and of its .npz file.")],
    key: Annotated[str | None, typer.Option(help="Private key to sign with; `release keygen` makes one.")] = None,
    publisher: Annotated[str, typer.Option(help="Who answers for the release.")] = "",
    license: Annotated[str | None, typer.Option(help="License, best by its SPDX name; default: unspecified.")] = None,
    description: Annotated[str, typer.Option(help="What people should know first.")] = "",
    audit: Annotated[str | None, typer.Option(help="Result of an audit (JSON).")] = None,
    ledger: Annotated[str | None, typer.Option(help="The site's ledger, to say what was spent before.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a release: the set, a MedMNIST file, a card, the privacy statement, checksums and a signature."""
    from datetime import UTC, datetime

    from fedistill.release.audit import read_audit
    from fedistill.release.claim import read_claim
    from fedistill.release.document import UNSPECIFIED, Card
    from fedistill.release.ledger import ledger_summary
    from fedistill.release.make import make_release
    from fedistill.release.seal import load_private
    from fedistill.synthetic.store import load_set

    loaded = load_set(made)
    card = Card(
        name=name,
        date=datetime.now(UTC).date().isoformat(),
        publisher=publisher,
        license=license or UNSPECIFIED,
        description=description,
    )
    said = make_release(
        loaded,
        Path(out),
        card,
        key=None if key is None else load_private(Path(key)),
        audit=None if audit is None else read_audit(Path(audit)),
        ledger=None if ledger is None else ledger_summary(Path(ledger), read_claim(loaded)),
    )
    if as_json:
        print(json.dumps({"release": out} | said, indent=1))
        return
    for line in (said["guarantee"], f"{len(loaded)} synthetic images in {out}, {said['signature']}."):
        screen.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """One screen about a release: guarantee, unit, mechanisms, conditions, audit, signature, files."""
    from fedistill.release.claim import read_claim
    from fedistill.release.seal import broken_files, check_signature
    from fedistill.release.show import screen_of
    from fedistill.release.verify import check_is_release, read_document
    from fedistill.synthetic.store import load_set

    place = Path(folder)
    check_is_release(place)
    document, claim = read_document(place), read_claim(load_set(place))
    signature, wrong = check_signature(place, None)
    files = [path for path in place.iterdir() if path.is_file()]
    checks: dict[str, Any] = {
        "signature": signature,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "problems": broken_files(place) + wrong,
    }
    if as_json:
        print(json.dumps(document | {"checks": checks}, indent=1))
        return
    text = screen_of(document, claim, checks)
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


@app.command()
def verify(
    folder: Folder,
    public_key: Annotated[
        str | None, typer.Option(help="The publisher's public key, from another place than the release.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that can be checked about a release; exit code 1 where something is wrong."""
    from fedistill.release.seal import load_public
    from fedistill.release.verify import verify as check

    found = check(Path(folder), None if public_key is None else load_public(Path(public_key)))
    _tell(folder, found, as_json)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def keygen(
    path: Annotated[str, typer.Argument(metavar="FILE", help="Where the private key goes; FILE.pub is public.")],
    as_json: AsJson = False,
) -> None:
    """Make a key to sign releases with."""
    from fedistill.release.seal import fingerprint, load_public
    from fedistill.release.seal import keygen as generate

    public = generate(Path(path))
    name = fingerprint(load_public(public))
    if as_json:
        print(json.dumps({"private": path, "public": str(public), "fingerprint": name}, indent=1))
        return
    text = f"Keep {path} secret, and give {public} to everybody; its fingerprint is {name}."
    screen.print(text, soft_wrap=True, highlight=False, markup=False)


def _tell(folder: str, found: Verified, as_json: bool) -> None:
    if as_json:
        facts = {"release": folder, "sound": not found.problems, "signature": found.signature}
        print(json.dumps(facts | {"problems": found.problems, "notes": found.notes}, indent=1))
        return
    out = Console()
    head = f"{folder}: {len(found.problems)} wrong." if found.problems else f"{folder} is sound."
    for line in (head, found.guarantee, f"Signature: {found.signature}.", *found.problems, *found.notes):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
