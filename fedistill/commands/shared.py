"""What the commands share: the screen, common options, and how options become a configuration."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields, replace
from typing import Annotated, Any

import typer
from rich.console import Console

from fedistill.config import Config, make_config
from fedistill.errors import FedistillError
from fedistill.release.text import plain

screen = Console(stderr=True)  # progress and tables for people; stdout is for --json

Data = Annotated[
    str | None, typer.Option(help="phantom, a MedMNIST flag, an .npz file, an image folder or a .csv manifest")
]
Partition = Annotated[str | None, typer.Option(help="site, iid, dirichlet, quantity or a .json file of indices.")]
Ipc = Annotated[int | None, typer.Option(help="Synthetic images per class and site.")]
Preset = Annotated[str | None, typer.Option(help="Amount of work: quick, standard or thorough.")]
Method = Annotated[str | None, typer.Option(help="Distillation method; `fedistill methods` lists them.")]
Init = Annotated[
    str | None, typer.Option(help="Start of the synthetic images: noise, phantom, or real (shows real patients).")
]
Iterations = Annotated[int | None, typer.Option(help="Outer iterations of distillation.")]
Experts = Annotated[int | None, typer.Option(help="Expert networks per site.")]
Width = Annotated[int | None, typer.Option(help="Channels of the ConvNet, such as 16, 32 or 128.")]
Seed = Annotated[int | None, typer.Option(help="Seed: the same seed gives the same result on the same machine.")]
Work = Annotated[str | None, typer.Option(help="Folder of the sites' work; runs that share it share experts.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; `fedistill options` lists them."),
]


def _delta(text: str) -> float:
    if text.strip().lower() == "auto":
        return 0.0
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text} is neither a number nor auto.") from None


Privacy = Annotated[
    str | None, typer.Option(help="none, or dp: what is made of a site's images is differentially private.")
]
Epsilon = Annotated[
    float | None, typer.Option(help="With --privacy dp: the budget of each site, for example 10, 3 or 1.")
]
Delta = Annotated[
    float | None,
    typer.Option(parser=_delta, metavar="FLOAT|auto", help="auto: the power of ten below one record's share."),
]
Unit = Annotated[str | None, typer.Option(help="Whom epsilon protects: image, or patient (data that name patients).")]
Where = Annotated[
    str, typer.Option("--site", metavar="FILE", envvar="FEDISTILL_SITE", help="The site's policy, site.toml.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def say(text: str) -> None:
    """One line for people. What others said must not steer the terminal, or begin a line."""
    screen.print(plain(text), soft_wrap=True, highlight=False, markup=False)


KEYS = {f.name for f in fields(Config)}


def configured(settings: list[str] | None, given: dict[str, Any], *, out: str = "") -> Config:
    """The configuration from options and --set pairs; an option that is given twice in both ways is an error."""
    values = {k: v for k, v in given.items() if v is not None}
    for key, value in pairs(settings).items():
        if key in values:
            raise FedistillError(
                "given-twice", f"{key} is given twice: keep one of --{key.replace('_', '-')} and --set {key}."
            )
        values[key] = value
    config = make_config(values)
    return config if config.out or not out else replace(config, out=out)


def typed() -> str:
    """The command that is running, to be typed again."""
    return shlex.join(["fedistill", *sys.argv[1:]])


def pairs(settings: list[str] | None, option: str = "--set") -> dict[str, str]:
    """What `--set key=value` says, or another `option` of that form; a key that is given twice is an error."""
    values: dict[str, str] = {}
    for pair in settings or []:
        key, found, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not found:
            raise FedistillError("bad-set-option", f"{option} {pair} has no '=': write {option} key=value.")
        if key in values:
            raise FedistillError("given-twice", f"{option} {key} is given twice: keep one.")
        values[key] = value
    return values
