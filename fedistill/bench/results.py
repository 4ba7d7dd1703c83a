"""Records of cells on disk, and the one table that all figures are made from: `results.csv`, a row per cell and model."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedistill.bench.cells import Record
from fedistill.bench.plan import Cell, Choice, cell_of, fingerprint
from fedistill.bench.suite import WHOLE, Suite
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures
from fedistill.files import read_json, write_bytes

TEXTS = ("data", "method", "model", "status", "reason", "against")
WHOLES = ("ipc", "seed", "images", "upload_bytes", "iterations", "skipped")
SCORES = ("val_balanced_accuracy", "val_auc", "accuracy", "balanced_accuracy", "macro_f1", "auc")
OF_GRADES, OF_FINDINGS = ("val_qwk", "qwk", "mae"), ("val_map", "map")
COLUMNS = (
    "data",
    "method",
    "ipc",  # 0: the reference `whole`
    "seed",
    "model",
    "status",
    "reason",
    "images",
    "upload_bytes",
    "seconds_experts",  # shared by all methods with the same experts
    "seconds_distil",
    "iterations",
    "skipped",
    "learning_rate",
    *SCORES,
    *OF_GRADES,
    *OF_FINDINGS,
    "against",
)
OF_CELL = ("data", "method", "ipc", "seed", "status", "reason")
OF_WORK = ("images", "upload_bytes", "seconds_experts", "seconds_distil", "iterations", "skipped")

Row = dict[str, Any]  # the columns of the table; None where a figure is missing


def record_path(out: Path, key: str) -> Path:
    return out / "cells" / f"{key}.json"


def kind_of(rows: Iterable[Row], data: str) -> str:
    """The kind of task of a data set, by the figures that it has."""
    mine = [row for row in rows if row["data"] == data]
    for kind, names in (("ordinal", OF_GRADES), ("multilabel", OF_FINDINGS)):
        if any(row[name] is not None for row in mine for name in names):
            return kind
    return "multiclass"


def finished(out: Path, cell: Cell) -> bool:
    path = record_path(out, cell.key)
    return path.exists() and read_json(path)["status"] == "ok"


def collect(
    out: Path, suite: Suite, choice: Choice, cells: Sequence[Cell], marks: dict[str, str] | None = None
) -> list[Row]:
    """The rows of all stored cells that are still what the suite and the command line say: none of other settings or data.

    That takes in what earlier commands with another choice of data, methods, IPC and seeds than `cells` left there.
    marks: fingerprints of data sets from call to call, so that none is loaded twice; added to.
    """
    rows: list[Row] = []
    marks = {} if marks is None else marks
    marks |= {cell.data: cell.fingerprint for cell in cells}
    for path in sorted((out / "cells").glob("*.json")):
        record = read_json(path)
        data, method = record["data"], record["method"]
        if data not in suite.data or method not in (WHOLE, *suite.methods):
            continue
        if data not in marks:
            marks[data] = fingerprint(suite, choice, data)
        cell = cell_of(suite, choice, marks[data], data, method, record["ipc"], record["seed"])
        if cell.key == record["key"]:
            rows += rows_of(record, cell)
    order = {name: place for place, name in enumerate((*suite.methods, WHOLE))}
    return sorted(rows, key=lambda r: (r["data"], r["ipc"], order[r["method"]], r["seed"]))


def rows_of(record: Record, cell: Cell) -> list[Row]:
    """A row per model; of a failed cell too, without figures."""
    base = {name: record[name] for name in OF_CELL} | {name: record.get(name) for name in OF_WORK}
    base["against"] = " ".join(cell.against)
    figures = record.get("models", {})
    return [
        {name: (base | {"model": model} | figures.get(model, {})).get(name) for name in COLUMNS}
        for model in architectures(cell.config)
    ]


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows({name: _cell(row[name]) for name in columns} for row in rows)
    write_bytes(path, text.getvalue().encode())


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote. Raises `FedistillError` on a file that is missing or is no such table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            known = (*(table.fieldnames or ()), *OF_GRADES, *OF_FINDINGS)  # tables from before do not have these
            missing = [name for name in COLUMNS if name not in known]
            if missing:
                raise FedistillError("bad-results", f"{path} is not a table of results: it lacks {', '.join(missing)}.")
            return [_parsed(row) for row in table]
    except FileNotFoundError:
        raise FedistillError("missing-file", f"There is no {path}: run the benchmark first.") from None
    except (ValueError, TypeError) as error:
        raise FedistillError("bad-results", f"{path} is not a table of results: {error}.") from None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parsed(row: Mapping[str, str]) -> Row:
    def value(name: str) -> Any:
        if name in TEXTS:
            return row[name]
        if row.get(name, "") == "":
            return None
        return int(row[name]) if name in WHOLES else float(row[name])

    return {name: value(name) for name in COLUMNS}
