"""`fedistill study plan | run | show | plot`: simulated federations over a grid of settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedistill.commands.shared import AsJson, Data, Sets, pairs, say, screen, typed
from fedistill.errors import FedistillError, unknown

app = typer.Typer(help="Whole simulated federations over a grid.", no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="STUDY", help="A study that comes with fedistill, or a .toml file.")]
Out = Annotated[str, typer.Option(help="Folder of the study; the same command continues there.")]
Folder = Annotated[str, typer.Argument(metavar="OUT", help="Folder of the study.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Runs of every cell instead of the study's.")]
Model = Annotated[str | None, typer.Option("--model", help="Global model; default: that of the headline.")]
SHOWN_FAILURES = 10


@app.command()
def plan(
    study: Name,
    out: Out,
    data: Data = None,
    seeds: Seeds = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at the same time.")] = 1,
    settings: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Say what there is to do, and roughly what it takes; start nothing."""
    from fedistill.data.sources import place_of
    from fedistill.report.tables import duration, size
    from fedistill.study.cost import sharing
    from fedistill.study.plan import cells_of
    from fedistill.study.run import forecast, refuse_foreign

    chosen, folder = _study(study, data, seeds, settings), _folder(out)
    cells = cells_of(chosen)
    refuse_foreign(folder, chosen)
    seen = forecast(cells, folder, jobs=jobs)
    shared = sharing(cells)
    if as_json:
        rows = [{"cell": c.key, "name": c.name, **asdict(facts)} for c, facts in zip(cells, seen.cells, strict=True)]
        totals = {"cells": len(cells), "seconds_left": seen.seconds, "memory": seen.memory, "disk_left": seen.disk}
        networks = {"experts_used": shared.used, "experts_trained": shared.trained}
        print(
            json.dumps({"study": chosen.name, **totals, **networks, "measured": seen.measured, "plan": rows}, indent=1)
        )
        return
    table = Table("cell", "state", "time", "memory", "disk", "experts", box=None, title=chosen.title)
    for cell, facts in zip(cells, seen.cells, strict=True):
        figures = (duration(facts.seconds), size(facts.memory), size(facts.disk), str(facts.networks))
        table.add_row(cell.name, facts.state, *figures)
    screen.print(table, markup=False)
    done = sum(facts.state == "finished" for facts in seen.cells)
    say(
        f"{len(cells)} cells of {chosen.seeds} seeds, {done} finished. Left: about {duration(seen.seconds)}, "
        f"{size(seen.memory)} of memory at most, {size(seen.disk)} of disk."
    )
    say(
        f"Cells use {shared.used} expert networks, of which {shared.trained} are trained: the others are shared."
        if shared.used
        else "No cell has a use for experts."
    )
    based = (
        f"corrected by what {seen.measured} finished cells took"
        if seen.measured
        else "from counts of training steps, on a core of 2023"
    )
    say(f"The figures of what is left are rough: {based}. Data that only the run will load count as 28 pixels.")
    for source in dict.fromkeys(cell.config.data for cell in cells):
        try:
            place_of(source)
        except FedistillError as error:
            say(f"Cells that cannot run here: {error.sentence}")


