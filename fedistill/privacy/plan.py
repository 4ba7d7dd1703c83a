"""What a site is going to do to its records, decided and paid for before it looks at one of them.

A plan follows from the settings and the number of records, which is declared public (class counts are not). Neighbouring
data sets differ in one record that is blanked out: it then adds nothing to any sum, and the number of records stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.methods import sketch
from fedistill.methods.registry import method_of
from fedistill.privacy.accounting import Accounted, Mechanism, agree, auto_delta, calibrate, cross_check, epsilon_of

COUNT_NOISE = 6.0  # noise of class counts, in units of what one release of the whole epsilon takes: 1 % of the budget


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Mechanisms in the order of their use. epsilon: what the accountant says of them, at most what was asked for.

    second: the other accountant's word, where it is installed.
    """

    unit: str
    records: int
    mechanisms: tuple[Mechanism, ...]
    first: Accounted
    second: Accounted | None

    def __getitem__(self, name: str) -> Mechanism:
        return next(m for m in self.mechanisms if m.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The public part of a privacy statement."""
        second = {"epsilon": self.second.epsilon, "accountant": self.second.accountant} if self.second else None
        return {
            "epsilon": self.first.epsilon,
            "delta": self.first.delta,
            "unit": self.unit,
            "adjacency": "zero-out",
            "accountant": self.first.accountant,
            "second": second,
            "mechanisms": [m.to_dict() for m in self.mechanisms],
        }


def records_by_unit(split: Split, unit: str) -> Records:
    """The images, or the patients. Raises `FedistillError` where patients are asked for and the data do not name them."""
    if unit == "image":
        return Records.of_images(len(split))
    if split.patient is None:
        raise FedistillError(
            "no-patients", "unit=patient needs to know whose image each one is: give a manifest with a patient column."
        )
    return Records.of_patients(split.patient)


def records_of(train: Split, unit: str) -> int:
    """How many images, or patients. Raises as `records_by_unit` does."""
    return len(records_by_unit(train, unit))


def delta_of(config: Config, records: int) -> float:
    """The delta of a site of so many records. Raises `FedistillError` where the one that is asked for is a record's share."""
    delta = config.delta or auto_delta(records)
    if delta >= 1 / max(records, 1):
        raise FedistillError(
            "large-delta",
            f"delta={delta:g} is not below 1/{records}, the share of one record: lower it, or leave it out.",
        )
    return delta


def plan_of(config: Config, records: int) -> Plan:
    """The plan of `config` for a site of so many records.

    Raises `FedistillError` where no noise can meet epsilon, and where the accountants do not agree.
    """
    if not method_of(config).sketch:
        return plan_of_steps(config, records, config.experts * expert_steps(config))
    delta = delta_of(config, records)
    whole = calibrate(config.epsilon, delta, sample_rate=1.0, steps=1)
    once = Mechanism(name="sketch", sample_rate=1.0, noise_multiplier=whole, steps=1, clip_norm=sketch.NORM)
    return _plan(config, records, [once], delta)


def plan_of_steps(config: Config, records: int, steps: int) -> Plan:
    """Noisy class counts, and so many steps of DP-SGD, within `config.epsilon`. Raises as `plan_of` does."""
    delta, rate = delta_of(config, records), config.sample_rate
    whole = calibrate(config.epsilon, delta, sample_rate=1.0, steps=1)
    counts = Mechanism(name="counts", sample_rate=1.0, noise_multiplier=COUNT_NOISE * whole, steps=1)
    sigma = calibrate(config.epsilon, delta, sample_rate=rate, steps=steps, before=[counts])
    sgd = Mechanism(name="dp-sgd", sample_rate=rate, noise_multiplier=sigma, steps=steps, clip_norm=config.clip_norm)
    return _plan(config, records, [counts, sgd], delta)


def _plan(config: Config, records: int, mechanisms: list[Mechanism], delta: float) -> Plan:
    first, second = epsilon_of(mechanisms, delta), cross_check(mechanisms, delta)
    if second is not None and not agree(first, second):
        raise FedistillError(
            "accountants-differ",
            f"{first.accountant} says epsilon={first.epsilon:.3f} and {second.accountant} {second.epsilon:.3f}: "
            "nothing is released on such a claim.",
        )
    return Plan(unit=config.unit, records=records, mechanisms=tuple(mechanisms), first=first, second=second)


def expert_steps(config: Config) -> int:
    """Steps of a private expert: whole checkpoints, all of them, whatever part of a trajectory the method reads."""
    return config.expert_steps // config.checkpoint_every * config.checkpoint_every
