"""Charts as small inline SVG: text in `currentColor`, series in the page's `--s0`.. with fixed fallbacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedistill.report.tables import METRICS, MISSING, arm_name, arms_in_order, between, kind_of, mean_of, score, std_of

# Okabe and Ito's colours in the order of their contrast; the page brightens or darkens them to suit its background.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # a second sign beside colour
WIDTH = 320  # user units; narrow, so that the text stays legible on a telephone
LETTERS = 44  # that fit into one line
POINTS = 150  # a longer curve is drawn as the means of this many stretches

Curve = Sequence[tuple[int, float]]


def loss_chart(curves: Mapping[str, Curve], title: str, top: float = 0.0) -> str:
    """Matching loss against iteration, one line per site, as an SVG string.

    curves: (iteration, loss) of each site; losses that are not finite are left out.
    top: largest loss of the axis, for charts that are to be compared; 0: from these curves.
    """
    lines = {name: thin(curve) for name, curve in curves.items()}
    lines = {name: line for name, line in lines.items() if line}
    top = top or highest(curves)
    last = max((x for line in lines.values() for x, _ in line), default=1) or 1
    left, plot_top, plot_width, plot_height = 40, 24, WIDTH - 52, 150
    bottom = plot_top + plot_height
    parts = [_text(left, 14, "matching loss", anchor="start")]
    for value in ticks(top):
        y = bottom - plot_height * value / top
        parts += [_grid(left, y, left + plot_width, y), _text(left - 6, y + 4, f"{value:g}", anchor="end")]
    for value in ticks(last):
        x = left + plot_width * value / last
        parts.append(_text(x, bottom + 16, f"{value:,.0f}", anchor="end" if value == last else "middle"))
    parts.append(_text(left + plot_width / 2, bottom + 33, "iteration"))
    for k, line in enumerate(lines.values()):
        path = " ".join(
            f"{left + plot_width * x / last:.1f},{bottom - plot_height * min(y, top) / top:.1f}" for x, y in line
        )
        parts.append(f'<polyline points="{path}" fill="none" {_stroke(k)}/>')
    height = bottom + 42
    if len(lines) > 1:
        for k, name in enumerate(lines):
            x, y = left + k % 2 * plot_width / 2, height + k // 2 * 20
            parts += [f'<line x1="{x:.1f}" y1="{y + 6}" x2="{x + 26:.1f}" y2="{y + 6}" {_stroke(k)}/>']
            parts += [_text(x + 32, y + 10, _cut(name, 13), anchor="start")]
        height += -(-len(lines) // 2) * 20
    ends = "; ".join(f"{name} from {line[0][1]:.3f} to {line[-1][1]:.3f}" for name, line in lines.items())
    return _svg(title, ends or "no figures", height, parts)


def arms_chart(summary: Mapping[str, Any], metric: str) -> str:
    """One dot per arm on an axis from 0 to 1, with a bar of one deviation to each side, as an SVG string.

    metric: a key of `tables.METRICS`. A dotted line marks chance where it is known (balanced accuracy: `1 / K`, of findings
    one half, as is AUC).
    """
    arms = list(arms_in_order(summary.get("arms") or {}))
    dots = []
    for key, arm in arms:
        mean, std = mean_of(arm.get(metric)), std_of(arm.get(metric)) or 0.0
        ends = None if mean is None else (mean - std, mean, mean + std)
        dots.append((arm_name(key, arm.get("rounds")), score(arm.get(metric)), ends))
    return _dots(f"{METRICS[metric]} of each arm", dots, chance=_chance(summary, metric), coloured=True)


def recall_chart(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """One dot per class on an axis from 0 to 1, with its interval as a bar, as an SVG string.

    rows: `name`, `share` and `interval` of each class; both None where no image of it was counted.
    """
    dots = []
    for row in rows:
        known = row["share"] is not None and row["interval"]
        ends = (row["interval"][0], row["share"], row["interval"][1]) if known else None
        dots.append((row["name"], f"{score(row['share'])} ({between(row['interval'])})" if known else MISSING, ends))
    return _dots(title, dots)


def reliability_chart(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Share of right answers against confidence, bin by bin, over a histogram of the answers, as an SVG string.

    rows: `from`, `to`, `count`, `confidence`, `accuracy` and `interval` of every bin. On the dashed line a network is as often
    right as it is sure; below it, it is too sure of itself.
    """
    left, top, side, low, gap = 44, 22, WIDTH - 60, 46, 14
    bottom, floor = top + side, top + side + gap + low
    parts = [_text(left - 32, 13, "share of answers that are right", anchor="start")]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + side * value, bottom - side * value
        parts += [_grid(x, top, x, bottom), _grid(left, y, left + side, y)]
        parts += [_text(left - 6, y + 4, f"{value:g}", anchor="end"), _text(x, floor + 16, f"{value:g}")]
    parts.append(_text(left + side / 2, floor + 33, "confidence; below: number of answers"))
    parts.append(
        f'<path d="M{left} {bottom}L{left + side} {top}" stroke="currentColor" stroke-dasharray="5 4" fill="none"/>'
    )
    most = max((row["count"] for row in rows), default=0) or 1
    line = []
    for row in rows:
        x, width, height = left + side * row["from"], side * (row["to"] - row["from"]), low * row["count"] / most
        parts.append(
            f'<rect x="{x + 1.5:.1f}" y="{floor - height:.1f}" width="{width - 3:.1f}" height="{height:.1f}" '
            f'fill-opacity="0.55" style="fill:{_colour(0)}"/>'
        )
        if row["confidence"] is None:
            continue
        x, y = left + side * row["confidence"], bottom - side * row["accuracy"]
        line.append(f"{x:.1f},{y:.1f}")
        if row["interval"]:
            ends = [bottom - side * end for end in row["interval"]]
            parts.append(
                f'<path d="M{x - 4:.1f} {ends[0]:.1f}h8M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}M{x - 4:.1f} {ends[1]:.1f}h8" '
                f'stroke-width="1.5" fill="none" style="stroke:{_colour(0)}"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" style="fill:{_colour(0)}"/>')
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke-width="2" style="stroke:{_colour(0)}"/>')
    parts.append(_grid(left, floor, left + side, floor))
    told = [f"confidence {score(r['confidence'])}, right {score(r['accuracy'])}" for r in rows if r["count"]]
    return _svg(title, "; ".join(told) or "no figures", floor + 40, parts)


