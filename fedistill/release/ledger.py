"""What a site's ledger says of the past, in the few figures that may leave the site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedistill.errors import FedistillError
from fedistill.privacy.ledger import Ledger
from fedistill.release.claim import Claim

SLACK = 0.01  # of an epsilon, and the share of it, by which accountants may differ
LACKS = "What the set claims to have spent does not stand on the ledger"


def ledger_summary(path: Path, claim: Claim) -> dict[str, Any]:
    """Epsilon of everything that was ever spent on each of the data sets in the ledger at `path`.

    It is said at the delta of the claim; without one, at the largest that a spend was planned at. Names and fingerprints of the
    data, and the hashes of the chain that are made from them, stay at the site: whoever guesses the data could confirm the guess.
    Raises `FedistillError` where there is no ledger, or where it does not hold, and ("other-ledger") where none of the sites of a
    private set has the noise that it claims on it.
    """
    ledger = Ledger(path, create=False)
    entries = ledger.entries()
    by_data = {d: [e for e in entries if e.data == d] for d in dict.fromkeys(entry.data for entry in entries)}
    spends = [Counter((e.unit, m) for e in own for m in e.mechanisms) for own in by_data.values()]
    claimed = [Counter((site.unit, m) for m in site.mechanisms) for site in claim.sites]
    if claim.formal and not any(wanted <= there for wanted in claimed for there in spends):
        raise FedistillError("other-ledger", f"{LACKS} {path}: give the ledger of the site that made the set.")
    sums = []
    for data, own in by_data.items():
        total = ledger.spent(data, claim.delta or max(entry.delta for entry in own))
        sums.append(
            {
                "entries": len(own),
                "epsilon": total.epsilon,
                "delta": total.delta,
                "unit": ledger.unit_of(data),
                "accountant": total.accountant,
            }
        )
    told = "; ".join(f"data set {k}: epsilon {s['epsilon']:.2f} at delta {s['delta']:g}" for k, s in enumerate(sums, 1))
    return {
        "chain": f"{len(entries)} entries, none changed",
        "spent so far": told or "nothing",
        "data_sets": sums,
    }


def check_summary(summary: Mapping[str, Any], claim: Claim) -> None:
    """Raise `FedistillError` ("other-ledger") where less was spent, on any data, than each of the sites claims of the set alone."""
    sums = summary.get("data_sets")
    there = [s for s in sums if isinstance(s, Mapping)] if isinstance(sums, list) else []
    if claim.formal and not any(_covers(s, site.epsilon or 0.0, site.delta) for s in there for site in claim.sites):
        raise FedistillError("other-ledger", f"{LACKS} that is quoted: its data sets have less.")


def _covers(spent: Mapping[str, Any], epsilon: float, delta: float | None) -> bool:
    """At a larger delta the same work has a smaller epsilon, which shows nothing."""
    found, at = spent.get("epsilon"), spent.get("delta")
    if not isinstance(found, int | float) or not isinstance(at, int | float):
        return False
    return at > (delta or 0.0) or found >= epsilon - SLACK * (1 + epsilon)
