"""Accuracy against what a set costs, from the rows of `results.csv`: one panel per data set, a line per method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedistill.bench.results import Row, kind_of
from fedistill.bench.suite import WHOLE
from fedistill.bench.tables import figures, methods_of, models_of, places_of
from fedistill.evaluation.metrics import mean_std
from fedistill.files import write_bytes
from fedistill.report.curves import PALETTE
from fedistill.report.tables import SHOWN, spoken

COSTS = {"images": "images in the set", "upload_bytes": "bytes of the set"}
MARKERS = "osD^vP*"
DASHES = ("-", "--", ":")  # colour, marker and dash together tell more methods apart than there are colours


def write_plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """`accuracy-by-images.svg` and `accuracy-by-bytes.svg` in `out`; nothing where there is nothing to draw."""
    drawn = [row for row in rows if row["status"] == "ok" and row["model"] == models_of(rows)[0]]
    if not methods_of(drawn):
        return []
    paths = [out / "accuracy-by-images.svg", out / "accuracy-by-bytes.svg"]
    for path, cost in zip(paths, COSTS, strict=True):
        write_bytes(path, _plot(drawn, cost))
    return paths


def _plot(rows: Sequence[Row], cost: str) -> bytes:
    # matplotlib takes a second to import; without pyplot, no window system is touched
    from matplotlib.figure import Figure

    sets = sorted({row["data"] for row in rows})
    methods = methods_of(rows)
    figure = Figure(figsize=(4 * len(sets) + 2.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    lines = {}
    metrics = [SHOWN[kind_of(rows, data)][0] for data in sets]
    for panel, data, metric in zip(panels, sets, metrics, strict=True):
        for k, method in enumerate(methods):
            points = [(ipc, figures(rows, data, ipc, method, metric)) for d, ipc in places_of(rows) if d == data]
            drawn = [
                (_mean_cost(rows, data, ipc, method, cost), mean_std(list(f.values.values())))
                for ipc, f in points
                if f.values and figures(rows, data, ipc, method, cost).values  # an arm that is no set has no images
            ]
            if not drawn:
                continue
            x, both = zip(*sorted(drawn, key=lambda point: point[0]), strict=True)
            lines[method] = panel.errorbar(
                x,
                [b["mean"] for b in both],
                yerr=[b["std"] or 0.0 for b in both],
                color=PALETTE[k % len(PALETTE)],
                marker=MARKERS[k % len(MARKERS)],
                linestyle=DASHES[k // len(PALETTE) % len(DASHES)],
                markersize=4,
                capsize=2,
                linewidth=1.2,
            )
        whole = mean_std(list(figures(rows, data, 0, WHOLE, metric).values.values()))
        if whole["mean"] is not None:
            lines[WHOLE] = panel.axhline(whole["mean"], color="0.35", linewidth=1, linestyle=(0, (6, 3)))
            spread = whole["std"] or 0.0
            panel.axhspan(whole["mean"] - spread, whole["mean"] + spread, color="0.35", alpha=0.12, linewidth=0)
        panel.set(title=data, xlabel=COSTS[cost], xscale="log")
        there = [ipc for d, ipc in places_of(rows) if d == data and ipc]
        costs = ([c for m in methods if (c := _mean_cost(rows, data, ipc, m, cost))] for ipc in there)
        budgets = [found[0] for found in costs if found]
        panel.set_xticks(budgets, [f"{b:,.0f}" for b in budgets], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.25)
    for place, (panel, metric) in enumerate(zip(panels, metrics, strict=True)):
        if place == 0 or metric != metrics[place - 1]:
            panel.set_ylabel(f"{spoken(metric)} ({models_of(rows)[0]})")
    figure.legend(list(lines.values()), list(lines), loc="outside right center", frameon=False, fontsize="small")
    return vector(figure, "svg")


def vector(figure: Any, format: str) -> bytes:
    """A figure as "svg" or "pdf": the same figure gives the same bytes, and text stays text."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedistill", "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=format, metadata={"Date" if format == "svg" else "CreationDate": None})
    return buffer.getvalue()


def _mean_cost(rows: Sequence[Row], data: str, ipc: int, method: str, cost: str) -> float:
    values = figures(rows, data, ipc, method, cost).values
    return sum(values.values()) / max(1, len(values))
