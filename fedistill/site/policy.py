"""What a site allows, in a file of its own (`site.toml`) that no server can change.

    [site]                              [privacy]                       [release]
    name = "north"                      required = true                 manual = true
    data = "/srv/north/study.csv"       unit = "patient"                largest_set = 500
    work = "/srv/fedistill"             max_epsilon = 3.0               smallest_class = 20
    code = "installed"                  max_delta = 1e-4                answers = false
    [jobs]                              lifetime_epsilon = 10.0
    method = ["sketch", "ptm"]          lifetime_delta = 1e-4
    ipc = { from = 1, to = 50 }         [connection]
                                        server = "fedistill.example.org:443"
                                        authority = "ca.crt"
                                        key = "north.key"

Only [site] is needed; files of [connection] lie beside this one. A job is checked before anything is said or
done, and what it made once more before it leaves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.public import NORMALISATION
from fedistill.errors import FedistillError, unknown
from fedistill.experts.train import architectures_of
from fedistill.files import read_toml
from fedistill.matching.objective import MASKS
from fedistill.matching.problem import formation_of, images_per_class
from fedistill.methods.registry import METHODS
from fedistill.models.augment import parse_operations
from fedistill.privacy.accounting import auto_delta
from fedistill.privacy.ledger import Cap, cap_of
from fedistill.privacy.plan import delta_of, records_of
from fedistill.release.claim import UNITS as CLAIMED
from fedistill.release.claim import check_conditions, read_claim
from fedistill.site.describe import task_of
from fedistill.synthetic.set import SyntheticSet

UNITS = tuple(CLAIMED)  # the weakest first
CODE = ("installed", "approved")
DATA_KEYS = ("seed", "modality", "image_size", "task")  # of scope "data", what holds where the data are a site's own
# All that means something at a site.
JOB_KEYS = {f.name for f in fields(Config) if f.metadata["scope"] in ("experts", "distill")}
JOB_KEYS |= {*DATA_KEYS, "eval_epsilon", "device"}
LARGEST_SIDE = (
    512  # pixels that a job may resize images to where [jobs] says nothing of it: they have to fit into memory
)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both allowed."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """Any of some values."""

    values: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


@dataclass(frozen=True, kw_only=True)
class Connection:
    """The server's address, "host:port", the certificate of its authority, and the site's private key."""

    server: str
    authority: Path
    key: Path


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A site's name, data and work folder, and what it allows.

    code: which code of a server may run: "installed", the same as here, and what a person approved; "approved", only that.
    required: jobs without differential privacy are refused. unit: the least that a job has to protect. max_epsilon, max_delta: of
    one job. cap: over the site's lifetime. manual: what was made waits for a person. largest_set: synthetic images.
    answers: whether counts of right answers on held-out images may leave.
    smallest_class: real images; what is smaller takes no part in a job without privacy, in which its images would show. (With
    privacy noise hides them, and leaving a class out would tell its size.) jobs: what a job's settings may be.
    """

    name: str
    data: str
    work: Path
    code: str = CODE[0]
    required: bool = False
    unit: str = UNITS[0]
    max_epsilon: float = math.inf
    max_delta: float = 1.0
    cap: Cap | None = None
    manual: bool = False
    largest_set: int | None = None
    smallest_class: int = 0
    answers: bool = True
    jobs: Mapping[str, Range | Choice] = field(default_factory=dict)
    connection: Connection | None = None

    def at_site(self, config: Config) -> Config:
        """A job without what it says of a simulation's data, such as how many sites divide them: with it, the same work in a
        federation with one site more would be done, and paid for, again."""
        usual = {f.name: f.default for f in fields(Config) if f.metadata["scope"] == "data" and f.name not in DATA_KEYS}
        if self.data.strip() == "phantom":  # a trial, whose phantoms the job describes
            usual = {name: value for name, value in usual.items() if not name.startswith("phantom_")}
        return Config(**(config.to_dict() | usual))

    def check_job(self, config: Config) -> None:
        """Raise `FedistillError` ("policy") on a job that the site does not take part in."""
        if self.required and config.privacy != "dp":
            _refuse("This site takes part with privacy=dp only.")
        if config.privacy == "dp" and UNITS.index(config.unit) < UNITS.index(self.unit):
            _refuse(f"unit={config.unit} is not enough for this site: it takes part with unit={self.unit}.")
        for name in ("epsilon", "eval_epsilon"):
            if getattr(config, name) > self.max_epsilon:
                _refuse(
                    f"{name}={getattr(config, name):g} is more than this site gives to one job: {self.max_epsilon:g}."
                )
        if "image_size" not in self.jobs and config.image_size > LARGEST_SIDE:
            _refuse(
                f"image_size={config.image_size} is more than {LARGEST_SIDE}, and this site's policy does not allow it."
            )
        for name, allowed in self.jobs.items():
            if getattr(config, name) not in allowed:
                _refuse(f"{name}={getattr(config, name)} is not allowed at this site: {allowed}.")

    def check_data(self, config: Config, data: Dataset) -> Dataset:
        """The data that take part in a job: without classes that are too small.

        Raises `FedistillError` ("policy") where nothing is left, where images have several findings, and on a job whose set could
        not leave: before anything is spent on it.
        """
        images = images_per_class(config, task_of(data)) * data.classes
        if self.largest_set is not None and images > self.largest_set:
            formation = formation_of(config, task_of(data))
            what = f"ipc={config.ipc}" + (f" with formation={formation}" if formation > 1 else "")
            _refuse(f"{what} makes {images} images, and at most {self.largest_set} may leave this site.")
        if config.privacy == "dp":
            delta = delta_of(config, records_of(data.train, config.unit))
            if delta > self.max_delta:
                _refuse(f"delta={delta:g} is more than this site gives to one job: {self.max_delta:g}.")
            return data
        if not self.smallest_class:
            return data
        if data.kind == "multilabel":
            _refuse("This site has a limit of images per class, and they have several findings: it takes privacy=dp.")
        large = torch.tensor(data.train.counts(data.classes)) >= self.smallest_class
        if not large.any():
            _refuse("No class of this site is as large as it demands of a job without privacy.")
        parts = {}
        for name, split in data.splits.items():  # counts of answers, too, are exact
            enough = torch.tensor(split.counts(data.classes)) >= self.smallest_class
            parts[name] = split.take((large & enough)[split.labels].nonzero().flatten())
        return dataclasses.replace(data, train=parts["train"], val=parts["val"], test=parts["test"])

    def check_answers(self, config: Config, data: Dataset, split: str) -> None:
        """Raise `FedistillError` ("policy") where counts of answers on a split must not leave."""
        if not self.answers:
            _refuse("This site lets no counts of answers leave.")
        if config.privacy == "dp":
            delta = auto_delta(max(records_of(data.splits[split], config.unit), 1))
            if delta > self.max_delta:
                _refuse(f"delta={delta:g} of answers is more than this site gives to one job: {self.max_delta:g}.")

    def check_set(self, made: SyntheticSet) -> None:
        """Raise `FedistillError` ("policy") on a set that must not leave, whatever the job said of it."""
        if self.largest_set is not None and len(made) > self.largest_set:
            _refuse(f"The set has {len(made)} images, and at most {self.largest_set} may leave this site.")
        if made.sites != (self.name,):
            _refuse("The set is not only this site's.")
        claim = read_claim(made)
        check_conditions(claim)
        if claim.real:
            _refuse("The set holds real images, or began with them.")
        if claim.epsilon is None or claim.delta is None:
            if self.required:
                _refuse("The set has no formal guarantee, and this site lets nothing else leave.")
            return
        if claim.epsilon > self.max_epsilon or claim.delta > self.max_delta:
            _refuse(
                f"The set promises epsilon={claim.epsilon:.3f} at delta={claim.delta:g}, and this site allows "
                f"{self.max_epsilon:g} at {self.max_delta:g}."
            )
        if UNITS.index(claim.unit) < UNITS.index(self.unit):
            _refuse(f"The set protects every {claim.unit}, and this site demands it of every {self.unit}.")


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises `FedistillError` ("site-config") on anything that is not understood: a limit with a slip in
    its name would be no limit."""
    parts = read_toml(path, "site-config")
    try:
        return _policy(parts, path.absolute().parent)
    except FedistillError as error:
        raise FedistillError("site-config", f"{path}: {error.sentence}") from None


_KNOWN: dict[str, dict[str, type]] = {
    "site": {"name": str, "data": str, "work": str, "code": str},
    "privacy": {
        "required": bool,
        "unit": str,
        "max_epsilon": float,
        "max_delta": float,
        "lifetime_epsilon": float,
        "lifetime_delta": float,
    },
    "connection": {"server": str, "authority": str, "key": str},
    "release": {"manual": bool, "largest_set": int, "smallest_class": int, "answers": bool},
}
_WORDS_OF: dict[str, Mapping[str, Any]] = {"method": METHODS, "mask": MASKS, "modality": NORMALISATION}
_WORDS = {str: "text", bool: "true or false", float: "a number above 0", int: "a whole number above 0"}


def _policy(parts: Mapping[str, Any], beside: Path) -> Policy:
    for part, values in parts.items():
        if part not in _KNOWN and part != "jobs":
            raise unknown("table", part, [*_KNOWN, "jobs"])
        if not isinstance(values, dict):
            _wrong(f"{part} is no table: write [{part}].")
    found = {part: _typed(part, parts.get(part, {})) for part in _KNOWN}
    site, privacy = found["site"], found["privacy"]
    if missing := [key for key in ("name", "data", "work") if not site.get(key)]:
        _wrong(f"[site] lacks {', '.join(missing)}.")
    if not Path(site["work"]).is_absolute():  # from another folder it would be an empty one, with a new ledger
        _wrong(f"work={site['work']} must be an absolute path: the ledger lies there.")
    if site.get("code", CODE[0]) not in CODE:
        raise unknown("code", site["code"], CODE)
    if privacy.get("unit", UNITS[0]) not in UNITS:
        raise unknown("unit", privacy["unit"], UNITS)
    cap = cap_of(privacy.pop("lifetime_epsilon", None), privacy.pop("lifetime_delta", None))
    if privacy.get("required") and cap is None:
        _wrong(
            "[privacy] required bounds one job, and a server can send many: give lifetime_epsilon and lifetime_delta too."
        )
    if not privacy.get("required") and (cap is not None or set(privacy) - {"required"}):
        _wrong("Limits in [privacy] mean nothing for jobs without it: add required = true.")
    connection = found["connection"]
    if connection and set(connection) != set(_KNOWN["connection"]):
        _wrong("[connection] needs server, authority and key.")
    jobs = {name: _allowed(name, value) for name, value in parts.get("jobs", {}).items()}
    return Policy(
        name=site["name"],
        data=site["data"],
        work=Path(site["work"]),
        code=site.get("code", CODE[0]),
        cap=cap,
        jobs=jobs,
        connection=Connection(
            server=connection["server"], authority=beside / connection["authority"], key=beside / connection["key"]
        )
        if connection
        else None,
        **privacy,
        **found["release"],
    )


def _typed(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = _KNOWN[part]
    for key, value in values.items():
        if key not in kinds:
            raise unknown(f"key of [{part}]", key, kinds)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        right = {float: number, int: number and isinstance(value, int)}.get(kinds[key], isinstance(value, kinds[key]))
        if not right:
            _wrong(f"[{part}] {key}={value!r} is not {_WORDS[kinds[key]]}.")
    return dict(values)


def _allowed(name: str, value: Any) -> Range | Choice:
    """What [jobs] says of one setting."""
    if name not in JOB_KEYS:
        raise unknown("setting of a job", name, JOB_KEYS)
    if isinstance(value, dict) and set(value) == {"from", "to"} and all(_is_number(v) for v in value.values()):
        _check_values(name, tuple(value.values()))
        if value["from"] > value["to"]:
            _wrong(f"[jobs] {name}: from={value['from']} is more than to={value['to']}.")
        return Range(value["from"], value["to"])
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        _check_values(name, value)
        return Choice(tuple(value))
    raise FedistillError(
        "site-config", f"[jobs] {name}={value!r} is neither a list of values nor {{ from = 1, to = 9 }}."
    )


def _check_values(name: str, values: Sequence[Any]) -> None:
    """Raise `FedistillError` where no job could have one of the values: it would be refused for ever, and nobody told why."""
    for value in values:
        config = make_config({name: value})
        if getattr(config, name) != value:  # as text that stands for a number
            _wrong(f"[jobs] {name}={value!r} is not as a job writes it.")
        if name == "model":
            architectures_of(config)
        if value == "auto":
            continue
        if name in _WORDS_OF and value not in _WORDS_OF[name]:
            raise unknown(name, str(value), _WORDS_OF[name])
        if name == "augment":
            parse_operations(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(sentence: str) -> NoReturn:
    raise FedistillError("policy", sentence)


def _wrong(sentence: str) -> NoReturn:
    raise FedistillError("site-config", sentence)
