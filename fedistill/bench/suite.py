"""Suites of the benchmark: a folder of small files, one per data set and one per method.

<suite>/suite.toml            title, ipc, seeds, and [settings]: what every cell shares, first of all the protocol
<suite>/data/<name>.toml      title, train_images, and the settings that belong to the data set
<suite>/methods/<name>.toml   title, against, and the settings that make the method; arm: what is made with them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedistill.config import Config, make_config
from fedistill.errors import FedistillError, unknown
from fedistill.files import read_toml
from fedistill.simulation import app_folder

WHOLE = "whole"  # training on all real images of a data set: the reference of every method
# What a method makes: a synthetic set; no set, but its experts as an ensemble; no set, but a network by federated averaging.
ARMS = ("set", "experts", "fedavg")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set. `train_images`: size of a stratified subset of the training images; 0: all of them."""

    title: str
    settings: Mapping[str, Any]
    train_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method. `against`: the methods that it is compared with, pair by pair. `arm`: one of `ARMS`."""

    title: str
    settings: Mapping[str, Any]
    against: tuple[str, ...] = ()
    arm: str = "set"


@dataclass(frozen=True, kw_only=True)
class Suite:
    title: str
    ipc: tuple[int, ...]
    seeds: int
    settings: Mapping[str, Any]
    data: Mapping[str, Source]
    methods: Mapping[str, Recipe]


def _of_scope(*scopes: str) -> set[str]:
    return {f.name for f in fields(Config) if f.metadata["scope"] in scopes}


# `rounds` and `server_data` belong to a federation; the other names left out have a place of their own.
SHARED = _of_scope("data", "experts", "distill", "eval") | {"preset", "slice_seconds", "workers", "device"}
SHARED -= {"data", "method", "ipc", "rounds", "server_data"}
OF_DATA = SHARED - {"seed", "preset", "slice_seconds", "workers", "device"} | {"data"}
# Not the protocol: it is the same for every method.
OF_METHOD = _of_scope("experts", "distill") - {"ipc", "rounds"} | {"fl_rounds", "fl_steps", "fl_lr"}


def load_suite(name: str) -> Suite:
    """The suite in the folder `name`, or the one of that name that comes with fedistill.

    Raises `FedistillError` on a suite that does not exist, and with the name of the file on anything wrong in it.
    """
    ours = app_folder() / "simulations" / "suites"
    folder = Path(name).expanduser()
    if not (folder / "suite.toml").is_file():
        known = [p.parent.name for p in ours.glob("*/suite.toml")]
        if folder.is_dir():
            raise FedistillError("bad-suite", f"{folder} is not a suite: there is no suite.toml in it.")
        if name not in known:
            raise unknown("suite", name, known)
        folder = ours / name
    return _read_suite(folder)


def _read_suite(folder: Path) -> Suite:
    path = folder / "suite.toml"
    about = _read(path, {"title": str, "ipc": list, "seeds": int, "settings": dict}, set())
    settings = _settings(path, about.get("settings", {}), SHARED)
    data = {p.stem: _source(p) for p in sorted((folder / "data").glob("*.toml"))}
    methods = {p.stem: _recipe(p) for p in sorted((folder / "methods").glob("*.toml"))}
    if not data or not methods:
        raise FedistillError("bad-suite", f"{folder} needs at least one file in data/ and one in methods/.")
    if WHOLE in methods:
        raise FedistillError("bad-suite", f"{folder / 'methods' / WHOLE}.toml: the name '{WHOLE}' is taken: rename it.")
    for name, recipe in methods.items():
        for other in recipe.against:
            if other not in methods:
                raise _located(folder / "methods" / f"{name}.toml", unknown("method", other, methods))
    ipc, seeds = about.get("ipc", [10]), about.get("seeds", 3)
    if not ipc or any(type(n) is not int or n < 1 for n in ipc) or seeds < 1:
        raise FedistillError("bad-suite", f"{path}: ipc must be a list of whole numbers from 1, and seeds at least 1.")
    return Suite(
        title=about.get("title", folder.name),
        ipc=tuple(ipc),
        seeds=seeds,
        settings=settings,
        data=data,
        methods=methods,
    )


def _source(path: Path) -> Source:
    values = _read(path, {"title": str, "train_images": int}, OF_DATA)
    title, train_images = values.pop("title", path.stem), values.pop("train_images", 0)
    if train_images < 0:
        raise FedistillError("bad-suite", f"{path}: train_images={train_images} is too small: it must be at least 0.")
    settings = _settings(path, values, OF_DATA)
    if "data" not in settings:
        raise FedistillError("bad-suite", f'{path} does not say which data: add data = "a file or a MedMNIST flag".')
    return Source(title=title, settings=settings, train_images=train_images)


def _recipe(path: Path) -> Recipe:
    values = _read(path, {"title": str, "against": list, "arm": str}, OF_METHOD)
    title, against, arm = values.pop("title", path.stem), values.pop("against", []), values.pop("arm", "set")
    if arm not in ARMS:
        raise _located(path, unknown("arm", arm, ARMS))
    settings = _settings(path, values, OF_METHOD)
    return Recipe(title=title, settings={"method": path.stem} | settings, against=tuple(map(str, against)), arm=arm)


def _read(path: Path, own: Mapping[str, type], keys: set[str]) -> dict[str, Any]:
    """The table in a file. Raises `FedistillError` on names that are neither in `own` nor in `keys`."""
    values = read_toml(path, "bad-suite")
    for name, value in values.items():
        if name not in own and name not in keys:
            raise _located(path, unknown("key", name, [*own, *keys]))
        if name in own and type(value) is not own[name]:
            raise FedistillError("bad-suite", f"{path}: {name}={value!r} is not a {own[name].__name__}.")
    return values


def _settings(path: Path, values: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """`values` with their types checked. Raises `FedistillError`, with the name of the file, on a wrong name or value."""
    for name in values:
        if name not in keys:
            raise _located(path, unknown("key", name, keys))
    try:
        config = make_config(values)
    except FedistillError as error:
        raise _located(path, error) from None
    return {name: getattr(config, name) for name in values}


def _located(path: Path, error: FedistillError) -> FedistillError:
    return FedistillError(error.code, f"{path}: {error.sentence}")
