"""The result of an audit, checked before it is quoted: an audit file comes from outside like everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fedistill.errors import FedistillError
from fedistill.files import read_plain
from fedistill.privacy.accounting import PRECISION, upwards
from fedistill.release.claim import Claim, SiteClaim
from fedistill.wire import strict_json

LARGEST = 2**20  # bytes of an audit file
MOST_ATTACKS = 100
LONGEST_METHOD = 50  # characters
ROUNDING = 0.02  # of an epsilon that is asked for: the noise is calibrated so that no more is spent, and little less
KEPT = (  # besides the fields that are checked one by one; of no other field anything is quoted
    "delta",
    "canaries",
    "canary_source",
    "shadows",
    "bounds",
    "notes",
)


def read_audit(path: Path) -> dict[str, Any]:
    """The result in the file at `path`. Raises `FedistillError` ("bad-audit") where it is none."""
    try:
        if path.is_file() and path.stat().st_size > LARGEST:
            _refuse(str(path), f"it is longer than {LARGEST} bytes")
        found = strict_json(read_plain(path, LARGEST).decode())
    except OSError:
        raise FedistillError("no-audit", f"There is no audit result {path} that could be read.") from None
    except ValueError:
        _refuse(str(path), "it is not JSON")
    return checked_audit(found, str(path))


def checked_audit(found: Any, where: str) -> dict[str, Any]:
    """The part of an audit's result that a release quotes. Raises `FedistillError` ("bad-audit") on other types."""
    if not isinstance(found, Mapping):
        _refuse(where, "it is not a record")
    audit: dict[str, Any] = {}
    for key in ("epsilon_lower", "ceiling", "confidence"):
        value = found.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            _refuse(where, f"{key} is not a number of at least 0")
        audit[key] = value
    if not 0 < audit["confidence"] < 1:
        _refuse(where, "confidence is not between 0 and 1")
    claimed = found.get("claimed_epsilon")
    if claimed is not None and (isinstance(claimed, bool) or not isinstance(claimed, int | float) or claimed < 0):
        _refuse(where, "claimed_epsilon is neither a number nor null")
    audit["claimed_epsilon"] = claimed
    method = found.get("method")
    if not isinstance(method, str) or not 0 < len(method) <= LONGEST_METHOD:
        _refuse(where, "it names no method that was attacked")
    audit["method"] = method
    attacks = found.get("attacks", [])
    if not isinstance(attacks, list) or len(attacks) > MOST_ATTACKS:
        _refuse(where, f"attacks is not a list of at most {MOST_ATTACKS} entries")
    if not all(isinstance(a, Mapping) and isinstance(a.get("name"), str) for a in attacks):
        _refuse(where, "an attack has no name")
    audit["attacks"] = attacks
    for key in ("broken_arm", "copies"):
        if not isinstance(found.get(key, {}), Mapping):
            _refuse(where, f"{key} is not a record")
        audit[key] = found.get(key, {})
    power = found.get("power", False)
    if not isinstance(power, bool):
        _refuse(where, "power is neither true nor false")
    audit["power"] = power and audit["broken_arm"].get("caught") is True
    audit |= {key: found[key] for key in KEPT if key in found}
    return dict(_without_seeds(audit))


def check_audit(audit: Mapping[str, Any], claim: Claim) -> None:
    """Raise `FedistillError` where an attack showed more leakage than the claim allows ("audit-contradicts"), where
    real images are in the set ("copies"), and where something else was attacked than what made the set ("other-audit")."""
    if claim.epsilon is not None and audit["epsilon_lower"] > claim.epsilon:
        raise FedistillError(
            "audit-contradicts",
            f"The audit contradicts the claim: an attack shows epsilon of at least {audit['epsilon_lower']:g}, and "
            f"{upwards(claim.epsilon)} is claimed; find the leak before anything is released.",
        )
    if audit["copies"].get("exact"):  # no attack on members need notice a few copies among many images
        raise FedistillError(
            "copies",
            f"The audit found {audit['copies']['exact']} synthetic images that are real training images: no release.",
        )
    if not any(_fits(audit, site) for site in claim.sites):
        made = dict.fromkeys(_what(site.method or "an unknown method", site.epsilon) for site in claim.sites)
        raise FedistillError(
            "other-audit",
            f"The audit attacked {_what(audit['method'], audit['claimed_epsilon'])}, and the set was made by {' or '.join(made)}: "
            "give an audit of the same settings.",
        )


def audit_sentence(audit: Mapping[str, Any]) -> str:
    """What the audit found, with what it could have found at most."""
    found = (
        f"Attacks show epsilon of at least {audit['epsilon_lower']:.2f} ({audit['confidence']:.0%} confidence) of "
        f"{_what(audit['method'], audit['claimed_epsilon'])}; "
        f"this audit could not have shown more than {audit['ceiling']:.2f}."
    )
    if not audit["power"]:
        found += " A release that was broken on purpose was not caught, so the audit proves nothing."
    return found


def _fits(audit: Mapping[str, Any], site: SiteClaim) -> bool:
    """Whether the audit is of what a site claims to have done. Its epsilon is what was asked for, and the set's what was spent."""
    asked, spent = audit["claimed_epsilon"], site.epsilon
    if audit["method"] != site.method or asked is None or spent is None:
        return bool(audit["method"] == site.method and asked is spent)
    return bool(abs(asked - spent) <= max(PRECISION, ROUNDING * asked))


def _what(method: str, epsilon: float | None) -> str:
    return f"method={method} " + ("without privacy" if epsilon is None else f"with epsilon={epsilon:g}")


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_seeds(v) for k, v in value.items() if "seed" not in str(k).lower()}
    return [_without_seeds(v) for v in value] if isinstance(value, list) else value


def _refuse(where: str, why: str) -> NoReturn:
    raise FedistillError("bad-audit", f"The audit result in {where} cannot be used: {why}.")
