"""What the sites of a set promise about their patients, read from its manifest, and what that comes to for one person.

The manifest comes from outside: `manifest[site]["privacy"]` is checked field by field, and whatever it lacks is lacking in the
promise too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.privacy.accounting import Mechanism, auto_delta, upwards
from fedistill.synthetic.set import SyntheticSet

NOTHING = "No formal guarantee"
UNITS = {  # the weakest first: a promise for a patient is also one for each of the patient's images
    "image": "one image; for a person with k images epsilon is k times as large, and delta grows too",
    "study": "one study with all of its images; for a person with k studies epsilon is k times as large, and delta grows too",
    "patient": "one patient with all of the patient's records at a site",
}
ADJACENCIES = {
    "zero-out": "one unit's records are replaced by nothing, while the number of records is public",
    "add-remove": "one unit's records are added or removed",
}
CONDITIONS = (
    "the networks start from weights that no patient's data touched",
    "the synthetic images start from noise or public images",
    "all experts and rounds are composed in one account",
    "the normalisation is a public constant",
    "class counts are public by declaration, or paid for",
    "settings were not tuned on the private data",
    "nothing was selected by a private loss or accuracy",
    "metrics that leave the site are paid for",
    "batches are sampled as the accountant assumes (Poisson)",
    "noise and sampling come from fresh, secret randomness",
)
STATUSES = ("not-applicable", "passed", "declared", "not-stated", "failed")  # of several sites the last one counts
MOST = 1000  # mechanisms of a site, and other entries of a list
MOST_STEPS = 10**7
LONGEST = 2000  # characters of a sentence


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One of the ten conditions under which a distilled set inherits the experts' guarantee. how: the check that shows it."""

    number: int
    name: str
    status: str
    how: str


@dataclass(frozen=True, kw_only=True)
class SiteClaim:
    """What one site promises. epsilon and delta: None where it promises nothing; then only `statement` means something.

    second: epsilon by the second accountant, and its name. real: it began with, or may hold, real patients' images.
    method: of distillation; empty where the manifest names none that is known.
    """

    site: str
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    adjacency: str = ""
    accountant: str = ""
    second: tuple[float, str] | None = None
    mechanisms: tuple[Mechanism, ...] = ()
    conditions: tuple[Condition, ...] = ()
    public: tuple[str, ...] = ()
    statement: str = ""
    real: bool = False
    method: str = ""

    @property
    def formal(self) -> bool:
        return self.epsilon is not None


@dataclass(frozen=True)
class Claim:
    """What the sites' promises come to for one person in the data of one of them (disjoint patients: parallel composition)."""

    sites: tuple[SiteClaim, ...]

    @property
    def formal(self) -> bool:
        """Whether there is a guarantee at all: there is none as soon as one site gives none."""
        return all(site.formal for site in self.sites)

    @property
    def epsilon(self) -> float | None:
        return max(s.epsilon or 0.0 for s in self.sites) if self.formal else None

    @property
    def delta(self) -> float | None:
        return max(s.delta or 0.0 for s in self.sites) if self.formal else None

    @property
    def unit(self) -> str:
        """The weakest of the sites' units."""
        return min((s.unit for s in self.sites), key=list(UNITS).index) if self.formal else ""

    @property
    def adjacencies(self) -> tuple[str, ...]:
        return tuple(sorted({s.adjacency for s in self.sites})) if self.formal else ()

    @property
    def real(self) -> tuple[str, ...]:
        """The sites whose images began as real patients' images."""
        return tuple(s.site for s in self.sites if s.real)

    @property
    def sentence(self) -> str:
        """The guarantee, or that there is none: what stands at the top of everything."""
        if self.epsilon is not None and self.delta is not None:
            return (
                f"Differential privacy with epsilon = {upwards(self.epsilon)} and delta = {self.delta:g} for one {self.unit} "
                f"({' or '.join(self.adjacencies)} adjacency), under the conditions listed with it."
            )
        without = [s.site for s in self.sites if not s.formal]
        where = "the images were" if len(without) == len(self.sites) else f"the images of {', '.join(without)} were"
        return (
            f"{NOTHING}: {where} made without differential privacy and can reveal facts about the patients behind them."
        )

    @property
    def banner(self) -> str:
        """A second sentence for the top where images began as patients' images; empty otherwise."""
        if not self.real:
            return ""
        return f"REAL PATIENTS' IMAGES were the start of the images of {', '.join(self.real)}: patients may be recognisable."

    def conditions(self) -> list[Condition]:
        """The ten conditions over all sites; of different answers the most worrying one."""
        found = []
        for number, name in enumerate(CONDITIONS, 1):
            if not self.formal:
                found.append(
                    Condition(number=number, name=name, status="not-applicable", how="No guarantee is claimed.")
                )
                continue
            answers = [(s.site, c) for s in self.sites for c in s.conditions if c.number == number]
            status = max((c.status for _, c in answers), key=STATUSES.index, default="not-stated")
            if len(answers) < len(self.sites):
                status = max(status, "not-stated", key=STATUSES.index)
            told = {c.how for _, c in answers if c.how}
            how = told.pop() if len(told) == 1 else " ".join(f"{site}: {c.how}" for site, c in answers if c.how)
            found.append(Condition(number=number, name=name, status=status, how=how))
        return found


