"""`fedistill ledger show | verify`: what was spent on a site's private data, and whether the record of it holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedistill.commands.shared import AsJson, screen
from fedistill.errors import FedistillError

app = typer.Typer(help="What was spent on a site's private data.", no_args_is_help=True, rich_markup_mode=None)

Where = Annotated[str, typer.Argument(metavar="PATH", help="The site's ledger.")]


@app.command()
def show(path: Where, as_json: AsJson = False) -> None:
    """List what was spent, with the epsilon that it had come to."""
    from fedistill.privacy.accounting import in_words
    from fedistill.privacy.ledger import Ledger, so_far, weakest

    entries = Ledger(Path(path), create=False).entries()
    sums = so_far(entries)
    if as_json:
        rows = [e.to_dict() | {"epsilon_so_far": total.epsilon} for e, total in zip(entries, sums, strict=True)]
        last = {entry.data: total for entry, total in zip(entries, sums, strict=True)}
        spent = {
            data: asdict(total) | {"unit": weakest(e.unit for e in entries if e.data == data)}
            for data, total in last.items()
        }
        print(json.dumps({"entries": rows, "spent": spent}, indent=1))
        return
    table = Table("time (UTC)", "data", "what", "unit", "mechanisms", "epsilon so far", "delta", box=None)
    for entry, total in zip(entries, sums, strict=True):
        time, words = entry.time[:16].replace("T", " "), "\n".join(in_words(m) for m in entry.mechanisms)
        table.add_row(time, entry.data, entry.what, entry.unit, words, f"{total.epsilon:.3f}", f"{entry.delta:g}")
    Console(markup=False, highlight=False).print(table)


@app.command()
def verify(path: Where, as_json: AsJson = False) -> None:
    """Check that no entry was changed, removed, put in or moved; exit code 1 where one was."""
    from fedistill.privacy.ledger import Ledger

    try:
        head = Ledger(Path(path), create=False).verify()
    except FedistillError as error:
        if error.code != "broken-ledger":
            raise
        if as_json:
            print(json.dumps({"holds": False, "why": error.sentence}, indent=1))
        else:
            screen.print(error.sentence, style="red", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"holds": True, **asdict(head)}, indent=1))
    else:
        print(f"{path} holds: {head.count} entries, head {head.hash}.")
