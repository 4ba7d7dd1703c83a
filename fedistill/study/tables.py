"""The figures of a study for people: a row per cell, means over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedistill.errors import FedistillError, unknown
from fedistill.evaluation.metrics import mean_std
from fedistill.report.tables import METRICS, SHOWN, arm_name, arms_in_order, score, size
from fedistill.study.plan import shown
from fedistill.study.results import VALIDATED, Row, usable

NOTHING = "–"
SCORES = METRICS | VALIDATED
MOST = 7  # arms that a line has room for
ONCE = "An arm that is the same in several cells stands with the first."


def headline(rows: Sequence[Row]) -> str:
    """The figure on which the kind of task is compared; where kinds are mixed, the one that all have."""
    kinds = {row["kind"] for row in usable(rows)}
    return SHOWN[kinds.pop()][0] if len(kinds) == 1 else "balanced_accuracy"


def models_of(rows: Sequence[Row]) -> list[str]:
    """The architectures of the global models, that of the headline first."""
    return list(dict.fromkeys(row["eval_model"] for row in usable(rows)))


def arms_of(rows: Sequence[Row]) -> list[str]:
    """What global models were trained on, in the order of every report."""
    return [key for key, _ in arms_in_order({row["trained_on"]: {} for row in usable(rows)})]


def main_arm(rows: Sequence[Row]) -> str:
    """The arm that a study is about: the union of the last round."""
    arms = arms_of(rows)
    return "distilled" if "distilled" in arms or not arms else arms[0]


def chosen(rows: Sequence[Row], column: str, value: str | None) -> str:
    """`value`, which must be in the column; or else the first that is. Raises `FedistillError` on another."""
    known = models_of(rows) if column == "eval_model" else arms_of(rows)
    if not known:
        raise FedistillError("no-results", "No cell of the study is finished yet.")
    if value is not None and value not in known:
        raise unknown(column.replace("_", " "), value, known)
    return known[0] if value is None else value


def cells_table(
    rows: Sequence[Row], varied: Sequence[str], metric: str, model: str
) -> tuple[list[str], list[list[str]]]:
    """Head and body: what each cell varies, `metric` of every arm as mean ± deviation over seeds, upload, number of seeds."""
    arms, main = arms_of(rows), main_arm(rows)
    head = [*(varied or ["cell"]), *map(arm_name, arms), "Upload", "n"]
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(row["cell"], []).append(row)
    body = []
    for mine in by_cell.values():
        names = _named(mine[0], varied)
        mine = [row for row in usable(mine) if row["eval_model"] == model]
        if not mine:
            body.append([*names, *(["failed"] * len(arms)), NOTHING, "0"])
            continue
        figures = [score(spread([row[metric] for row in mine if row["trained_on"] == arm])) for arm in arms]
        sent = spread([row["upload_bytes"] for row in mine if row["trained_on"] == main])
        body.append([*names, *figures, size(sent), str(len({row["seed"] for row in mine}))])
    return head, body


def table(rows: Sequence[Row], varied: Sequence[str], metric: str, model: str) -> tuple[list[str], list[list[str]]]:
    """`cells_table`, or of many arms a line for each of every cell."""
    return (arms_table if len(arms_of(rows)) > MOST else cells_table)(rows, varied, metric, model)


def arms_table(
    rows: Sequence[Row], varied: Sequence[str], metric: str, model: str
) -> tuple[list[str], list[list[str]]]:
    """Head and body: what each cell varies, an arm, `metric` as mean ± deviation over seeds, upload, number of seeds.

    An arm that is the same in several cells, as those on real images are, stands with the first (`ONCE`).
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in usable(rows):
        if row["eval_model"] == model:
            found.setdefault((row["cell"], row["trained_on"]), []).append(row)
    body: dict[tuple[str, ...], list[str]] = {}
    arms = arms_of(rows)
    for cell in dict.fromkeys(row["cell"] for row in rows):
        mine = [(arm, found[cell, arm]) for arm in arms if (cell, arm) in found]
        if not mine:
            failed = next(row for row in rows if row["cell"] == cell)
            body[(cell,)] = [*_named(failed, varied), NOTHING, "failed", NOTHING, "0"]
        for arm, seeds in mine:
            figures = [
                score(spread([row[metric] for row in seeds])),
                size(spread([row["upload_bytes"] for row in seeds])),
            ]
            line = [arm_name(arm), *figures, str(len(seeds))]
            body.setdefault(tuple(line), [*_named(seeds[0], varied), *line])
    return [*(varied or ["cell"]), "Trained on", SCORES[metric], "Upload", "n"], list(body.values())


def _named(row: Row, varied: Sequence[str]) -> list[str]:
    return [shown(row[key]) for key in varied] or [row["cell"]]


def spread(values: Sequence[float | None]) -> Mapping[str, Any]:
    """Mean and deviation of the figures that there are."""
    return mean_std(list(values))


def caption(metric: str, model: str) -> str:
    return f"{SCORES[metric]} of a {model} trained on each; ± is the standard deviation over n seeds."
