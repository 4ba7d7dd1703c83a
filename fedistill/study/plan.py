"""From a study file to cells: every combination of the settings that are varied, each a simulated federation of its own.

A cell of `fedistill.bench` is one synthetic set or one network, worked off directly and judged beside others; a cell of a study
is one run of `fedistill simulate` with all that belongs to it: sites, rounds, merge, arms of comparison, privacy.

    title = "..."         what it is about                seeds = 3     runs per cell
    [settings]            shared by all cells             [grid]        key = list of values; every combination is a cell
    [arms.NAME]           settings that go together, each arm crossed with the grid
    [[skip]]              cells with all of these settings are left out; `arm` is a name, and a list means any of its values
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedistill.config import Config, make_config
from fedistill.errors import FedistillError, unknown
from fedistill.files import read_toml
from fedistill.simulation import absolute, app_folder

PARTS: dict[str, type] = {"title": str, "seeds": int, "settings": dict, "grid": dict, "arms": dict, "skip": list}
ARM = "arm"  # what the column of the arms' names is called, and how [[skip]] names an arm
# A study has one place for all its runs, counts seeds itself, and simulates.
OURS = {"out", "work", "seeds", "server_data"}
SETTINGS = {f.name for f in fields(Config)} - OURS
VARIED = SETTINGS - {"seed"}
SCOPES = ("data", "experts", "distill", "merge", "eval")
MOST_CELLS = 10_000


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file says it. name: that of the file. arms: at least one, whose name is empty where none is given."""

    name: str
    title: str
    seeds: int
    settings: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    arms: Mapping[str, Mapping[str, Any]]
    skip: Sequence[Mapping[str, Sequence[Any]]]

    @property
    def columns(self) -> list[str]:
        """What tells the cells apart in the results: the arm, the keys of the grid, and those that arms set."""
        of_arms = [key for arm in self.arms.values() for key in arm]
        return list(dict.fromkeys([*([ARM] if len(self.arms) > 1 else []), *self.grid, *of_arms]))

    @property
    def varied(self) -> list[str]:
        """The columns by which every cell has a name: those of the arms' settings follow from the arm."""
        return [key for key in self.columns if key == ARM or len(self.grid.get(key, ())) > 1]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One simulated federation. settings: its value in each column of the study. config: resolved, without folders."""

    name: str
    settings: Mapping[str, Any]
    config: Config

    @property
    def key(self) -> str:
        """A hash of everything that the figures depend on; neither of the number of seeds, nor of how the work is done."""
        return self.config.key(*SCOPES)

    @property
    def experts(self) -> str:
        """Cells of the same word share experts, so they never run at the same time."""
        return self.config.key("data", "experts")

    @property
    def seeds(self) -> list[int]:
        return list(range(self.config.seed, self.config.seed + self.config.seeds))


def load_study(name: str) -> Study:
    """The study in the file `name`, or the one of that name that comes with fedistill.

    Raises `FedistillError` on a study that does not exist, and with the name of the file on anything wrong in it.
    """
    path, ours = Path(name).expanduser(), app_folder() / "simulations" / "studies"
    if path.suffix != ".toml":
        known = [p.stem for p in ours.glob("*.toml")]
        if name not in known:
            raise unknown("study", name, known)
        path = ours / f"{name}.toml"
    return read_study(path)


def read_study(path: Path) -> Study:
    """The study in a file. Raises `FedistillError`, with the name of the file, on anything wrong in it."""
    said = read_toml(path, "bad-study")
    for name, value in said.items():
        if name not in PARTS:
            raise _at(path, unknown("key", name, PARTS))
        if type(value) is not PARTS[name]:
            raise _bad(path, f"{name} must be {_WORDS[PARTS[name]]}")
    seeds, grid, arms, skip = said.get("seeds", 1), said.get("grid", {}), said.get("arms", {}), said.get("skip", [])
    if seeds < 1:
        raise _bad(path, f"seeds={seeds} is too small: it must be at least 1")
    settings = _typed(path, said.get("settings", {}), SETTINGS, "[settings]")
    _check_grid(path, grid, settings)
    for name, arm in arms.items():
        if not isinstance(arm, dict):
            raise _bad(path, f"arms.{name} must be a table of settings: write [arms.{name}]")
        if twice := sorted(set(arm) & set(grid)):
            raise _bad(path, f"{twice[0]} is in [grid] and in [arms.{name}]: keep one")
    return Study(
        name=path.stem,
        title=said.get("title", path.stem),
        seeds=seeds,
        settings=settings,
        grid={k: [_one(path, k, value, "[grid]") for value in values] for k, values in grid.items()},
        arms={name: _typed(path, arm, VARIED, f"[arms.{name}]") for name, arm in arms.items()} or {"": {}},
        skip=[_skip(path, one, arms) for one in skip],
    )


def with_changes(study: Study, settings: Mapping[str, Any], seeds: int | None) -> Study:
    """The study with other settings for all cells, which come before those of the file, and another number of seeds.

    One that the grid varies is no longer varied. Raises `FedistillError` on a name or value that cannot be, and on a setting that
    tells the arms apart.
    """
    for name in settings:
        if name in OURS:
            hint = "use --seeds" if name == "seeds" else "leave it out"
            raise FedistillError("bad-set-option", f"--set {name} does not work in a study: {hint}.")
        for arm, own in study.arms.items():
            if name in own:
                raise FedistillError("bad-set-option", f"--set {name} would change the arm '{arm}': edit the file.")
    config = make_config(settings)
    typed = {name: getattr(config, name) for name in settings}
    return replace(
        study,
        seeds=study.seeds if seeds is None else seeds,
        settings={**study.settings, **{k: v for k, v in typed.items() if k not in study.grid}},
        grid={k: [typed[k]] if k in typed else values for k, values in study.grid.items()},
    )


def cells_of(study: Study) -> list[Cell]:
    """The cells: those that share experts follow each other.

    Raises `FedistillError`, with the name of the cell, on settings that cannot be; and where nothing is left, or two cells are
    the same.
    """
    cells: list[Cell] = []
    number = len(study.arms) * math.prod(map(len, study.grid.values()))
    if number > MOST_CELLS:
        raise FedistillError("too-many", f"The study has {number} cells, more than {MOST_CELLS}: vary less at once.")
    for arm, own in study.arms.items():
        for values in itertools.product(*study.grid.values()):
            chosen = dict(zip(study.grid, values, strict=True))
            written = {**Config().to_dict(), **study.settings, **own, **chosen, ARM: arm}
            if any(all(written[key] in several for key, several in one.items()) for one in study.skip):
                continue
            cells.append(_cell(study, arm, {**study.settings, **own, **chosen}))
    if not cells:
        raise FedistillError("no-cells", f"[[skip]] leaves no cell of the study {study.name}.")
    first: dict[str, Cell] = {}
    for cell in cells:
        if cell.key in first:
            raise FedistillError(
                "same-cells", f"The cells '{first[cell.key].name}' and '{cell.name}' are the same run."
            )
        first[cell.key] = cell
    groups = list(dict.fromkeys(cell.experts for cell in cells))
    return sorted(cells, key=lambda cell: groups.index(cell.experts))


def _cell(study: Study, arm: str, settings: Mapping[str, Any]) -> Cell:
    from fedistill.data.partition import is_file
    from fedistill.data.public import known_modality
    from fedistill.site.feasible import check_words

    said = {ARM: arm} | dict(settings)
    name = ", ".join(f"{key} {shown(said[key])}" for key in study.varied) or study.name
    try:
        config = make_config({**settings, "seeds": study.seeds}).resolved()
        check_words(config)
        is_file(config)  # the partition
        if config.modality != "auto":
            known_modality(config.modality)
    except FedistillError as error:
        raise FedistillError(error.code, f"The cell '{name}' cannot be: {error.sentence}") from None
    columns = {key: arm if key == ARM else getattr(config, key) for key in study.columns}
    return Cell(name=name, settings=columns, config=replace(absolute(config), out="", work=""))


def shown(value: Any) -> str:
    """A setting in the name of a cell."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_grid(path: Path, grid: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for key, values in grid.items():
        if key == "seed":
            raise _bad(path, "seed cannot be in [grid]: say seeds = N at the top, for N runs of every cell")
        if key not in VARIED:
            raise _at(path, unknown("setting in [grid]", key, VARIED))
        if not isinstance(values, list) or not values:
            raise _bad(path, f"{key} in [grid] must be a list of at least one value")
        if key in settings:
            raise _bad(path, f"{key} is in [settings] and in [grid]: keep one")


