"""Where a site keeps its work, within a work folder that several sites of a simulation may share."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

from fedistill.errors import FedistillError


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


def check_account(work: Path, site: str) -> None:
    """Raise `FedistillError` ("not-allowed") where another account owns the site's folder. Nothing else stops root, and what root
    wrote there the site's own account could not read any more."""
    folder = site_folder(work, site)
    if not hasattr(os, "geteuid") or not folder.exists() or folder.stat().st_uid == os.geteuid():
        return
    owner = account_name(folder.stat().st_uid)
    raise FedistillError(
        "not-allowed",
        f"{folder} belongs to the account {owner}, and this is {account_name(os.geteuid())}: run the command as that account, "
        f"with `sudo -u {owner}` before it.",
    )


def account_name(number: int) -> str:
    """By the account's number, and not by what the environment says of it."""
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):  # Windows; an account of another machine, or of a container
        return f"#{number}"
