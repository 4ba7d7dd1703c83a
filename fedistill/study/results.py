"""Records of cells on disk, and the one tidy table of a study: `results.csv`, a row per cell, seed, model and arm of comparison.

Columns, besides those that tell the cells apart (`Study.columns`: the keys of the grid, `arm`, and what arms set):

    cell            its folder in `cells/`               trained_on  distilled, random_real, local_only, centralised, ...
    seed, eval_model   empty where the cell failed       kind        multiclass, multilabel or ordinal
    accuracy ... mae   means over the networks of a seed, on test; empty where a kind of task has no such figure
    val_accuracy ...   the same on validation: what cells are chosen by, so that the test figure of the chosen one is a test
    images, upload_bytes   what the arm is made of, and what all sites send for it
    after_rounds    of distillation or averaging; 1 where there is one; empty where nothing is sent
    release_epsilon, release_delta   what the union of the sets promises; empty without privacy, and in the other arms
    seconds         of training the global models        seconds_experts, seconds_distil   of all sites, for `distilled`
    cell_seconds    of the whole cell, all seeds         status, code, reason   how it ended
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedistill.bench.results import write_rows
from fedistill.config import TYPES, Config
from fedistill.errors import FedistillError
from fedistill.files import read_json
from fedistill.report.tables import METRICS, arms_in_order
from fedistill.study.plan import Cell, Study

Row = dict[str, Any]  # the columns of the table; None where a figure is missing
WHOLES = ("seed", "images", "upload_bytes", "after_rounds")
SCORES = METRICS | {f"val_{name}": f"{title} on validation" for name, title in METRICS.items()}  # and their titles
COSTS = ("release_epsilon", "release_delta", "seconds", "seconds_experts", "seconds_distil", "cell_seconds")
FLOATS = (*SCORES, *COSTS)
FIGURES = (*SCORES, "images", "upload_bytes", "after_rounds", *COSTS)
OTHERS = ("seed", "eval_model", "trained_on", "kind", *FIGURES, "status", "code", "reason")


def record_path(out: Path, key: str) -> Path:
    return out / "records" / f"{key}.json"


def log_path(out: Path, key: str) -> Path:
    return out / "records" / f"{key}.log"


def defect(out: Path, key: str, what: str) -> str:
    return f"It ended unexpectedly ({what}): see {log_path(out, key)}."


def record_of(out: Path, cell: Cell) -> dict[str, Any] | None:
    """How the cell ended, with as many seeds as are asked for now; None where it did not end."""
    path = record_path(out, cell.key)
    record = dict(read_json(path)) if path.exists() else None
    return record if record and record["seeds"] == cell.seeds else None


def finished(out: Path, cell: Cell) -> bool:
    record = record_of(out, cell)
    return record is not None and record["status"] == "ok"


def rows_of_run(config: Config, run: Path) -> list[Row]:
    """What a finished run found: a row per seed, model and arm, without the columns of the study."""
    from fedistill.evaluation.arms import architectures
    from fedistill.report.summary import summarise

    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        one = summarise(config.with_seed(seed), run, [run / f"seed-{seed}"])
        privacy = one["privacy"] or {}
        shared = {"seed": seed, "kind": one["data"]["kind"]}
        of_set = {
            "release_epsilon": privacy.get("epsilon"),
            "release_delta": privacy.get("delta"),
            "seconds_experts": _sum(site["phases"].get("experts") for site in one["sites"]),
            "seconds_distil": _sum(site["phases"].get("distill") for site in one["sites"]),
        }
        models = {architectures(config)[0]: one["arms"]} | one["cross_architecture"]
        for model, arms in models.items():
            for name, arm in arms_in_order(arms):
                figures = {metric: arm[metric]["mean"] for metric in METRICS if metric in arm}
                figures |= {f"val_{metric}": value for metric, value in arm["validation"].items()}
                work = {"images": _whole(arm["images"]), "upload_bytes": _whole(arm["upload_bytes"])}
                work["after_rounds"] = arm.get("rounds", 1 if name == "distilled" else None)
                work |= {"seconds": arm["seconds"]} | (of_set if name == "distilled" else {})
                rows.append(shared | {"eval_model": model, "trained_on": name} | figures | work)
    return rows


def columns_of(study: Study) -> list[str]:
    return ["cell", *study.columns, *OTHERS]


def collect(out: Path, study: Study, cells: Sequence[Cell]) -> list[Row]:
    """The rows of all cells that have ended; one without figures for a cell that failed."""
    rows = []
    for cell in cells:
        record = record_of(out, cell)
        if record is None:
            continue
        about = {"cell": cell.key} | dict(cell.settings) | {"cell_seconds": record["seconds"]}
        about |= {name: record[name] for name in ("status", "code", "reason")}
        rows += [dict.fromkeys(columns_of(study)) | about | row for row in record["rows"] or [{}]]
    return rows


def write_results(out: Path, study: Study, cells: Sequence[Cell]) -> list[Row]:
    rows = collect(out, study, cells)
    write_rows(out / "results.csv", rows, columns_of(study))
    return rows


def read_results(path: Path) -> list[Row]:
    """What `write_results` wrote. Raises `FedistillError` on a file that is missing or is no such table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            missing = [name for name in ("cell", *OTHERS) if name not in (table.fieldnames or ())]
            if missing:
                raise FedistillError("bad-results", f"{path} is no table of a study: it lacks {', '.join(missing)}.")
            return [{name: _value(name, text) for name, text in row.items()} for row in table]
    except (FileNotFoundError, NotADirectoryError):
        raise FedistillError("missing-file", f"There is no {path}: run the study first.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise FedistillError("bad-results", f"{path} is no table of a study: {error}.") from None


def read_folder(out: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `study.json` and `results.csv` of a study's folder say. Raises `FedistillError` where one is missing or no such file."""
    rows = read_results(out / "results.csv")
    if not (out / "study.json").exists():
        raise FedistillError("missing-file", f"There is no {out / 'study.json'}: run the study first.")
    return read_plan(out, "title", "varied", "names"), rows


def read_plan(out: Path, *keys: str) -> dict[str, Any]:
    """What `study.json` says. Raises `FedistillError` on another file of that name, which lacks one of `keys`."""
    about = read_json(out / "study.json")
    if not isinstance(about, dict) or not set(keys) <= about.keys():
        raise FedistillError("bad-results", f"{out / 'study.json'} is not that of a study: choose another folder.")
    return about


def usable(rows: Sequence[Row]) -> list[Row]:
    """Those of cells that did not fail."""
    return [row for row in rows if row["status"] == "ok"]


def _value(name: str, text: str) -> Any:
    if name in FLOATS or name in WHOLES or (name in TYPES and TYPES[name] is not str):
        if text == "":
            return None
        if TYPES.get(name) is bool:
            return text == "True"
        whole = name == "seed" or TYPES.get(name) is int
        return int(text) if whole else float(text)
    return text


def _whole(value: float | None) -> float | int | None:
    """Without a fraction, a number is written to its last digit."""
    return int(value) if value is not None and value == int(value) else value


def _sum(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None
