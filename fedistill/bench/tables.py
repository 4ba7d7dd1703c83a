"""`tables.md` from the rows of `results.csv`, and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fedistill.bench.results import OF_FINDINGS, OF_GRADES, Row, kind_of
from fedistill.bench.suite import WHOLE
from fedistill.evaluation.metrics import mean_std
from fedistill.report.tables import METRICS, SHOWN, score

RANDOM = "random"  # real images of the same number: the yardstick of IOR
SCORES = {
    **{name: METRICS[name] for name in SHOWN["multiclass"]},
    "val_balanced_accuracy": "Balanced accuracy on validation",
    "val_auc": "AUC on validation",
    **{name: METRICS[name] for name in ("qwk", "mae")},
    "val_qwk": "QWK on validation",
    "map": METRICS["map"],
    "val_map": "mAP on validation",
}
PAIRED = ("balanced_accuracy", "auc", "val_balanced_accuracy", "qwk", "val_qwk", "map", "val_map")
# What a difference is one of, for recovery and gain: accuracy as in the literature, where that means something.
GAINED = {"multiclass": "accuracy", "ordinal": "qwk", "multilabel": "auc"}
NOTHING = "–"


@dataclass(frozen=True)
class Figures:
    """The values of one method at one place of a table, by seed; and how many seeds failed."""

    values: dict[int, float]
    failed: int

    @property
    def mean(self) -> float | None:
        return mean_std(list(self.values.values()))["mean"]


def markdown(rows: Sequence[Row]) -> str:
    """All tables: every metric with every model, recovery, gain over random images, paired comparisons, failures."""
    parts = ["# Benchmark", _about(rows)]
    for model in models_of(rows):
        mine = [row for row in rows if row["model"] == model]
        parts.append(f"## Networks: {model}")
        shown = _shown_of(mine)
        for metric in shown:
            parts += [f"### {SCORES[metric]}", score_table(mine, metric)]
        parts += [
            "### Recovery of all real images (HLR)",
            "Accuracy of training on all real images minus accuracy of training on the set, of the same seed: lower is better."
            + _gained(mine),
            difference_table(mine, _recovery, best=min),
            "### Improvement over random real images (IOR)",
            f"Accuracy minus that of `{RANDOM}`, of the same seed and images per class: higher is better."
            + _gained(mine),
            difference_table(mine, _improvement, best=max),
            "### Paired comparisons",
            "Mean difference of pairs with the same data and seed ± its standard error (number of pairs).",
            *(f"{SCORES[metric]}:\n\n{paired_table(mine, metric)}" for metric in PAIRED if metric in shown),
        ]
    parts += ["## Failed cells", _failures(rows)]
    return "\n\n".join(parts) + "\n"


def _shown_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that have a table: those of grades and of findings only where some data have them."""
    kinds = {kind_of(rows, data) for data in {row["data"] for row in rows}}
    own = dict.fromkeys(OF_GRADES, "ordinal") | dict.fromkeys(OF_FINDINGS, "multilabel")
    return [metric for metric in SCORES if own.get(metric, "") in ("", *kinds)]


def _gained(rows: Sequence[Row]) -> str:
    """Of which data sets it is another figure than accuracy, and which one; empty where there are none."""
    kinds = {data: kind_of(rows, data) for data in sorted({row["data"] for row in rows})}
    others = {data: METRICS[GAINED[kind]] for data, kind in kinds.items() if kind != "multiclass"}
    return "".join(f" Of {data} it is {title} in place of accuracy." for data, title in others.items())


def models_of(rows: Iterable[Row]) -> list[str]:
    """The models, that of the headline first."""
    return list(dict.fromkeys(row["model"] for row in rows))


