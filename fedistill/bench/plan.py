"""From a suite and the command line to cells: what is to be computed, under which key, in which order."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fedistill.bench.suite import SHARED, WHOLE, Source, Suite
from fedistill.config import ALGORITHM, Config, make_config
from fedistill.data.dataset import Dataset, combined
from fedistill.data.partition import partition
from fedistill.data.sources import is_name, load_data
from fedistill.errors import FedistillError, unknown
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.fit import LEARNING_RATES
from fedistill.methods.registry import method_of
from fedistill.seeding import generator

FORMAT = 1  # of a cell's record: part of its key
# By default one site holds everything: what is compared is the methods, not the federation.
POOLED = {"partition": "iid", "sites": 1}
OPTIONS = {"data": "--data", "method": "--methods", "ipc": "--ipc", "seeds": "--seeds", "out": "--out"}
# All that training on real images depends on besides the scopes "data" and "eval".
TRAINING = ("width", "depth", "augment", "class_weights")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The part of a suite that is asked for (empty: all of it), where the data lie, and settings that come before the suite's."""

    data_root: Path = Path()
    data: Sequence[str] = ()
    methods: Sequence[str] = ()
    ipc: Sequence[int] = ()
    seeds: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the benchmark. ipc is 0 for the reference `whole`, which does not depend on it.

    config: every setting, resolved. fingerprint: of the images (empty where they could not be loaded).
    """

    data: str
    method: str
    ipc: int
    seed: int
    config: Config
    train_images: int
    fingerprint: str
    against: tuple[str, ...]
    arm: str = "set"

    @property
    def key(self) -> str:
        """A hash of everything that the figures depend on: not of where the data lie, nor of how the work is carried out."""
        scopes = ("data", "eval") if self.method == WHOLE else ("data", "experts", "distill", "eval")
        chosen = {f.name for f in fields(Config) if f.metadata["scope"] in scopes} - {"data"} | set(TRAINING)
        settings = {name: value for name, value in self.config.to_dict().items() if name in chosen}
        parts = [ALGORITHM, FORMAT, LEARNING_RATES, self.data, self.method, self.fingerprint, settings]
        parts += [self.arm] * (self.arm != "set")
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def experts(self) -> str:
        """Cells of the same word share their experts."""
        return f"{self.data}-{self.fingerprint}-{self.config.key('data', 'experts')}"

    @property
    def needs_experts(self) -> bool:
        return self.method != WHOLE and self.arm != "fedavg" and method_of(self.config).experts

    @property
    def name(self) -> str:
        return f"{self.data}, {self.method}" + (f", IPC {self.ipc}" if self.ipc else "") + f", seed {self.seed}"

    @property
    def cost(self) -> float:
        """A rough guess, in training steps: for the order of the work and the time that is left."""
        c = self.config
        evaluation = len(architectures(c)) * (len(LEARNING_RATES) + c.eval_nets - 1) * c.eval_steps
        return evaluation + (4 * c.iterations * c.syn_steps * min(1.0, self.ipc / 10) if self.ipc else 0)


def cells_of(suite: Suite, choice: Choice) -> list[Cell]:
    """The cells that are asked for, cheapest first.

    Raises `FedistillError` on names that the suite does not have, on settings that cannot be, and on methods that are the same
    or that do not exist. Data that cannot be loaded are an error only if there are no others: their cells will fail.
    """
    data = _chosen("data set", choice.data, suite.data)
    methods = _chosen("method", choice.methods, suite.methods)
    for name in choice.settings:
        if name in OPTIONS:
            raise FedistillError("bad-set-option", f"--set {name} does not work here: use {OPTIONS[name]}.")
        if name not in SHARED:
            raise unknown("setting of a benchmark", name, SHARED)
    marks = {source: fingerprint(suite, choice, source) for source in data}
    if not any(marks.values()):  # the folder of the data may be wrong: nothing would work
        load(suite, choice, data[0])
    cells = []
    for source in data:
        make = functools.partial(cell_of, suite, choice, marks[source], source)
        first = int(_settings(suite, choice, source, WHOLE).get("seed", 0))
        for seed in range(first, first + (choice.seeds or suite.seeds)):
            cells.append(make(WHOLE, 0, seed))
            for ipc in choice.ipc or suite.ipc:
                cells += [make(method, ipc, seed) for method in methods]
    _check(cells)
    return sorted(cells, key=lambda c: (c.cost, c.seed, c.data, c.method))


def cell_of(suite: Suite, choice: Choice, mark: str, data: str, method: str, ipc: int, seed: int) -> Cell:
    """One cell as the suite and the command line say now. mark: the fingerprint of the data.

    Raises `FedistillError` on settings that cannot be.
    """
    one = {"ipc": 1 if method == WHOLE else ipc, "seed": seed, "workers": 1}
    config = make_config(_settings(suite, choice, data, method) | one).resolved()
    return Cell(
        data=data,
        method=method,
        ipc=ipc,
        seed=seed,
        config=config,
        train_images=suite.data[data].train_images,
        fingerprint=mark,
        against=() if method == WHOLE else suite.methods[method].against,
        arm="set" if method == WHOLE else suite.methods[method].arm,
    )


def _settings(suite: Suite, choice: Choice, data: str, method: str) -> dict[str, Any]:
    """The settings of a cell: the command line before the method, the data set and the suite."""
    source = suite.data[data]
    recipe = {} if method == WHOLE else suite.methods[method].settings
    place = {"data": _place(source, choice.data_root)}
    settings = {**suite.settings, **source.settings, **place, **recipe, **choice.settings}
    return settings if "partition" in settings else POOLED | settings


def _place(source: Source, root: Path) -> str:
    """A file below the root by its absolute path; a MedMNIST flag or `phantom` as it is."""
    said = str(source.settings["data"])
    if is_name(said):
        return said
    path = (root / Path(said).expanduser()).expanduser().absolute()
    return str(path) if path.exists() or Path(said).suffix else said


def _chosen(kind: str, asked: Sequence[str], valid: Mapping[str, Any]) -> list[str]:
    for name in asked:
        if name not in valid:
            raise unknown(kind, name, valid)
    return list(dict.fromkeys(asked or valid))


def _check(cells: Sequence[Cell]) -> None:
    """Raise `FedistillError` on a method or model that does not exist, and on two cells that would do the same work."""
    seen: dict[tuple[str, str, str], Cell] = {}
    for cell in cells:
        architectures(cell.config)
        if cell.method == WHOLE:
            continue
        method_of(cell.config)
        work = (cell.fingerprint, cell.arm, cell.config.key("data", "experts", "distill", "eval"))
        if seen.setdefault(work, cell) is not cell:
            raise FedistillError(
                "same-cells", f"'{seen[work].name}' and '{cell.name}' have the same settings: leave one of them out."
            )


def fingerprint(suite: Suite, choice: Choice, data: str) -> str:
    """The fingerprint of a data set of the suite, as it is divided over sites; empty where it cannot be loaded."""
    try:
        loaded = load(suite, choice, data)
        parts = partition(loaded, make_config(_settings(suite, choice, data, WHOLE)))
    except FedistillError:
        return ""
    if len(parts.names) == 1:
        return loaded.fingerprint
    return combined(parts.at(loaded, place).fingerprint for place in range(len(parts.names)))


def load(suite: Suite, choice: Choice, data: str) -> Dataset:
    """A data set of the suite. Raises `FedistillError` where it cannot be loaded."""
    return load_subset(make_config(_settings(suite, choice, data, WHOLE)), data, suite.data[data].train_images)


def load_subset(config: Config, name: str, train_images: int) -> Dataset:
    """The data of `config`, with at most `train_images` training images (0: all) that keep the shares of the classes.

    The subset is the same for every seed, as a data set is.
    """
    data = load_data(config)
    n = len(data.train)
    if not 0 < train_images < n:
        return data
    shuffled = torch.randperm(n, generator=generator(0, "train-images", name))
    by_class = shuffled[data.train.groups[shuffled].argsort(stable=True)]
    evenly = torch.arange(train_images) * n // train_images  # every class in proportion
    return dataclasses.replace(data, train=data.train.take(by_class[evenly].sort().values))
