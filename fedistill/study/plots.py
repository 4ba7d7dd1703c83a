"""Figures of a study: one figure over one setting, a line per value of the others, as SVG and PDF."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedistill.bench.plots import DASHES, MARKERS, vector
from fedistill.errors import FedistillError, unknown
from fedistill.files import write_bytes
from fedistill.report.curves import PALETTE
from fedistill.report.tables import arm_name, without_rounds
from fedistill.study.plan import shown
from fedistill.study.results import FIGURES, SCORES, Row, usable
from fedistill.study.tables import identity, main_arm, models_of, spread

TITLES = SCORES | {
    "images": "Images trained on",
    "upload_bytes": "Bytes sent by all sites",
    "after_rounds": "Rounds",
    "release_epsilon": "Epsilon of the release",
    "release_delta": "Delta of the release",
    "seconds": "Seconds of training global models",
    "seconds_experts": "Seconds of experts, all sites",
    "seconds_distil": "Seconds of distillation, all sites",
    "cell_seconds": "Seconds of the whole cell",
    "ipc": "Images per class and site",
    "sites": "Sites",
    "alpha": "Concentration of the partition",
    "rounds": "Federated rounds",
    "epsilon": "Privacy budget of a site (epsilon)",
    "method": "Method",
    "trained_on": "Trained on",
    "eval_model": "Global model",
}
NO_PRIVACY = "no privacy"
# Figures of an arm that go across like a setting: a line has a point for every number of rounds after which the arm was judged.
GROWING = ("upload_bytes", "after_rounds")
FAMILY = "family"  # the arms that differ in that number only
BESIDE = 8  # lines whose names stand beside a plot; those of more stand below it
LOGARITHMIC = 10  # positive values that span this factor get a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plot: the figures of all seeds at each value of the axis."""

    name: str
    points: Mapping[Any, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a plot shows. by: the columns whose values make the lines. where: what rows must have in other columns."""

    x: str
    y: str
    by: tuple[str, ...]
    where: Mapping[str, Any]


def axes_of(rows: Sequence[Row], varied: Sequence[str], *, x: str, y: str, by: str, where: Mapping[str, Any]) -> Axes:
    """The axes that are asked for. by: "" for all settings that are varied besides `x` and `where`.

    Raises `FedistillError` on columns or values that the results do not have, and where a setting varies that none of the axes
    shows: a mean over it would be of different things.
    """
    columns = [*varied, "trained_on", "eval_model"]
    families = [FAMILY] if x in GROWING else []
    for column, known in ((x, [*columns, *GROWING]), (by or x, [*columns, *GROWING, *families])):
        if column not in known:
            raise unknown("column of the study", column, known)
    for column in where:
        if column not in columns:
            raise unknown("column of the study", column, columns)
    if y not in FIGURES:
        raise unknown("figure", y, FIGURES)
    if by == x:
        raise FedistillError("bad-value", f"--x {x} and --by {by} are the same: choose two.")
    said: dict[str, Any] = {}
    for column, text in where.items():
        found = {shown(row[column]): row[column] for row in usable(rows)}
        if text not in found:
            raise unknown(f"value of {column}", str(text), found)
        said[column] = found[text]
    shown_by = (by,) if by else tuple(key for key in varied if key != x and key not in said)
    if x in GROWING and not by and "trained_on" not in said:
        shown_by += (FAMILY,)
    for column, values in (("trained_on", [main_arm(rows)]), ("eval_model", models_of(rows))):
        if column == "trained_on" and FAMILY in (*shown_by, *said):
            continue
        if column not in (x, *shown_by, *said) and values:
            said[column] = values[0]
    left = [key for key in varied if key not in (x, *shown_by, *said)]
    if left:
        raise FedistillError("ambiguous", f"{left[0]} varies, too: choose one value with --where {left[0]}=VALUE.")
    return Axes(x=x, y=y, by=shown_by, where=said)


def lines_of(rows: Sequence[Row], axes: Axes) -> list[Line]:
    """The lines of a plot in the order of the results. Among families, what several cells share (an arm on real images) is one
    line, and one that has no like is called by its family alone."""
    found: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    marks: dict[tuple[Any, ...], list[Any]] = {}
    for row in grown(usable(rows), axes.x) if axes.x in GROWING else usable(rows):
        if row[axes.y] is None or any(row[key] != value for key, value in axes.where.items()):
            continue
        line = tuple(row[key] for key in axes.by)
        found.setdefault(line, {}).setdefault(row[axes.x], []).append(row[axes.y])
        if FAMILY in axes.by:
            marks.setdefault(line, []).append(identity(row))
    if FAMILY not in axes.by:
        return [Line(name=_name(axes.by, key), points=points) for key, points in found.items()]
    place = axes.by.index(FAMILY)
    once: dict[Any, tuple[Any, ...]] = {}
    for key in found:
        once.setdefault((key[place], *marks[key]), key)
    alike = Counter(key[place] for key in once.values())
    return [
        Line(name=arm_name(key[place]) if alike[key[place]] == 1 else _name(axes.by, key), points=found[key])
        for key in once.values()
    ]


def grown(rows: Sequence[Row], x: str) -> list[Row]:
    """The rows with their family, and the mean of `x` over seeds as its value; 0 where nothing is sent."""
    same: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        same.setdefault((row["cell"], row["eval_model"], row["trained_on"]), []).append(row)
    return [
        row | {x: sum(each[x] or 0 for each in group) / len(group), FAMILY: without_rounds(row["trained_on"])[0]}
        for group in same.values()
        for row in group
    ]


def write_plots(rows: Sequence[Row], axes: Axes, title: str, folder: Path) -> list[Path]:
    """The plot in `folder` as SVG and as PDF. Raises `FedistillError` where there is nothing to draw."""
    lines = lines_of(rows, axes)
    if not lines:
        raise FedistillError("no-results", f"No finished cell has a figure {axes.y} there.")
    name = "-".join([axes.y, "over", axes.x, *(["by", *axes.by] if axes.by else [])])
    name += "".join(f"-{shown(v)}" for k, v in axes.where.items() if k not in ("trained_on", "eval_model"))
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    figure = draw(lines, axes, title)
    paths = [folder / f"{name}.{format}" for format in ("svg", "pdf")]
    for path in paths:
        write_bytes(path, vector(figure, path.suffix[1:]))
    return paths


def draw(lines: Sequence[Line], axes: Axes, title: str) -> Any:
    """The plot as a matplotlib figure: colour, marker and dash of every line differ, so that it can be read without colour."""
    from matplotlib.figure import Figure  # takes a second to import; without pyplot, no window system is touched

    below = len(lines) > BESIDE
    height = 3.1 + (0.2 * math.ceil(len(lines) / 2) + 0.3 if below else 0.0)
    figure = Figure(figsize=(7.2 if below else 5.6 if axes.by else 4.2, height), layout="constrained")
    panel = figure.subplots()
    values = list(dict.fromkeys(x for line in lines for x in line.points if not _open(axes, x)))
    numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
    if numeric:
        values.sort()
    drawn: dict[str, Any] = {}
    for k, line in enumerate(lines):
        style: dict[str, Any] = {
            "color": PALETTE[k % len(PALETTE)],
            "marker": MARKERS[k % len(MARKERS)],
            "linestyle": DASHES[(k + k // len(PALETTE)) % len(DASHES)],
            "markersize": 4.5,
            "linewidth": 1.3,
        }
        there = [x for x in values if x in line.points]
        if there:
            step = min(0.15, 0.6 / len(lines))
            places = there if numeric else [values.index(x) + (k - (len(lines) - 1) / 2) * step for x in there]
            found = [spread(line.points[x]) for x in there]
            means, widths = [f["mean"] for f in found], [f["std"] or 0.0 for f in found]
            if numeric and len(there) > 1:
                (drawn[line.name],) = panel.plot(places, means, **style)
                low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
                panel.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
            else:
                style["linestyle"] = "none"
                drawn[line.name] = panel.errorbar(places, means, yerr=widths, capsize=2.5, **style)
        for x in line.points:
            if _open(axes, x):
                mean = spread(line.points[x])
                whole = {key: style[key] for key in ("color", "linewidth")}
                name = ", ".join(filter(None, [line.name, NO_PRIVACY if axes.x == "epsilon" else ""]))
                drawn[name] = panel.axhline(mean["mean"], linestyle=(0, (6, 3, 1, 3)), **whole)
                width = mean["std"] or 0.0
                panel.axhspan(mean["mean"] - width, mean["mean"] + width, color=style["color"], alpha=0.1, linewidth=0)
    if numeric and values and values[0] > 0 and values[-1] / values[0] >= LOGARITHMIC:
        panel.set_xscale("log")
    if axes.x != "upload_bytes":  # which are many, and no round numbers
        panel.set_xticks(values if numeric else range(len(values)), [shown(x) for x in values], minor=False)
        panel.set_xticks([], minor=True)
    panel.set_xlabel(TITLES.get(axes.x, axes.x))
    panel.set_ylabel(_measured(axes))
    figure.suptitle(textwrap.fill(title, 70 if axes.by else 50), fontsize="medium")
    panel.grid(alpha=0.25)
    if len(drawn) > 1 or axes.by:
        place: dict[str, Any] = (
            {"loc": "outside lower center", "ncols": 2} if below else {"loc": "outside right center"}
        )
        figure.legend(list(drawn.values()), list(drawn), frameon=False, fontsize="small", **place)
    return figure


def _name(by: Sequence[str], values: Sequence[Any]) -> str:
    words = []
    for key, value in zip(by, values, strict=True):
        if key in ("trained_on", FAMILY):
            words.append(arm_name(value))
        else:
            words.append(shown(value) if isinstance(value, str) else f"{key} {shown(value)}")
    return ", ".join(words)


def _open(axes: Axes, x: Any) -> bool:
    """Whether a value of the axis is that of runs without privacy, which have no epsilon, or of arms that send nothing: a line
    across."""
    return axes.x in ("epsilon", *GROWING) and x == 0


def _measured(axes: Axes) -> str:
    """What the vertical axis shows, and of which model."""
    title = TITLES.get(axes.y, axes.y)
    if axes.y not in SCORES:
        return title
    about = [arm_name(axes.where["trained_on"])] if "trained_on" in axes.where else []
    about += [axes.where["eval_model"]] if "eval_model" in axes.where else []
    return title + (f"\n({', '.join(about)})" if about else "")
