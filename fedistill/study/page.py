"""The page of a study: what was found at a glance, a plot whose axes can be chosen, and every cell; it needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedistill.errors import FedistillError
from fedistill.files import write_bytes
from fedistill.report import tables
from fedistill.report.curves import PALETTE
from fedistill.report.page import style
from fedistill.study.plan import ARM, shown
from fedistill.study.plots import LOGARITHMIC, NO_PRIVACY, TITLES
from fedistill.study.results import FIGURES, Row, read_folder, usable
from fedistill.study.tables import (
    PAIRED,
    arms_of,
    caption,
    cells_table,
    chosen,
    differences,
    figures_of,
    main_arm,
    spread,
)

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(folder: Path) -> Path:
    """Write `study.html` from the table of results in the folder of a study; returns its path.

    Raises `FedistillError` where there is no such table, or no cell is finished.
    """
    about, rows = read_folder(folder)
    chosen(rows, "eval_model", None)  # something is finished
    path = folder / "study.html"
    first, command = about.get("arms", [""])[0], about.get("command", "")
    text = page(about["title"], rows, about["varied"], cells=len(about["names"]), first=first, command=command)
    write_bytes(path, text)
    return path


def page(
    title: str, rows: Sequence[Row], varied: Sequence[str], *, cells: int, first: str = "", command: str = ""
) -> bytes:
    """The page of a study of so many cells, some of which may not have run yet.

    first: the arm of the study that the others are held against. command: what repeats it.
    """
    columns = [*varied, "trained_on", "eval_model"]
    figures = [name for name in FIGURES if any(row[name] is not None for row in usable(rows))]
    metric, model, arms = figures_of(rows)[0], chosen(rows, "eval_model", None), arms_of(rows)
    facts = {
        "columns": columns,
        "figures": figures,
        "first": metric if metric in figures else figures[0],
        "names": {column: TITLES.get(column, column) for column in (*columns, *figures)},
        "main": main_arm(rows),
        "arms": {arm: tables.arm_name(arm) for arm in arms},
        "colours": len(PALETTE),
        "logarithmic": LOGARITHMIC,
        "rows": [
            {name: NO_PRIVACY if name == "epsilon" and row[name] == 0 else row[name] for name in (*columns, *figures)}
            for row in usable(rows)
        ],
    }
    failed = {row["cell"]: row for row in rows if row["status"] == "failed"}
    head, body = cells_table(rows, varied, metric, model)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        style=style(),
        title=title,
        glance=_glance(rows, varied, metric, model, cells=cells),
        facts=Markup(json.dumps(facts).replace("<", "\\u003c")),  # no text of the data can end the script
        failed=[(", ".join(f"{key} {shown(row[key])}" for key in varied), row["reason"]) for row in failed.values()],
        caption=caption(rows, metric, model),
        head=head,
        body=body,
        settings=max(1, len(varied)),
        ablation=_ablation(rows, varied, first, model),
        paired=PAIRED,
        command=command,
    )
    return text.encode()


def _ablation(
    rows: Sequence[Row], varied: Sequence[str], first: str, model: str
) -> tuple[list[str], list[list[str]]] | None:
    """Every other arm of the study minus the first; None where there is one, or not both are finished."""
    if ARM not in varied:
        return None
    try:
        head, body = differences(rows, varied, ARM, first, figures_of(rows), model)
    except FedistillError:  # nothing of the first
        return None
    return (head, body) if body else None


def _glance(rows: Sequence[Row], varied: Sequence[str], metric: str, model: str, *, cells: int) -> list[dict[str, str]]:
    """What was done, the ends of what was reached, what was promised, and what was sent."""
    ours: dict[str, list[Row]] = {}
    main = main_arm(rows)
    for row in usable(rows):
        if row["eval_model"] == model and row["trained_on"] == main:
            ours.setdefault(row["cell"], []).append(row)
    done, failed = len(ours), len({row["cell"] for row in rows if row["status"] == "failed"})
    seeds = max((len({row["seed"] for row in mine}) for mine in ours.values()), default=0)
    what = f"{_count(seeds, 'seed')} each."
    what += f" Varied: {', '.join(varied)}." if varied else ""
    what += f" {_count(failed, 'cell')} failed." if failed else ""
    found = {cell: spread([row[metric] for row in mine]) for cell, mine in ours.items()}
    known = {cell: value for cell, value in found.items() if value["mean"] is not None}
    ends = [min(known, key=_mean_in(known)), max(known, key=_mean_in(known))] if known else []
    words = [f"{tables.score(known[cell])} with {_name(ours[cell][0], varied)}" for cell in ends]
    promised = [row["release_epsilon"] for mine in ours.values() for row in mine]
    epsilons = [epsilon for epsilon in promised if epsilon is not None]
    open_cells = sum(any(row["release_epsilon"] is None for row in mine) for mine in ours.values())
    sent = [mean for mine in ours.values() if (mean := spread([r["upload_bytes"] for r in mine])["mean"]) is not None]
    private = f"epsilon {_range(epsilons, 'g')}" if epsilons else "No formal guarantee"
    return [
        {"title": "What was done", "figure": f"{done} of {_count(cells, 'cell')}", "more": what},
        {
            "title": f"How good: {tables.spoken(metric)}",
            "figure": " to ".join(dict.fromkeys(tables.score(known[cell]["mean"]) for cell in ends)) or tables.MISSING,
            "more": f"Distilled union, lowest and highest cell: {'; '.join(words)}. The highest of many is partly luck."
            if words
            else "",
        },
        {
            "title": "How private",
            "figure": private,
            "more": f"{_count(open_cells, 'cell')} without a formal guarantee." if open_cells else "What the merged sets promise.",
        },
        {
            "title": "How much was sent",
            "figure": " to ".join(dict.fromkeys(map(tables.size, (min(sent), max(sent))))) if sent else tables.MISSING,
            "more": "By all sites of a cell together.",
        },
    ]  # fmt: skip


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number != 1 else "")


def _mean_in(known: Mapping[str, Mapping[str, Any]]) -> Any:
    return lambda cell: known[cell]["mean"]


def _name(row: Row, varied: Sequence[str]) -> str:
    return ", ".join(f"{key} {shown(row[key])}" for key in varied) or "these settings"


def _range(values: Iterable[float], form: str) -> str:
    found = list(values)
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(found), max(found))))
