"""The command line, `fedistill`: one command per thing to do; those with commands of their own are in `fedistill.commands`."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedistill import __version__
from fedistill.commands import ledger, release, server, site, study
from fedistill.commands.audit import SHADOWS, attack, audit, largest, show
from fedistill.commands.report import report
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
    Partition,
    Preset,
    Privacy,
    Seed,
    Sets,
    Unit,
    Width,
    Work,
    configured,
    pairs,
    screen,
    typed,
)
from fedistill.config import PRESETS, Config, listed
from fedistill.errors import FedistillError

if TYPE_CHECKING:
    from fedistill.data.dataset import Dataset

# Typer would write "\[default: 8]": it escapes for a markup that these pages do not have.
typer.core.HAS_RICH = False
app = typer.Typer(
    help="Hospitals send a lesson, not their images: federated multi-site dataset distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(ledger.app, name="ledger")
app.add_typer(release.app, name="release")
app.add_typer(site.app, name="site")
app.add_typer(server.app, name="server")
app.add_typer(study.app, name="study")
SHOWN_FAILURES = 10


@app.command()
def simulate(
    data: Data = None,
    partition: Partition = None,
    alpha: Annotated[float | None, typer.Option(help="Concentration of dirichlet and quantity.")] = None,
    sites: Annotated[int | None, typer.Option(help="Number of sites.")] = None,
    ipc: Ipc = None,
    method: Method = None,
    init: Init = None,
    iterations: Iterations = None,
    experts: Experts = None,
    width: Width = None,
    rounds: Annotated[int | None, typer.Option(help="Federated rounds.")] = None,
    seed: Seed = None,
    seeds: Annotated[int | None, typer.Option(help="Repeat with this many seeds and report deviations.")] = None,
    privacy: Privacy = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    unit: Unit = None,
    preset: Preset = None,
    work: Work = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run; the same command continues there.")] = None,
    attacked: Annotated[
        bool, typer.Option("--audit", help="Then attack what the largest site would send, as `fedistill audit` does.")
    ] = False,
    settings: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Simulate hospitals on this machine: distil at each, merge, train global models, compare, report.

    Exit code 1: an attack contradicts the privacy that is claimed.
    """
    from fedistill.report.tables import arms_table, guarantee, sites_table, verdict
    from fedistill.simulation import simulate as run

    config = configured(settings, {k: v for k, v in locals().items() if k in KEYS}, out="runs/simulation")
    target = largest(config) if attacked else None  # what cannot be attacked is said before the work
    summary = run(config, screen, command=typed())
    if target is not None:
        summary = _attacked(config, *target)
    contradicted = (summary.get("audit") or {}).get("contradicts", False)
    if as_json:
        print(json.dumps(summary, indent=1))
        raise typer.Exit(contradicted)
    screen.print(sites_table(summary), arms_table(summary), sep="\n")
    screen.print(verdict(summary), highlight=False)
    if promise := guarantee(summary):
        screen.print(promise, highlight=False)
    screen.print(f"Report: {Path(config.out).resolve() / 'report.html'}", soft_wrap=True, highlight=False)
    raise typer.Exit(contradicted)


def _attacked(config: Config, site: Dataset, canaries: int) -> dict[str, Any]:
    """Attack a finished run, and write its summary and report again with what that showed."""
    from fedistill.files import read_json
    from fedistill.report.summary import write_summary
    from fedistill.simulation import absolute

    run = absolute(config.resolved())
    folder = Path(run.out) / "audit"
    show(attack(run, site, folder, canaries=canaries, shadows=SHADOWS), folder)
    return write_summary(Config(**read_json(Path(run.out) / "summary.json")["config"]), Path(run.out))


