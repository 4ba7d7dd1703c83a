"""What `fedistill probe` found, in tables and sentences for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from fedistill.evaluation.metrics import POINTS
from fedistill.evaluation.predictor import CANDIDATES, LEVEL, Predictor
from fedistill.evaluation.probe import Measured, Prediction, Probe
from fedistill.report.tables import BEST, bare_table, duration, number, plain, score


def budgets_table(probe: Probe) -> Table:
    """One row per budget, and one for all data."""
    images = number(sum(probe.validation_images))
    table = bare_table(f"Random real images, scored on {images} validation images ({probe.model})")
    for title in ("IPC", "Images", "Share", "Balanced accuracy", "AUC", "Distilled", "Method"):
        table.add_column(title, justify="left" if title == "Method" else "right")
    for b in probe.budgets:
        best = f" {BEST}" if b.ipc == probe.recommended_ipc else ""
        expected = _interval(b.predicted) if b.predicted else "?"
        table.add_row(f"{b.ipc}{best}", *_scores(b.random, b.share), expected, b.method)
    table.add_row("all", *_scores(probe.whole, 1.0), "", "")
    return table


def sites_table(probe: Probe) -> Table:
    """One row per site: its images, its rarest class, and the classes that it lacks."""
    table = bare_table("Sites")
    for title in ("Site", "Images", "Rarest class", "Missing"):
        table.add_column(title, overflow="fold", justify="right" if title == "Images" else "left")
    for site in probe.sites:
        missing = plain(", ".join(site.missing)) or "none"
        rarest = f"{plain(site.smallest_class)} ({site.smallest})"
        table.add_row(Text(plain(site.name)), number(site.images), Text(rarest), Text(missing))
    return table


def conclusion(probe: Probe) -> str:
    """The prediction's worth, the recommendation, the warnings, and what it took: a line each."""
    draws, nets = probe.budgets[0].random.balanced_accuracy.n, probe.whole.balanced_accuracy.n
    lines = [
        f"± is the standard deviation over {draws} draws ({nets} networks for all data). The test split was not used.",
        trust(probe.predictor)
        if probe.predictor
        else "No predictor has been fitted yet, so nothing is predicted and no budget recommended: "
        "fedistill probe --fit results.csv fits one to a benchmark.",
    ]
    if probe.recommended_ipc is not None:
        method = next(b.method for b in probe.budgets if b.ipc == probe.recommended_ipc)
        lines.append(
            f"{BEST} Recommended: --ipc {probe.recommended_ipc} --method {method}, the smallest budget whose prediction is "
            f"within noise or {100 * POINTS:g} points of the best."
        )
    lines += [f"Warning: {plain(caution.sentence)}" for caution in probe.warnings]
    return "\n".join([*lines, f"Took {duration(probe.seconds)}."])


def errors_table(predictor: Predictor) -> Table:
    """Mean absolute error of every candidate on every data set left out, in points of balanced accuracy."""
    table = bare_table("Error on the data set left out, in points of balanced accuracy")
    table.add_column("Data", overflow="fold")
    for title in ("Cells", *CANDIDATES):
        table.add_column(f"{title} {BEST}" if title == predictor.kind else title, justify="right")
    cells = predictor.provenance["cells"]
    for name in sorted(cells):
        errors = (f"{100 * predictor.errors[kind][name]:.1f}" for kind in CANDIDATES)
        table.add_row(Text(plain(name)), str(cells[name]), *errors)
    table.add_row("mean", str(sum(cells.values())), *(f"{100 * predictor.error(kind):.1f}" for kind in CANDIDATES))
    return table


def trust(predictor: Predictor) -> str:
    """What the predictor is, what it was fitted to, and how far off it is, in one sentence."""
    cells = predictor.provenance["cells"]
    what = {
        "random": "Distilled sets are predicted to reach what random real images reach",
        "mean gain": f"Distilled sets are predicted to gain {100 * predictor.intercept:+.1f} points over random real images",
        "ridge": "Distilled sets are predicted by a fitted line",
    }[predictor.kind]
    return (
        f"{what} ({predictor.provenance['csv']}: {sum(cells.values())} cells of {len(cells)} data sets, version "
        f"{predictor.provenance['version']}); on data sets left out this was off by {100 * predictor.error(predictor.kind):.1f} "
        f"points, and {100 * LEVEL:g} % of cells were within {100 * predictor.half_width:.1f}."
    )


def _scores(measured: Measured, share: float) -> tuple[str, ...]:
    percent = f"{100 * share:.3g} %"
    return number(measured.images), percent, score(vars(measured.balanced_accuracy)), score(vars(measured.auc))


def _interval(predicted: Prediction) -> str:
    return f"{score(predicted.mean)} ({score(predicted.low)} to {score(predicted.high)})"
