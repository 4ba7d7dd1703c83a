"""Which further arms a run compares with, by name (`compare`): none is run without being asked for, since all cost time."""

from __future__ import annotations

from fedistill.config import Config, listed
from fedistill.errors import FedistillError, unknown

AVERAGED = "fedavg"  # runs wherever there are fl_rounds
ALONE = ("ensemble", "one-shot", "ensemble-distilled")  # made of one network per site
OF_ROUNDS = ("fedprox", "fedavg-distilled")
OF_PARAMETERS = (AVERAGED, "fedprox", *ALONE)  # what the server makes these of is no image
COMPARATORS = ("fedprox", *ALONE, "fedavg-distilled", "central-distilled")
PRIVATE = "dp-"  # before the name of an arm that its sites paid for


def comparators(config: Config) -> list[str]:
    """The names in `config.compare`; with "all", all that the other settings allow.

    Raises `FedistillError` on a name that there is not, and on one that needs rounds of averaging, or has no private form.
    """
    names = listed(config.compare)
    for name in names:
        if name not in (*COMPARATORS, "all"):
            raise unknown("arm of comparison", name, (*COMPARATORS, "all"))
    if "all" in names:
        return [name for name in COMPARATORS if not _hindrance(config, name)]
    for name in names:
        if why := _hindrance(config, name):
            raise FedistillError("no-comparison", f"compare={config.compare}: {name} {why}.")
    return list(dict.fromkeys(names))


def arm_of(config: Config, name: str) -> str:
    """What the arm is called in results."""
    return f"{PRIVATE}{name}" if config.privacy == "dp" else name


def _hindrance(config: Config, name: str) -> str:
    if name in OF_ROUNDS and not config.fl_rounds:
        return "needs rounds of federated averaging: set fl_rounds"
    if name == "fedprox" and config.privacy == "dp":
        return "is compared without privacy only"
    if name == "fedavg-distilled" and config.fl_rounds < config.segment:
        return f"needs at least segment={config.segment} rounds: raise fl_rounds"
    return ""
