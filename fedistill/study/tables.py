"""The figures of a study for people: a row per cell, means over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedistill.bench.tables import paired
from fedistill.config import Config
from fedistill.errors import FedistillError, unknown
from fedistill.evaluation.comparators import PRIVATE
from fedistill.evaluation.metrics import mean_std
from fedistill.report.tables import SHOWN, arm_name, arms_in_order, score, size, without_rounds, yardsticks
from fedistill.study.plan import shown
from fedistill.study.results import SCORES, Row, usable

NOTHING = "–"
MOST = 7  # arms that a line has room for
ONCE = "An arm that is the same in several cells stands with the first."
PAIRED = (
    "Mean ± standard error over pairs of cell and seed that differ in nothing else (how many); the distilled union."
)
OF_DATA = tuple(f.name for f in fields(Config) if f.metadata["scope"] == "data")


def figures_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """What is shown of the kind of task, the headline first; where kinds are mixed, the one that all have."""
    kinds = {row["kind"] for row in usable(rows)}
    return SHOWN[kinds.pop()] if len(kinds) == 1 else ("balanced_accuracy",)


def headline(rows: Sequence[Row]) -> str:
    """The figure on which the kind of task is compared."""
    return figures_of(rows)[0]


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
    body = []
    for mine in _by_cell(rows).values():
        names, judged = _named(mine[0], varied), _judged(mine, model)
        if not judged:
            body.append([*names, *(["failed"] * len(arms)), NOTHING, "0"])
            continue
        figures = [score(spread([row[metric] for row in judged if row["trained_on"] == arm])) for arm in arms]
        sent = spread([row["upload_bytes"] for row in judged if row["trained_on"] == main])
        body.append([*names, *figures, size(sent), str(len({row["seed"] for row in judged}))])
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
    arms = arms_of(rows)
    body: dict[Any, list[str]] = {}
    for cell, mine in _by_cell(rows).items():
        names, judged = _named(mine[0], varied), _judged(mine, model)
        if not judged:
            body[cell] = [*names, NOTHING, "failed", NOTHING, "0"]
        for arm in arms:
            found = [row for row in judged if row["trained_on"] == arm]
            if found:
                scores, sent = [row[metric] for row in found], [row["upload_bytes"] for row in found]
                line = [*names, arm_name(arm), score(spread(scores)), size(spread(sent)), str(len(found))]
                body.setdefault((arm, *map(identity, found)), line)
    return [*(varied or ["cell"]), "Trained on", SCORES[metric], "Upload", "n"], list(body.values())


def identity(row: Row) -> tuple[Any, ...]:
    """Rows of one arm in several cells are the same one where this is equal.

    What is distilled, or has noise of its own, is the cell's alone, whatever it reached. The rest may be of the same data and the
    same training, and then all its figures agree, not only one that ends at chance in both cells.
    """
    arm = row["trained_on"]
    if arm.startswith(PRIVATE) or "distilled" in without_rounds(arm)[0]:
        return (row["cell"],)
    return tuple(row.get(name) for name in (*OF_DATA, "eval_model", *SCORES, "images", "upload_bytes", "after_rounds"))


def differences(
    rows: Sequence[Row], varied: Sequence[str], column: str, base: str, metrics: Sequence[str], model: str
) -> tuple[list[str], list[list[str]]]:
    """Head and body of an ablation: every other value of `column` minus `base`, in each of `metrics` of the union, as mean ±
    standard error over the pairs of cell and seed that differ in nothing else, and how many there are.

    Raises `FedistillError` on a column that is not varied, and a value that is not in it or of which nothing is finished.
    """
    if column not in varied:
        raise unknown("setting that the study varies", column, varied)
    union = main_arm(rows)
    judged = [row for row in _judged(rows, model) if row["trained_on"] == union]
    if base not in (known := list(dict.fromkeys(shown(row[column]) for row in rows))):
        raise unknown(f"value of {column}", base, known)
    values = list(dict.fromkeys(shown(row[column]) for row in judged))
    if base not in values:
        raise FedistillError("no-results", f"No cell with {column} {base} is finished.")

    def place(row: Row) -> tuple[Any, ...]:
        return (row["seed"], *(row[key] for key in varied if key != column))

    bases = {place(row): row for row in judged if shown(row[column]) == base}
    body = []
    for value in (value for value in values if value != base):
        both = [(row, bases[place(row)]) for row in judged if shown(row[column]) == value and place(row) in bases]
        each = [[one[m] - other[m] for one, other in both if None not in (one[m], other[m])] for m in metrics]
        body.append([f"{value} − {base}", *map(paired, each)])
    return [column, *(SCORES[metric] for metric in metrics)], body


def _by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cell"], []).append(row)
    return found


def _judged(rows: Sequence[Row], model: str) -> list[Row]:
    return [row for row in usable(rows) if row["eval_model"] == model]


def _named(row: Row, varied: Sequence[str]) -> list[str]:
    return [shown(row[key]) for key in varied] or [row["cell"]]


def spread(values: Sequence[float | None]) -> Mapping[str, Any]:
    """Mean and deviation of the figures that there are."""
    return mean_std(list(values))


def caption(rows: Sequence[Row], metric: str, model: str) -> str:
    said = f"{SCORES[metric]} of a {model} trained on each; ± is the standard deviation over n seeds."
    return f"{said} {yardsticks(arms_of(rows))}".strip()