def _skip(path: Path, said: Any, arms: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each setting that a cell must have to be left out."""
    if not isinstance(said, dict) or not said:
        raise _bad(path, "a [[skip]] names no setting")
    found: dict[str, list[Any]] = {}
    for key, value in said.items():
        several = value if isinstance(value, list) else [value]
        if key == ARM:
            for name in several:
                if name not in arms:
                    raise _at(path, unknown("arm", str(name), arms))
        elif key not in VARIED:
            raise _at(path, unknown("setting in [[skip]]", key, VARIED))
        found[key] = [one if key == ARM else _one(path, key, one, "[[skip]]") for one in several]
    return found


def _typed(path: Path, values: Mapping[str, Any], names: set[str], where: str) -> dict[str, Any]:
    for key in values:
        if key not in names:
            raise _at(path, unknown(f"setting in {where}", key, names))
    return {key: _one(path, key, value, where) for key, value in values.items()}


def _one(path: Path, key: str, value: Any, where: str) -> Any:
    try:
        return getattr(make_config({key: value}), key)
    except FedistillError as error:
        raise FedistillError(error.code, f"{path}: {where}: {error.sentence}") from None


def _at(path: Path, error: FedistillError) -> FedistillError:
    return FedistillError(error.code.split("-in-")[0], f"{path}: {error.sentence}")


def _bad(path: Path, what: str) -> FedistillError:
    return FedistillError("bad-study", f"{path}: {what}.")


_WORDS = {str: "text", int: "a whole number", dict: "a table", list: "a list of tables, each written [[skip]]"}
