"""Where a site keeps its work, within a work folder that several sites of a simulation may share."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote


def site_folder(work: Path, site: str) -> Path:
    return work / f"site-{quote(site, safe='')}"


def make_site_folder(work: Path, site: str) -> Path:
    """That folder, for its owner's eyes alone where it is new: experts and sketches of private data lie in it."""
    folder = site_folder(work, site)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def sites_with_ledgers(work: Path) -> list[str]:
    """The sites that have spent something in `work`."""
    return sorted(unquote(file.parent.name.removeprefix("site-")) for file in work.glob("site-*/ledger.db"))


def ledger_file(work: Path, site: str) -> Path:
    """What was spent on the site's records, over all work."""
    return site_folder(work, site) / "ledger.db"
