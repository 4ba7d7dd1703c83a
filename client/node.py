"""What a site's own configuration says (`flower-supernode --node-config`), which no server can change.

site, data, work-dir                what the site is called, where its images are, and where it works (an absolute path)
lifetime-epsilon, lifetime-delta    the most that may ever be spent on its records, over all jobs
max-epsilon                         the most that one job may ask for
require-privacy = "dp"              jobs without differential privacy are refused; so do they where anything above is set
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.config import Config
from fedistill.errors import FedistillError, unknown
from fedistill.privacy.ledger import Cap, cap_of

NEEDED = ("site", "data", "work-dir")
KEYS = (*NEEDED, "lifetime-epsilon", "lifetime-delta", "max-epsilon", "require-privacy")


@dataclass(frozen=True)
class Rules:
    """What a site allows. cap: over its lifetime. most: epsilon of one job. private: whether a job has to be private."""

    cap: Cap | None = None
    most: float = math.inf
    private: bool = False

    def check(self, config: Config) -> None:
        """Raise `FedistillError` ("policy") on a job that the site does not take part in."""
        if self.private and config.privacy != "dp":
            raise FedistillError("policy", "This site takes part with privacy=dp only.")
        for name in ("epsilon", "eval_epsilon"):
            if getattr(config, name) > self.most:
                raise FedistillError(
                    "policy",
                    f"{name}={getattr(config, name):g} is more than this site gives to one job: {self.most:g}.",
                )


def rules_of(node: Mapping[str, Any]) -> Rules:
    """Raises `FedistillError` ("node-config") on keys that are missing, or that mean nothing."""
    if missing := [k for k in NEEDED if not node.get(k)]:
        raise FedistillError("node-config", f"The SuperNode's --node-config lacks {', '.join(missing)}.")
    if not Path(str(node["work-dir"])).is_absolute():  # from another folder it would be an empty one, with a new ledger
        raise FedistillError(
            "node-config",
            f"In --node-config work-dir={node['work-dir']} must be an absolute path: the ledger lies there.",
        )
    for key in node:  # a limit with a slip in its name would be no limit
        if key not in KEYS:
            raise FedistillError("node-config", f"In --node-config: {unknown('key', str(key), KEYS).sentence}")
    if node.get("require-privacy", "dp") != "dp":
        raise FedistillError("node-config", 'In --node-config require-privacy can only be "dp".')
    epsilon, delta, most = (_number(node, k) for k in ("lifetime-epsilon", "lifetime-delta", "max-epsilon"))
    try:
        cap = cap_of(epsilon, delta)
    except FedistillError as error:
        raise FedistillError("node-config", f"In --node-config: {error.sentence}") from None
    private = "require-privacy" in node or cap is not None or most is not None
    return Rules(cap=cap, most=math.inf if most is None else most, private=private)


def _number(node: Mapping[str, Any], key: str) -> float | None:
    if key not in node:
        return None
    try:
        number = float(node[key])
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(node[key], bool) or not 0 < number < math.inf:
        raise FedistillError("node-config", f"In --node-config {key}={node[key]} is no number above 0.")
    return number