@app.command()
def run(
    study: Name,
    out: Out,
    data: Data = None,
    seeds: Seeds = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at the same time, each with its share of cores.")] = 1,
    track: Annotated[
        str, typer.Option("--track", help="Send finished cells to mlflow, tensorboard or wandb as well.")
    ] = "",
    settings: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Run the cells that are not finished; exit code 1 where one failed. Ctrl-C stops, and the same command continues."""
    from fedistill.study.plan import cells_of
    from fedistill.study.run import run_study

    chosen, folder = _study(study, data, seeds, settings), _folder(out)
    summary = run_study(chosen, cells_of(chosen), folder, screen, jobs=jobs, command=typed(), tracker=track)
    if as_json:
        print(json.dumps(summary, indent=1))
    for cell in summary["failed"][:SHOWN_FAILURES]:
        say(f"Failed: {cell['name']}: {cell['reason']}")
    say(f"Results: {summary['results']}")
    if summary["failed"]:
        say(f"{len(summary['failed'])} of {summary['cells']} cells failed: the same command tries them again.")
        raise typer.Exit(1)


@app.command()
def show(
    out: Folder,
    metric: Annotated[str | None, typer.Option(help="Figure; default: the headline of the kind of task.")] = None,
    model: Model = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="KEY=VALUE", help="Differences of all other values of a setting from this one, in pairs."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a GitHub table on stdout.")] = False,
    as_json: AsJson = False,
) -> None:
    """Table of what the cells reached: mean and deviation over seeds; or, with --against, an ablation."""
    from fedistill.bench.tables import markdown_table
    from fedistill.study.results import SCORES, read_folder
    from fedistill.study.tables import ONCE, PAIRED, caption, cells_table, chosen, differences, figures_of, table

    about, rows = read_folder(_folder(out))
    if metric is not None and metric not in SCORES:
        raise unknown("metric", metric, SCORES)
    model = chosen(rows, "eval_model", model)
    metrics = [metric] if metric else figures_of(rows)
    metric = metrics[0]
    if against is None:
        head, body = (cells_table if as_json else table)(rows, about["varied"], metric, model)
        notes = [caption(rows, metric, model), *([ONCE] if "Trained on" in head else [])]
    else:
        key, value = next(iter(pairs([against], "--against").items()))
        head, body = differences(rows, about["varied"], key, value, metrics, model)
        notes = [PAIRED]
    failed = {row["cell"]: row["reason"] for row in rows if row["status"] == "failed"}
    left = len(about["names"]) - len({row["cell"] for row in rows})
    notes += [f"{left} cells have not run yet."] if left else []
    notes += [f"Failed: {about['names'].get(cell, cell)}: {reason}" for cell, reason in failed.items()]
    if as_json:
        lines = [dict(zip(head, line, strict=True)) for line in body]
        told = {"metric": metric, "cells": lines} if against is None else {"metrics": metrics, "pairs": lines}
        print(json.dumps({"model": model} | told | {"notes": notes}, indent=1))
    elif markdown:
        print("\n\n".join([f"**{about['title']}**", markdown_table(head, body), *notes]))
    else:
        printed = Table(box=None, title=about["title"])
        for name in head:
            printed.add_column(name, overflow="fold")
        for line in body:
            printed.add_row(*line)
        Console(markup=False, highlight=False).print(printed)
        for note in notes:
            say(note)


@app.command()
def plot(
    out: Folder,
    x: Annotated[str | None, typer.Option("--x", help="Setting across; default: the first that is varied.")] = None,
    y: Annotated[str | None, typer.Option("--y", help="Figure; default: the headline of the kind of task.")] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="Setting, trained_on or eval_model with a line per value.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", metavar="KEY=VALUE", help="Only these cells; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw one figure as SVG and PDF, and the interactive page with all of them."""
    from fedistill.study.page import write_page
    from fedistill.study.plots import axes_of, write_plots
    from fedistill.study.results import read_folder
    from fedistill.study.tables import chosen, headline

    about, rows = read_folder(_folder(out))
    chosen(rows, "eval_model", None)  # something is finished
    varied = about["varied"]
    if x is None and not varied:
        raise FedistillError("nothing-varies", "The study varies nothing: say --x trained_on, for the arms.")
    axes = axes_of(rows, varied, x=x or varied[0], y=y or headline(rows), by=by or "", where=pairs(where, "--where"))
    files = write_plots(rows, axes, about["title"], _folder(out) / "plots")
    files.append(write_page(_folder(out)))
    if as_json:
        print(json.dumps({"files": [str(path) for path in files]}, indent=1))
    else:
        for path in files:
            say(f"Wrote {path}")


def _study(name: str, data: str | None, seeds: int | None, settings: list[str] | None) -> Any:
    from fedistill.study.plan import load_study, with_changes

    given = pairs(settings)
    if data is not None:
        if "data" in given:
            raise FedistillError("given-twice", "data is given twice: keep one of --data and --set data.")
        given["data"] = data
    return with_changes(load_study(name), given, seeds)


def _folder(out: str) -> Path:
    return Path(out).expanduser().resolve()
