"""What a site's ledger says of the past, in the few figures that may leave the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedistill.privacy.ledger import Ledger


def ledger_summary(path: Path, delta: float | None) -> dict[str, Any]:
    """Epsilon of everything that was ever spent on each of the data sets in the ledger at `path`.

    delta: at which it is said; None: the largest that a spend was planned at. Names and fingerprints of the data, and the hashes of
    the chain that are made from them, stay at the site: whoever guesses the data could confirm the guess with them.
    Raises `FedistillError` where there is no ledger, or where it does not hold.
    """
    ledger = Ledger(path, create=False)
    entries = ledger.entries()
    sums = []
    for data in dict.fromkeys(entry.data for entry in entries):
        own = [entry for entry in entries if entry.data == data]
        total = ledger.spent(data, delta or max(entry.delta for entry in own))
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
