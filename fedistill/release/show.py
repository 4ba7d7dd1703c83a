"""One screen about a release, for a data-protection officer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedistill.privacy.accounting import upwards
from fedistill.release.audit import audit_sentence
from fedistill.release.claim import STATUSES, Claim, Condition, SiteClaim
from fedistill.release.text import plain


def mechanism_line(site: SiteClaim) -> str:
    """What a site's noise was, in words."""
    if not site.formal or site.epsilon is None or site.delta is None:
        return site.statement
    parts = [
        f"{m.name}: {m.steps} noisy sums; each record takes part in a sum with probability {m.sample_rate:g}, is cut to norm "
        f"{m.clip_norm:g} and hidden under Gaussian noise of {m.noise_multiplier:g} times that norm"
        for m in site.mechanisms
    ]
    second = "no second accountant" if site.second is None else f"{site.second[0]:.2f} by {site.second[1]}"
    parts.append(
        f"together epsilon {upwards(site.epsilon)} at delta {site.delta:g} by {site.accountant}, {second}; public: "
        + (", ".join(site.public) or "nothing else")
    )
    return "; ".join(parts) + "."


def condition_lines(conditions: Sequence[Condition]) -> list[str]:
    """A line per condition."""
    return [f"{c.number} {c.status}: {c.name}" + (f". {c.how}" if c.how else "") for c in conditions]


def audit_line(audit: Mapping[str, Any] | str) -> str:
    return f"{audit}." if isinstance(audit, str) else audit_sentence(audit)


def screen_of(document: Mapping[str, Any], claim: Claim, checks: Mapping[str, Any]) -> str:
    """The screen. document: of `privacy.json`; claim: of the set itself; checks: of the files and the signature."""
    data, unit, copies = document["data"], document["unit"], document["copies"]
    rows = [("Name", f"{data['name']}, {data['date']}, publisher {data['publisher']}"), ("License", data["license"])]
    if isinstance(unit, Mapping):
        rows += [("Unit", f"{unit['protected']}: {unit['meaning']}"), ("", unit["overlap"])]
    else:
        rows.append(("Unit", unit))
    rows += [("Site", f"{site.site}: {mechanism_line(site)}") for site in claim.sites]
    for status in reversed(STATUSES):
        held = "; ".join(f"{c.number} {c.name}" for c in claim.conditions() if c.status == status)
        if held and claim.formal:
            rows.append(("Conditions", f"{status}: {held}"))
    if not claim.formal:
        rows.append(("Conditions", "not applicable: there is no guarantee that could depend on them"))
    rows += [
        ("Audit", audit_line(document["audit"])),
        ("Copies", copies if isinstance(copies, str) else _flat(copies)),
        ("Ledger", document["ledger"] if isinstance(document["ledger"], str) else _flat(document["ledger"])),
        ("Released", "; ".join(f"{e['number']} {e['of']} ({e['bytes']} bytes)" for e in document["released"])),
        ("Not", "; ".join(document["not_released"])),
        ("Beyond", " ".join(document["not_covered"])),
        ("Signature", checks["signature"]),
        (
            "Files",
            f"{checks['files']} files, {checks['bytes']} bytes; " + (" ".join(checks["problems"]) or "unchanged"),
        ),
    ]
    head = [plain(f"{claim.sentence} {claim.banner}"), plain(document["meaning"]), ""]
    return "\n".join(head + [f"{title:<12}{plain(text)}" for title, text in rows])


def _flat(record: Mapping[str, Any]) -> str:
    told = [f"{key} {value}" for key, value in record.items() if isinstance(value, str | int | float)]
    return ", ".join(told) or "see privacy.json"