@app.command()
def probe(
    data: Data = None,
    budgets: Annotated[
        str | None, typer.Option("--ipc", help="Budgets to compare, for example 1,5,10; default 1,2,5,10,20,50.")
    ] = None,
    partition: Partition = None,
    seed: Seed = None,
    settings: Sets = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="CSV", help="Instead: fit the predictor to a benchmark's results, and store it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say in a minute what distillation can be expected to reach, from random real images and a fitted predictor."""
    if fit is not None:
        if any(option is not None for option in (data, budgets, partition, seed)) or settings:
            raise FedistillError("fit-alone", "--fit takes no other option than --json.")
        _fit(Path(fit), as_json)
        return
    from fedistill.data.sources import load_data
    from fedistill.evaluation.probe import IPCS
    from fedistill.evaluation.probe import probe as measure
    from fedistill.report.probe import budgets_table, conclusion, sites_table

    config = configured(settings, {k: v for k, v in locals().items() if k in KEYS})
    ipcs = IPCS if budgets is None else _budgets(budgets)
    loaded = load_data(config)
    with screen.status("Training small networks") as status:
        found = measure(
            config, loaded, ipcs, on_progress=lambda done, total: status.update(f"Network {done} of {total}")
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    screen.print(budgets_table(found))
    if found.sites:
        screen.print(sites_table(found))
    screen.print(conclusion(found), highlight=False, markup=False)


def _budgets(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise FedistillError(
            "bad-value", f"ipc={text} is no list of whole numbers: write for example 1,5,10."
        ) from None


def _fit(path: Path, as_json: bool) -> None:
    from fedistill.evaluation.predictor import fit_predictor, read_cells, save_predictor
    from fedistill.report.probe import errors_table, trust

    predictor = fit_predictor(read_cells(path), path)
    stored = save_predictor(predictor)
    if as_json:
        print(stored.read_text(), end="")
        return
    screen.print(errors_table(predictor))
    screen.print(trust(predictor), f"Stored in {stored}.", sep="\n", highlight=False, markup=False)


@app.command()
def distill(
    out: Annotated[str, typer.Option(help="Folder of the synthetic set.")],
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
    lifetime_epsilon: Annotated[
        float | None, typer.Option(help="The most that may ever be spent on these data, by the ledger in --work.")
    ] = None,
    lifetime_delta: Annotated[
        float | None, typer.Option(help="The delta at which --lifetime-epsilon is meant.")
    ] = None,
    preset: Preset = None,
    work: Work = None,
    settings: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Distil one data set into a synthetic set, without a federation."""
    from fedistill.api import check_ledger_stays, distill_site
    from fedistill.data.sources import load_data
    from fedistill.privacy.ledger import cap_of
    from fedistill.synthetic.store import save_set
    from fedistill.wire import encode, size

    config = configured(settings, {k: v for k, v in locals().items() if k in KEYS}).resolved()
    folder = Path(out)
    if folder.exists():
        raise FedistillError("exists", f"{folder} exists already: choose another --out, or remove it.")
    cap = cap_of(lifetime_epsilon, lifetime_delta)
    check_ledger_stays(config)
    loaded = load_data(config)
    workplace = Path(config.work).expanduser() if config.work else folder.with_name(f".{folder.name}.work")
    try:
        with _bar() as bar:
            made = distill_site(config, loaded, loaded.name, workplace, on_progress=bar, cap=cap)
    except KeyboardInterrupt:
        screen.print("Stopped. The same command goes on from here.", highlight=False)
        raise typer.Exit(130) from None
    save_set(made, folder)
    if not config.work:
        shutil.rmtree(workplace)
    facts = {
        "set": str(folder),
        "images": len(made),
        "bytes": size(*encode(made)),
        "manifest": made.manifest[loaded.name],
    }
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        screen.print(f"{len(made)} synthetic images in {folder} (contact-sheet.png shows them).", highlight=False)
        screen.print(facts["manifest"]["privacy"]["statement"], highlight=False)


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="SET", help="Folder of a synthetic set.")],
    data: Data = None,
    preset: Preset = None,
    width: Width = None,
    seed: Seed = None,
    settings: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Train fresh networks on a synthetic set and test them, beside random real images of as many bytes."""
    from fedistill.data.sources import load_data
    from fedistill.evaluation.single import evaluate_set
    from fedistill.report.tables import arms_table
    from fedistill.synthetic.store import load_set

    config = configured(settings, {k: v for k, v in locals().items() if k in KEYS}).resolved()
    made, loaded = load_set(folder), load_data(config)
    with screen.status("Training global networks"):
        result = evaluate_set(config, loaded, made)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        screen.print(arms_table(result))


@app.command()
def bench(
    out: Annotated[str, typer.Option(help="Folder of the benchmark; the same command continues there.")],
    suite: Annotated[str, typer.Option(help="A suite that comes with fedistill, or a folder with one.")] = "medical",
    data_root: Annotated[str, typer.Option(help="Folder of the data files that the suite names.")] = ".",
    data: Annotated[str | None, typer.Option(help="Only these data sets of the suite: a comma list.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods of the suite: a comma list.")] = None,
    ipc: Annotated[str | None, typer.Option(help="Images per class instead of the suite's: a comma list.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds instead of the suite's.")] = None,
    settings: Sets = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
    only_tables: Annotated[
        bool, typer.Option("--tables", help="Only make tables and plots again, from results.csv.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods over data sets, images per class and seeds, under one protocol."""
    from fedistill.bench.plan import Choice
    from fedistill.bench.run import bench as run
    from fedistill.bench.run import plan, plan_table, write_tables
    from fedistill.bench.suite import load_suite

    folder = Path(out).expanduser().resolve()
    if only_tables:
        write_tables(folder)
        screen.print(f"Tables: {folder / 'tables.md'}", soft_wrap=True, highlight=False)
        return
    choice = Choice(
        data_root=Path(data_root).expanduser().resolve(),
        data=listed(data or ""),
        methods=listed(methods or ""),
        ipc=_numbers(ipc),
        seeds=seeds or 0,
        settings=pairs(settings),
    )
    chosen = load_suite(suite)
    if only_plan:
        cells, todo = plan(chosen, choice, folder)
        if as_json:
            print(json.dumps({"cells": len(cells), "finished": len(cells) - len(todo), "todo": [c.name for c in todo]}))
        else:
            screen.print(plan_table(chosen, cells, todo))
        return
    summary = run(chosen, choice, folder, screen, command=typed())
    if as_json:
        print(json.dumps(summary, indent=1))
    for cell in summary["failed"][:SHOWN_FAILURES]:
        where = f"{cell['data']}, {cell['method']}, IPC {cell['ipc']}, seed {cell['seed']}"
        screen.print(f"Failed: {where}: {cell['reason']}", style="red", soft_wrap=True, highlight=False, markup=False)
    screen.print(f"Tables: {summary['tables']}", soft_wrap=True, highlight=False)
    if summary["failed"]:
        screen.print(f"{len(summary['failed'])} cells failed: the same command tries them again.", highlight=False)
        raise typer.Exit(1)


app.command()(audit)
app.command()(report)


@app.command()
def methods() -> None:
    """List the distillation methods, a line and a source each."""
    from fedistill.methods.registry import METHODS

    table = Table("method", "what it does", "source", box=None)
    for name, method in METHODS.items():
        table.add_row(name, method.summary, method.source)
    Console().print(table)


@app.command()
def options() -> None:
    """List every setting that --set (and Flower's run configuration) takes, with its default."""
    table = Table("setting", "default", "meaning", box=None)
    for item in fields(Config):
        filled = [f"{name} {values[item.name]}" for name, values in PRESETS.items() if item.name in values]
        default = "by preset: " + ", ".join(filled) if filled else repr(item.default)
        table.add_row(item.name, default, item.metadata["help"])
    Console().print(table)


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in listed(text or "")]
    except ValueError:
        raise FedistillError("bad-value", f"--ipc {text} is not a list of whole numbers, like 1,10.") from None


class _bar:
    """A progress bar for one site's job."""

    def __enter__(self) -> _bar:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=screen, transient=True)
        self._progress.start()
        self._tasks: dict[str, Any] = {}
        return self

    def __call__(self, progress: Any) -> None:
        phase = "distill" if progress.done else progress.phase
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=progress.total, loss="")
        loss = "" if progress.loss is None else f"loss {progress.loss:.3f}"
        self._progress.update(self._tasks[phase], completed=progress.step, total=progress.total, loss=loss)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake, or a file that cannot be had, is one sentence and exit code 2."""
    try:
        app(standalone_mode=True)
    except FedistillError as error:
        sentence = error.sentence
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        sentence = f"{error.filename or 'A file'} cannot be read or written: {error.strerror}."
    else:
        return
    screen.print(f"Error: {sentence}", style="red", soft_wrap=True, highlight=False, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
