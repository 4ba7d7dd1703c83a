"""Where a site keeps its work, within a work folder that several sites of a simulation may share."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote


def site_folder(work: Path, site: str) -> Path:
    return work / f"site-{quote(site, safe='')}"


def sites_with_ledgers(work: Path) -> list[str]:
    """The sites that have spent something in `work`."""
    return sorted(unquote(file.parent.name.removeprefix("site-")) for file in work.glob("site-*/ledger.db"))


def ledger_file(work: Path, site: str) -> Path:
    """What was spent on the site's records, over all work."""
    return site_folder(work, site) / "ledger.db"
