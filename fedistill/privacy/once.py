"""One payment, one use: which noisy results of a plan may have been seen, so that none is drawn twice for what was paid once.

The file of a plan holds a nonce, which is part of the plan's key on the ledger, and the names of the results that were used.
A result is named there, durably, once it is whole and before anything that depends on it leaves this module's callers. So one
that is missing

- and not named was seen by nobody: it is drawn again, and costs nothing more (a process was killed);
- and named may have been seen: the plan goes, with all that was drawn under it, and the next one has another nonce, which is
  another spend.

Who deletes the file of the plan as well takes the nonce with it, and pays, too. What is not noticed is an older copy of the
whole folder that is put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedistill.files import read_json, sync_folder, write_json


def begin(plan: Path, content: Mapping[str, Any]) -> None:
    """A file of a plan with this content, a nonce of its own, and no result that was used."""
    write_json(plan, {**content, "nonce": token_hex(8), "used": []})
    sync_folder(plan.parent)


def nonce_of(plan: Path) -> str:
    """Empty where there is no such plan."""
    return str(read_json(plan)["nonce"]) if plan.exists() else ""


def may_have_been_used(plan: Path, result: Path) -> bool:
    """Of a plan that a fedistill wrote which took no notes: yes."""
    if not plan.exists():
        return False
    used = read_json(plan).get("used")
    return used is None or result.name in used


def use(plan: Path, *results: Path) -> None:
    """Note durably that these results, which are whole, are from now on used. Where the plan is gone, the next one is paid for."""
    if not plan.exists():
        return
    stored = read_json(plan)
    used = sorted({*(stored.get("used") or ()), *(result.name for result in results)})
    if used != stored.get("used"):
        write_json(plan, stored | {"used": used})
        sync_folder(plan.parent)  # with which the results are sure to be there, too


def drop(plan: Path, results: Iterable[Path]) -> None:
    """Remove a plan and all that was drawn under it; the plan last, since what is left without it would pass for progress."""
    for result in results:
        result.unlink(missing_ok=True)
    sync_folder(plan.parent)
    plan.unlink(missing_ok=True)
