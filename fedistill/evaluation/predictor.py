"""What distillation will reach, before it is run: a line through the cells of a benchmark.

A feasibility study (Li et al. 2024, arXiv 2407.14429) found that the score of a random subset of real images predicts the
score of a distilled set. Our line, in balanced accuracy, clipped to 0..1:

    distilled = random + a + b1 random + b2 headroom + b3 log10(ipc) + b4 share

headroom = score on all data - random; share = images of the budget / all training images. Features that only tell one data
set from another, such as the number of classes, are left out: a benchmark has too few data sets to learn from them.

The line has two rivals that need no features: "random" (distilled = random) and "mean gain" (b = 0). All are judged on data
sets that they were not fitted on, and the best is what is stored: the line only where it earns its coefficients.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fedistill
from fedistill.config import Config, recommended_method
from fedistill.errors import FedistillError
from fedistill.files import read_json, write_json

PATH = Path(__file__).with_name("predictor.json")
FORMAT = "fedistill-predictor/1"
FEATURES = ("random", "headroom", "log10_ipc", "share")
LEVEL = 0.9  # of the intervals
RIDGE = 1.0  # penalty on standardised features: headroom, ipc and share go up and down together
_COLUMNS = ("data", "method", "ipc", "seed", "model", "status", "images", "balanced_accuracy")


@dataclass(frozen=True)
class Cell:
    """One data set at one budget, means over seeds. Scores are balanced accuracies, `share` is of the training images.

    `distilled` is NaN where it is to be predicted.
    """

    data: str
    ipc: int
    random: float
    whole: float
    share: float
    distilled: float = math.nan


@dataclass(frozen=True)
class Line:
    """Gain over random images: `intercept + coefficients (4,) @ features (4,)`."""

    intercept: float
    coefficients: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A fitted line, how far off it is on data sets left out, and where it comes from.

    errors: mean absolute error of every candidate on every data set left out, `{kind: {data: error}}`.
    half_width: `LEVEL` of the absolute errors on single cells are within it. ranges: of each feature in the benchmark.
    """

    kind: str
    intercept: float
    coefficients: dict[str, float]
    half_width: float
    errors: dict[str, dict[str, float]]
    ranges: dict[str, tuple[float, float]]
    model: str
    methods: tuple[str, ...]
    provenance: dict[str, Any]

    def error(self, kind: str) -> float:
        """Mean absolute error of a candidate: the mean over data sets, so that a large benchmark of one does not decide."""
        return float(np.mean(list(self.errors[kind].values())))


@dataclass(frozen=True)
class Prediction:
    """Balanced accuracy, and the interval that holds it with probability `LEVEL`."""

    mean: float
    low: float
    high: float


def read_cells(path: Path) -> list[Cell]:
    """Cells of the headline model for which random images, all images and the recommended method all succeeded.

    path: the CSV of a benchmark, one row per data set, method, ipc, seed and model. Raises `FedistillError` on a file that
    cannot be read, columns that are missing, values that are no scores, and a file without a complete cell.
    """
    scores: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for line, row in _rows(path):
        if row["status"] == "ok" and row["model"] == headline_model():
            key = (row["data"], row["method"], _whole_number(path, line, "ipc", row["ipc"] or "0"))
            value = _number(path, line, "balanced_accuracy", row["balanced_accuracy"], high=1)
            scores.setdefault(key, []).append((value, _number(path, line, "images", row["images"])))
    mean = {key: np.mean(found, axis=0) for key, found in scores.items()}
    cells = []
    for (data, method, ipc), (random, images) in sorted(mean.items()):
        everything, distilled = mean.get((data, "whole", 0)), mean.get((data, recommended_method(ipc), ipc))
        if method == "random" and ipc > 0 and everything is not None and distilled is not None and everything[1] > 0:
            share = images / everything[1]
            cells.append(Cell(data, ipc, float(random), float(everything[0]), float(share), float(distilled[0])))
    if not cells:
        raise FedistillError(
            "no-cells",
            f"{path} has no data set and ipc with status ok for all of random, whole and {recommended_method(1)} with "
            f"model={headline_model()}.",
        )
    return cells


def headline_model() -> str:
    """The architecture whose scores are predicted."""
    return Config().eval_models.split(",")[0]


def fit_predictor(cells: Sequence[Cell], source: Path) -> Predictor:
    """The candidate with the smallest error on data sets left out, fitted on all `cells`; the simpler one where they are level.

    source: the benchmark, for the provenance. Raises `FedistillError` on fewer than three data sets.
    """
    names = sorted({cell.data for cell in cells})
    if len(names) < 3:
        raise FedistillError(
            "too-few-data-sets",
            f"{source} has complete cells of {len(names)} data set(s): at least three are needed to leave one out.",
        )
    residuals: dict[str, dict[str, list[float]]] = {kind: {} for kind in CANDIDATES}
    for name in names:
        inside = [cell for cell in cells if cell.data != name]
        for kind, fit in CANDIDATES.items():
            line = fit(inside)
            residuals[kind][name] = [cell.distilled - reach(line, cell) for cell in cells if cell.data == name]
    errors = {kind: {name: float(np.mean(np.abs(r))) for name, r in of.items()} for kind, of in residuals.items()}
    # A tenth of a point is no reason for more coefficients: candidates are in order of simplicity, and ties go to the first.
    kind = min(CANDIDATES, key=lambda k: round(float(np.mean(list(errors[k].values()))), 3))
    line = CANDIDATES[kind](cells)
    seen = np.stack([features(cell) for cell in cells])
    return Predictor(
        kind=kind,
        intercept=line.intercept,
        coefficients=dict(zip(FEATURES, line.coefficients.tolist(), strict=True)),
        half_width=_within(np.abs(np.concatenate(list(residuals[kind].values())))),
        errors=errors,
        ranges={
            name: (float(column.min()), float(column.max())) for name, column in zip(FEATURES, seen.T, strict=True)
        },
        model=headline_model(),
        methods=tuple(sorted({recommended_method(cell.ipc) for cell in cells})),
        provenance={
            "csv": source.name,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "cells": {name: sum(cell.data == name for cell in cells) for name in names},
            "ipc": sorted({cell.ipc for cell in cells}),
            "version": fedistill.__version__,
        },
    )


