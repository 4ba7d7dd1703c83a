"""`fedistill report`: the page of a finished run, or of a study, once more."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from fedistill.commands.shared import AsJson, say
from fedistill.errors import FedistillError


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or of a study.")],
    shown: Annotated[bool, typer.Option("--open", help="Then open the page in the web browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a finished run (report.html) or of a study (study.html) again, from what its folder holds."""
    page = write_page(Path(run).expanduser().resolve())
    if as_json:
        print(json.dumps({"page": str(page)}))
    else:
        say(f"Wrote {page}")
    if shown and not webbrowser.open(page.as_uri()):
        raise FedistillError("no-browser", f"There is no web browser to open here: open {page} in one.")


def write_page(folder: Path) -> Path:
    """Raises `FedistillError`: "missing-file", "not-finished", "no-run", and on files that are broken."""
    from fedistill.files import read_json

    if not folder.is_dir():
        raise FedistillError("missing-file", f"There is no folder {folder}.")
    if (folder / "study.json").exists():
        from fedistill.study.page import write_page as write_study

        return write_study(folder)
    if not (folder / "summary.json").exists():
        if (folder / "config.json").exists():
            raise FedistillError(
                "not-finished",
                f"The run in {folder} has not finished, so there is nothing to report: start it again to go on.",
            )
        raise FedistillError("no-run", f"{folder} is the folder of neither a run nor a study: name one that is.")
    from fedistill.report.summary import FORMAT, write_report

    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise FedistillError("no-run", f"{folder / 'summary.json'} is not of the format {FORMAT}.")
    return write_report(folder, summary)