def methods_of(rows: Iterable[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != WHOLE]


def places_of(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """The columns of the tables: data sets and, in each, images per class."""
    found = dict.fromkeys((row["data"], row["ipc"]) for row in rows if row["method"] != WHOLE)
    return sorted(found or dict.fromkeys((row["data"], 0) for row in rows))


def figures(rows: Iterable[Row], data: str, ipc: int, method: str, metric: str) -> Figures:
    """The values of `metric` at one place; the reference `whole` is the same for every number of images."""
    ipc = 0 if method == WHOLE else ipc
    here = [row for row in rows if (row["data"], row["ipc"], row["method"]) == (data, ipc, method)]
    values = {row["seed"]: row[metric] for row in here if row["status"] == "ok" and row[metric] is not None}
    return Figures(values, sum(row["status"] == "failed" for row in here))


def score_table(rows: Sequence[Row], metric: str) -> str:
    """Methods against places: mean ± deviation over seeds, the best method bold, the reference in the last row."""

    def pick(place: tuple[str, int], method: str) -> Figures:
        return figures(rows, *place, method, metric)

    body = _body(rows, methods_of(rows), pick, min if metric == "mae" else max, score)
    seeds = len({row["seed"] for row in rows})
    body.append([f"*{WHOLE}*", *(_shown(pick(place, WHOLE), seeds, score) for place in places_of(rows))])
    return markdown_table(["method", *map(_place, places_of(rows))], body)


def difference_table(
    rows: Sequence[Row],
    difference: Callable[[Sequence[Row], tuple[str, int], str, str], Figures],
    *,
    best: Callable[..., float],
) -> str:
    """Methods against places: mean ± deviation over seeds of a difference within each seed."""

    def pick(place: tuple[str, int], method: str) -> Figures:
        return difference(rows, place, method, GAINED[kind_of(rows, place[0])])

    return markdown_table(["method", *map(_place, places_of(rows))], _body(rows, methods_of(rows), pick, best, signed))


def _recovery(rows: Sequence[Row], place: tuple[str, int], method: str, metric: str) -> Figures:
    return _minus(figures(rows, *place, WHOLE, metric), figures(rows, *place, method, metric))


def _improvement(rows: Sequence[Row], place: tuple[str, int], method: str, metric: str) -> Figures:
    return _minus(figures(rows, *place, method, metric), figures(rows, *place, RANDOM, metric))


def _minus(one: Figures, other: Figures) -> Figures:
    shared = one.values.keys() & other.values.keys()
    return Figures({seed: one.values[seed] - other.values[seed] for seed in sorted(shared)}, one.failed + other.failed)


def paired_table(rows: Sequence[Row], metric: str) -> str:
    """One method minus another, over data sets and seeds, for each number of images per class."""
    ipcs = sorted({ipc for _, ipc in places_of(rows)})
    pairs = dict.fromkeys((row["method"], other) for row in rows for other in row["against"].split())
    body = []
    for one, other in pairs:
        cells = [paired(paired_differences(rows, one, other, ipc, metric)) for ipc in ipcs]
        if any(cell != NOTHING for cell in cells):
            body.append([f"{one} − {other}", *cells])
    return markdown_table(["pair", *(f"IPC {ipc}" for ipc in ipcs)], body) if body else "There are none yet."


def paired_differences(rows: Sequence[Row], one: str, other: str, ipc: int, metric: str) -> list[float]:
    """`one` minus `other` of every (data set, seed) at which both have a figure."""
    found: list[float] = []
    for data in sorted({row["data"] for row in rows}):
        pair = (figures(rows, data, ipc, name, metric) for name in (one, other))
        found += _minus(*pair).values.values()
    return found


def paired(differences: Sequence[float]) -> str:
    """Mean ± standard error of the mean, and of how many: `+.012 ± .008 (4)`."""
    if not differences:
        return NOTHING
    both = mean_std(list(differences))
    error = None if both["std"] is None else both["std"] / math.sqrt(len(differences))
    return f"{signed({'mean': both['mean'], 'std': error})} ({len(differences)})"


def signed(value: dict[str, float | None]) -> str:
    """`+.012 ± .008`, with a true minus."""
    mean = value["mean"] or 0.0
    sign = "−" if round(mean, 3) < 0 else "+" if round(mean, 3) > 0 else ""
    return sign + score({"mean": abs(mean), "std": value["std"]})


def _body(
    rows: Sequence[Row],
    methods: Sequence[str],
    pick: Callable[[tuple[str, int], str], Figures],
    best: Callable[..., float],
    show: Callable[[dict[str, float | None]], str],
) -> list[list[str]]:
    """The rows of a table, the best of every column bold: of the methods that have a figure for every seed."""
    seeds = len({row["seed"] for row in rows})
    columns = []
    for place in places_of(rows):
        here = [pick(place, method) for method in methods]
        most = max((len(f.values) for f in here), default=0)
        means = {k: f.mean for k, f in enumerate(here) if f.mean is not None and len(f.values) == most}
        top = best(means.values()) if means else None
        texts = [_shown(f, seeds, show) for f in here]
        columns.append([f"**{text}**" if k in means and means[k] == top else text for k, text in enumerate(texts)])
    return [[method, *cells] for method, *cells in zip(methods, *columns, strict=True)]


def _shown(f: Figures, seeds: int, show: Callable[[dict[str, float | None]], str]) -> str:
    """`.710 ± .020`, with the number of seeds where some are missing, and what failed."""
    if not f.values:
        return "failed" if f.failed else NOTHING
    text = show(mean_std(list(f.values.values())))
    notes = [f"n={len(f.values)}"] if len(f.values) < seeds else []
    notes += [f"{f.failed} failed"] if f.failed else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _place(place: tuple[str, int]) -> str:
    data, ipc = place
    return f"{data}, IPC {ipc}" if ipc else data


def _about(rows: Sequence[Row]) -> str:
    seeds = len({row["seed"] for row in rows})
    return (
        f"± is the standard deviation over {seeds} seeds (n: fewer in this entry); every value is the mean of several networks, "
        "whose learning rate was chosen on validation, and the test images were looked at once. Bold: the best method of a "
        f"column. `{WHOLE}` trains on all real images: a reference, not a method. Sets are used with the labels that they "
        f"come with. {NOTHING}: not measured yet."
    )


def _failures(rows: Sequence[Row]) -> str:
    failed = dict.fromkeys(
        (row["data"], row["method"], row["ipc"], row["seed"], row["reason"])
        for row in rows
        if row["status"] == "failed"
    )
    if not failed:
        return "None."
    return markdown_table(["data", "method", "IPC", "seed", "reason"], [[str(x) for x in line] for line in failed])


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A GitHub table, all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