def _dots(
    title: str,
    rows: Sequence[tuple[str, str, tuple[float, float, float] | None]],
    *,
    chance: float | None = None,
    coloured: bool = False,
) -> str:
    """One dot with a bar per row on an axis from 0 to 1. rows: name, figure in words, and low end, value and high end."""
    left, plot_width = 12, WIDTH - 24
    # a name that does not fit beside its figure has a line of its own
    heights = [44 if len(name) + len(figure) <= LETTERS - 2 else 62 for name, figure, _ in rows]
    bottom = 8 + sum(heights)
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + plot_width * value
        parts += [_grid(x, 8, x, bottom), _text(x, bottom + 16, f"{value:g}")]
    if chance:
        x = left + plot_width * chance
        parts.append(f'<path d="M{x:.1f} 8V{bottom}" stroke="currentColor" stroke-dasharray="2 3" fill="none"/>')
        parts.append(_text(x, bottom + 31, "chance"))
    for k, (name, figure, ends) in enumerate(rows):
        y = 8 + sum(heights[:k])
        parts.append(_text(left, y + 15, _cut(name, LETTERS), anchor="start", halo=True))
        y += heights[k] - 44
        parts.append(_text(left + plot_width, y + 15, figure, anchor="end", halo=True))
        if ends is None:
            continue
        colour, y = _colour(k if coloured else 0), y + 29
        low, x, high = (left + plot_width * min(max(v, 0.0), 1.0) for v in ends)
        parts.append(
            f'<path d="M{low:.1f} {y - 5}v10M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 5}v10" '
            f'stroke-width="2" fill="none" style="stroke:{colour}"/>'
        )
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" style="fill:{colour}"/>')
    told = "; ".join(f"{name} {figure}" for name, figure, _ in rows)
    return _svg(title, told or "no figures", bottom + (38 if chance else 24), parts)


def _chance(summary: Mapping[str, Any], metric: str) -> float | None:
    classes = len((summary.get("data") or {}).get("class_names") or [])
    if metric == "auc" or (metric == "balanced_accuracy" and kind_of(summary) == "multilabel"):
        return 0.5
    return 1 / classes if metric == "balanced_accuracy" and classes > 1 else None


def thin(curve: Curve) -> list[tuple[float, float]]:
    """At most `POINTS` points: the finite ones, or the means of equally long stretches of them."""
    points = [(float(x), float(y)) for x, y in curve if math.isfinite(y)]
    stretch = -(-len(points) // POINTS) or 1
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def highest(curves: Mapping[str, Curve]) -> float:
    """The largest loss that would be drawn; 1 where there is none."""
    return max((y for curve in curves.values() for _, y in thin(curve)), default=0.0) or 1.0


def ticks(top: float) -> list[float]:
    """Round values from 0 to `top`, three to six of them."""
    step = 10.0 ** math.floor(math.log10(top))
    step *= next(f for f in (0.2, 0.25, 0.5, 1.0, 2.0) if top / (step * f) <= 5.0)
    return [round(i * step, 10) for i in range(int(top / step * (1 + 1e-9)) + 1)]


def _svg(title: str, told: str, height: float, parts: Sequence[str]) -> str:
    label = escape(f"{title}: {told}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}" '
        f'font-family="sans-serif" font-size="13"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", halo: bool = False) -> str:
    # A halo in the colour of the page keeps a label legible where a grid line runs through it.
    style = ' style="paint-order:stroke;stroke:var(--card,none);stroke-width:4px"' if halo else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="currentColor" stroke-opacity="0.2"/>'


def _colour(k: int) -> str:
    return f"var(--s{k % len(PALETTE)},{PALETTE[k % len(PALETTE)]})"


def _stroke(k: int) -> str:
    # The dash changes with every series and again with every turn of the palette, so that no two of 24 are alike.
    dash = DASHES[(k + k // len(PALETTE)) % len(DASHES)]
    return f'stroke-width="2" stroke-linejoin="round" stroke-dasharray="{dash or "none"}" style="stroke:{_colour(k)}"'


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
