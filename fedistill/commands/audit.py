"""`fedistill audit`: attack what a site would release, and say on one screen what that shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedistill.commands.shared import (
    KEYS,
    AsJson,
    Data,
    Delta,
    Epsilon,
    Experts,
    Init,
    Ipc,
    Iterations,
    Method,
    Preset,
    Privacy,
    Seed,
    Sets,
    Unit,
    Width,
    configured,
    screen,
)
from fedistill.config import Config
from fedistill.errors import FedistillError

if TYPE_CHECKING:
    from fedistill.data.dataset import Dataset

CANARIES, SHADOWS = 64, 8
ARM_NAMES = {"configured": "Rehearsals", "broken": "Control"}
METRICS = {"pixel": "pixels", "ssim": "SSIM", "feature": "features"}


def audit(
    out: Annotated[
        str, typer.Option(help="Folder of the audit, which stays at the site; the same command continues there.")
    ] = "runs/audit",
    data: Data = None,
    ipc: Ipc = None,
    method: Method = None,
    init: Init = None,
    iterations: Iterations = None,
    experts: Experts = None,
    width: Width = None,
    seed: Seed = None,
    privacy: Privacy = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    unit: Unit = None,
    preset: Preset = None,
    canaries: Annotated[int, typer.Option(help="Images with wrong labels whose presence is to be guessed.")] = CANARIES,
    canary_source: Annotated[str, typer.Option(help="own training images, or phantom ones.")] = "own",
    shadows: Annotated[
        int, typer.Option(help="Rehearsals: each is attacked once, with the others as shadows.")
    ] = SHADOWS,
    settings: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Rehearse a release with canaries, attack it, and set a lower bound on epsilon against what is claimed.

    Exit code 1: the bound contradicts the claim.
    """
    from fedistill.data.sources import load_data

    config = configured(settings, {k: v for k, v in locals().items() if k in KEYS and k != "out"})
    folder = Path(out).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise FedistillError("exists", f"{folder} is a file: choose another --out.")
    result = attack(config, load_data(config), folder, canaries=canaries, shadows=shadows, source=canary_source)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(result, folder)
    if result["contradicts"]:
        raise typer.Exit(1)


def attack(
    config: Config, site: Dataset, folder: Path, *, canaries: int, shadows: int, source: str = "own"
) -> dict[str, Any]:
    """The audit of `site` in `folder`, with bars, its result in `audit.json`. An interruption ends the command."""
    from fedistill.files import write_json
    from fedistill.privacy.audit.audit import audit as run

    try:
        with _bar() as told:
            result = run(
                config, site, site.name, folder, canaries=canaries, shadows=shadows, source=source, on_progress=told
            )
    except KeyboardInterrupt:
        screen.print("Stopped. The same command goes on from here.", highlight=False)
        raise typer.Exit(130) from None
    write_json(folder / "audit.json", result)
    return result


def largest(config: Config) -> tuple[Dataset, int]:
    """The site of a simulation that has most training images, and how many canaries it has room for: 64 or fewer.

    Raises `FedistillError` on anything that is wrong with `config`, and where no site has room.
    """
    from fedistill.privacy.audit.canaries import FEWEST, LARGEST_SHARE
    from fedistill.simulation import absolute, check

    site = max(check(absolute(config.resolved())), key=lambda site: len(site.train))
    room = min(CANARIES, len(site.train) // LARGEST_SHARE)
    if room < FEWEST:
        raise FedistillError(
            "few-canaries",
            f"The largest site has {len(site.train)} training images, too few to audit: it takes {FEWEST * LARGEST_SHARE}.",
        )
    return site, room


def show(result: dict[str, Any], folder: Path) -> None:
    claimed, control, delta = result["claimed_epsilon"], result["broken_arm"], f"delta {result['delta']:g}"
    lines = [
        "Claimed: " + ("no privacy" if claimed is None else f"epsilon {claimed:g} at {delta}"),
        f"Shown:   epsilon at least {result['epsilon_lower']:.2f} (confidence {100 * result['confidence']:g} %, {delta}); "
        f"this audit could have shown at most {result['ceiling']:.2f}",
        f"Control: {'caught' if control['caught'] else 'NOT caught'}, epsilon at least {control['epsilon_lower']:.2f} "
        f"for {control['ipc']} random real images per class",
    ]
    screen.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)
    screen.print(_attacks(result))
    screen.print(_copies(result["copies"]), highlight=False, markup=False, soft_wrap=True)
    screen.print(
        _verdict(result), style="red" if result["contradicts"] or not result["power"] else None, soft_wrap=True
    )
    for note in result["notes"]:
        screen.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
    screen.print(f"Result: {folder / 'audit.json'}", highlight=False, markup=False, soft_wrap=True)


def _verdict(result: dict[str, Any]) -> str:
    if result["contradicts"]:
        return "The claim is contradicted: do not release."
    if not result["power"]:
        return "The attack misses even a release of real images: this audit says nothing."
    if result["claimed_epsilon"] is None:
        return "No claim was made. What the attacks show is the least that leaks, not the most."
    return "The claim is not contradicted, which does not prove it."


def _attacks(result: dict[str, Any]) -> Table:
    """Rates of every attack; the last column is of the control."""
    first = result["attacks"][0]
    table = Table(box=None, title=f"Members found, of {first['pairs']} pairs of canary and run", title_justify="left")
    for name in ("attack", "AUC", *(f"at {100 * float(f):g} % false alarms" for f in first["tpr_at_fpr"])):
        table.add_column(name)
    table.add_column("control AUC")
    for attack, control in zip(result["attacks"], result["broken_arm"]["attacks"], strict=True):
        found = (
            f"{100 * r['tpr']:.1f} % ({100 * r['low']:.1f}-{100 * r['high']:.1f})"
            for r in attack["tpr_at_fpr"].values()
        )
        table.add_row(attack["name"], _figure(attack["auc"]), *found, _figure(control["auc"]))
    return table


def _copies(found: dict[str, Any]) -> str:
    parts = [f"Copies: {found['exact']} of {found['images']} synthetic images are exact copies of training images"]
    for name in (name for name in METRICS if name in found):
        near = found[name]["neighbours"]
        parts.append(
            f"{_figure(near['share'])} ({near['low']:.2f}-{near['high']:.2f}) of {near['distinct']} nearest by {METRICS[name]} are "
            "training images"
        )
    return "; ".join(parts) + ("; one half is expected." if found["compared"] else ".")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar per arm, in rehearsals."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=screen, transient=True) as progress:

        def told(step: Any) -> None:
            if step.arm not in tasks:
                tasks[step.arm] = progress.add_task(ARM_NAMES[step.arm], total=step.runs, state="")
            job = step.job
            part = (
                0.0 if job is None or not job.total else job.step / job.total * (0.5 if job.phase == "experts" else 1.0)
            )
            state = f"{min(step.run + 1, step.runs)} of {step.runs}" + (f", {job.phase}" if job is not None else "")
            progress.update(tasks[step.arm], completed=step.run + part, state=state)

        yield told