def _no_gain(cells: Sequence[Cell]) -> Line:
    return Line(0.0, np.zeros(len(FEATURES)))


def _mean_gain(cells: Sequence[Cell]) -> Line:
    return Line(float(np.mean([cell.distilled - cell.random for cell in cells])), np.zeros(len(FEATURES)))


def _ridge(cells: Sequence[Cell]) -> Line:
    """min |gain - a - Zb|^2 + RIDGE |b|^2 over standardised features Z, in the units of the features."""
    x = np.stack([features(cell) for cell in cells])
    gain = np.array([cell.distilled - cell.random for cell in cells])
    centre, scale = x.mean(0), x.std(0)
    scale[scale < 1e-12] = 1.0  # a feature that is the same everywhere gets the coefficient 0
    z = (x - centre) / scale
    b = np.linalg.solve(z.T @ z + RIDGE * np.eye(len(FEATURES)), z.T @ (gain - gain.mean())) / scale
    return Line(float(gain.mean() - centre @ b), b)


CANDIDATES: dict[str, Callable[[Sequence[Cell]], Line]] = {"random": _no_gain, "mean gain": _mean_gain, "ridge": _ridge}


def features(cell: Cell) -> np.ndarray:
    """`(4,)`, in the order of `FEATURES`."""
    return np.array([cell.random, cell.whole - cell.random, math.log10(cell.ipc), cell.share])


def reach(line: Line, cell: Cell) -> float:
    """The predicted balanced accuracy of a distilled set."""
    return float(np.clip(cell.random + line.intercept + line.coefficients @ features(cell), 0, 1))


def predict(predictor: Predictor, cell: Cell, *, noise: float) -> Prediction:
    """What distillation will reach; `noise` is the standard error of `cell.random`, which widens the interval."""
    b = np.array([predictor.coefficients[name] for name in FEATURES])
    mean = reach(Line(predictor.intercept, b), cell)
    slope = 1 + b[0] - b[1]  # d mean / d random
    half = math.hypot(predictor.half_width, 1.645 * slope * noise)  # 1.645: LEVEL of a normal distribution
    return Prediction(mean, max(0.0, mean - half), min(1.0, mean + half))


def unseen(predictor: Predictor, cell: Cell) -> list[str]:
    """Features of `cell` that lie outside of the benchmark."""
    found = zip(FEATURES, features(cell).tolist(), strict=True)
    return [name for name, value in found if not predictor.ranges[name][0] <= value <= predictor.ranges[name][1]]


def save_predictor(predictor: Predictor) -> Path:
    """Store it beside this file, where `load_predictor` looks. Raises `FedistillError` where that may not be written."""
    try:
        write_json(PATH, {"format": FORMAT, "level": LEVEL} | asdict(predictor))
    except OSError as error:
        raise FedistillError("no-write", f"{PATH} cannot be written ({error.strerror}).") from None
    return PATH


def load_predictor() -> Predictor | None:
    """The predictor that this version ships; None where none has been fitted."""
    if not PATH.exists():
        return None
    stored = read_json(PATH)
    if stored.pop("format") != FORMAT or stored.pop("level") != LEVEL:
        raise FedistillError("bad-predictor", f"{PATH} is of another version: fit it again with fedistill probe --fit.")
    ranges = {name: (low, high) for name, (low, high) in stored.pop("ranges").items()}
    return Predictor(**stored | {"ranges": ranges, "methods": tuple(stored["methods"])})


def _within(errors: np.ndarray) -> float:
    """The width that a further cell's error stays within with probability `LEVEL`, if it is like these (split conformal)."""
    rank = math.ceil((len(errors) + 1) * LEVEL)
    return float(np.sort(errors)[min(rank, len(errors)) - 1])


def _rows(path: Path) -> list[tuple[int, Mapping[str, str]]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise FedistillError("bad-csv", f"{path} has no column '{missing[0]}': is it a benchmark's CSV?")
            rows: list[tuple[int, Mapping[str, str]]] = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise FedistillError("missing-file", f"fit={path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, csv.Error):
        raise FedistillError("bad-csv", f"{path} is not a readable CSV file.") from None
    for line, row in rows:
        if any(row[name] is None for name in _COLUMNS):
            raise FedistillError("bad-csv", f"{path}, line {line}: it has fewer values than there are columns.")
    return rows


def _number(path: Path, line: int, name: str, text: str, *, high: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= high or math.isinf(value):
        what = f"a number from 0 to {high:g}" if high < math.inf else "a number of at least 0"
        raise FedistillError("bad-csv", f"{path}, line {line}: {name}={text} is not {what}.")
    return value


def _whole_number(path: Path, line: int, name: str, text: str) -> int:
    value = _number(path, line, name, text)
    if value != int(value):
        raise FedistillError("bad-csv", f"{path}, line {line}: {name}={text} is not a whole number.")
    return int(value)