def read_claim(made: SyntheticSet) -> Claim:
    """The promises in the manifest of a set.

    Raises `FedistillError`: "bad-privacy" on a promise that is incomplete or of other types than it should be,
    "seed-in-manifest" where a seed would let anyone take the noise off again, and "real-images" on images that were selected
    instead of made.
    """
    _no_seeds(made.manifest)
    return Claim(tuple(_site(name, made.manifest.get(name)) for name in made.sites))


def check_conditions(claim: Claim) -> None:
    """Raise `FedistillError` ("condition-failed") where a guarantee is claimed whose conditions do not hold."""
    if not claim.formal:
        return
    if claim.real:
        raise FedistillError(
            "condition-failed",
            f"Condition 2 failed: the images of {', '.join(claim.real)} began as real patients' images, which no noise can repair.",
        )
    for condition in claim.conditions():
        if condition.status == "failed":
            why = f"Condition {condition.number} failed ({condition.name}), so the claimed guarantee does not hold."
            raise FedistillError("condition-failed", f"{why} {condition.how}".strip())


def check_promise(made: SyntheticSet, config: Config, *, records: int = 1) -> None:
    """Raise `FedistillError` ("refused-set") where a set does not promise what `config` asked of its sites.

    records: how many its site declared, of which delta follows where `config` does not say it.
    """
    claim = read_claim(made)
    check_conditions(claim)
    most = config.delta or auto_delta(records)
    for site in claim.sites:
        if site.epsilon is None or site.epsilon > config.epsilon or site.unit != config.unit:
            said = f"epsilon={site.epsilon:g} per {site.unit}" if site.epsilon is not None else "no guarantee"
            raise FedistillError(
                "refused-set",
                f"The set of site '{site.site}' is refused: it promises {said}, "
                f"and epsilon={config.epsilon:g} per {config.unit} was asked for.",
            )
        if site.delta is None or site.delta > most:
            raise FedistillError(
                "refused-set",
                f"The set of site '{site.site}' is refused: its delta={site.delta or 0:g} is more than was asked for: {most:g}.",
            )


def certainty(epsilon: float) -> str:
    """How certain, in percent, somebody can become of a person's part in the data who was half certain before."""
    percent = 100 / (1 + math.exp(-min(epsilon, 500.0)))
    return "more than 99.999" if percent > 99.999 else f"{math.ceil(percent * 1000 - 1e-6) / 1000:.3f}"


def _site(name: str, about: Any) -> SiteClaim:
    from fedistill.methods.registry import METHODS

    about = about if isinstance(about, Mapping) else {}
    method = METHODS.get(about["method"]) if isinstance(about.get("method"), str) else None
    if method is not None and method.select is not None:
        raise FedistillError(
            "real-images",
            f"The images of site '{name}' are real patients' images (method {about['method']}): they are never released.",
        )
    known, real = about["method"] if method is not None else "", about.get("init") == "real"
    entry = about.get("privacy")
    if not isinstance(entry, Mapping) or entry.get("epsilon") is None:
        said = entry.get("statement") if isinstance(entry, Mapping) else None
        statement = said if isinstance(said, str) and len(said) <= LONGEST else "The site says nothing about privacy."
        return SiteClaim(site=name, statement=statement, real=real, method=known)
    reader = _Reader(name, entry)
    mechanisms = tuple(reader.mechanism(item) for item in reader.items("mechanisms"))
    claim = SiteClaim(
        site=name,
        epsilon=reader.number("epsilon", low=0.0),
        delta=reader.number("delta", low=0.0, high=1.0),
        unit=reader.one_of("unit", UNITS),
        adjacency=reader.one_of("adjacency", ADJACENCIES),
        accountant=reader.text("accountant"),
        second=reader.second(),
        mechanisms=mechanisms,
        conditions=tuple(reader.condition(item) for item in reader.items("conditions")),
        public=tuple(reader.sentence("public", item) for item in reader.items("public")),
        statement=reader.text("statement", default=""),
        real=real,
        method=known,
    )
    if not mechanisms and claim.epsilon != 0:
        reader.refuse("its epsilon has no mechanisms that it could come from")
    if claim.delta in (0.0, 1.0):
        reader.refuse("its delta is not strictly between 0 and 1")
    if len({c.number for c in claim.conditions}) < len(claim.conditions):
        reader.refuse("a condition is listed twice")
    return claim


@dataclass(frozen=True)
class _Reader:
    """Reads one site's entry; every fault is one sentence that names the site and the field."""

    site: str
    entry: Mapping[str, Any]

    def refuse(self, why: str) -> NoReturn:
        raise FedistillError("bad-privacy", f"The privacy statement of site '{self.site}' cannot be trusted: {why}.")

    def number(self, key: str, *, low: float, high: float = math.inf, entry: Mapping[str, Any] | None = None) -> float:
        value = (self.entry if entry is None else entry).get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.refuse(f"{key} is not a number from {low:g}" + ("" if high == math.inf else f" to {high:g}"))
        if not math.isfinite(value):
            self.refuse(f"{key} is not finite")
        return float(value)

    def sentence(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > LONGEST:
            self.refuse(f"{key} is not a text of at most {LONGEST} characters")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        return self.sentence(key, self.entry.get(key, default))

    def one_of(self, key: str, valid: Mapping[str, str]) -> str:
        value = self.entry.get(key)
        if not isinstance(value, str) or value not in valid:
            self.refuse(f"{key} is none of {', '.join(valid)}")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.entry.get(key, [])
        if not isinstance(value, list) or len(value) > MOST:
            self.refuse(f"{key} is not a list of at most {MOST} entries")
        return value

    def mechanism(self, item: Any) -> Mechanism:
        if not isinstance(item, Mapping):
            self.refuse("a mechanism is not a record of name, sample_rate, noise_multiplier, steps and clip_norm")
        steps = self.number("steps", low=1, high=MOST_STEPS, entry=item)
        try:
            return Mechanism(
                name=self.sentence("the name of a mechanism", item.get("name")),
                sample_rate=self.number("sample_rate", low=0, high=1, entry=item),
                noise_multiplier=self.number("noise_multiplier", low=0, entry=item),
                steps=int(steps),
                clip_norm=self.number("clip_norm", low=0, entry=item),
            )
        except ValueError:
            self.refuse("a mechanism has no noise, no sampling or no bound")

    def condition(self, item: Any) -> Condition:
        if not isinstance(item, Mapping) or item.get("status") not in STATUSES:
            self.refuse(f"a condition is not a record with a status of {', '.join(STATUSES)}")
        number = self.number("number", low=1, high=len(CONDITIONS), entry=item)
        if number != int(number):
            self.refuse("the number of a condition is not whole")
        return Condition(
            number=int(number),
            name=self.sentence("the name of a condition", item.get("name", "")),
            status=item["status"],
            how=self.sentence("a condition", item.get("how", "")),
        )

    def second(self) -> tuple[float, str] | None:
        value = self.entry.get("second")
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse("second is not a record of epsilon and accountant")
        epsilon = self.number("epsilon", low=0.0, entry=value)
        return epsilon, self.sentence("the second accountant", value.get("accountant"))


def _no_seeds(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if "seed" in str(key).lower():
                raise FedistillError(
                    "seed-in-manifest",
                    f"The manifest of the set holds '{key}': a seed lets anyone take the noise off, so take it out.",
                )
            _no_seeds(inner)
    elif isinstance(value, list):
        for inner in value:
            _no_seeds(inner)
