"""The work of one cell: distil, evaluate, give back a record. Runs in a worker process, and never raises."""

from __future__ import annotations

import functools
import io
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedistill.api import distill_site
from fedistill.bench.plan import Cell, load_subset
from fedistill.bench.suite import WHOLE
from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.average import average_sites
from fedistill.evaluation.ensemble import ensemble
from fedistill.evaluation.fit import Material, Result, of_split, select_and_test
from fedistill.evaluation.metrics import NAMES, mean_std
from fedistill.files import write_bytes
from fedistill.site.describe import task_of
from fedistill.site.feasible import check_budget, check_settings
from fedistill.site.job import Progress, advance, expert_paths, has_experts, versions
from fedistill.synthetic.merge import merge
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import contact_sheet
from fedistill.wire import encode, size

Record = dict[str, Any]
VALIDATED = ("balanced_accuracy", "auc", "qwk", "map")  # of those that a kind of task has


def run_cell(cell: Cell, out: Path, sheet: bool) -> Record:
    """The record of a cell: its figures, or how it failed ("trace" then says where, for the log).

    out: the folder of the benchmark; a cell that was stopped goes on from what lies in `out/work`. sheet: write a contact sheet.
    """
    began = time.monotonic()
    record = about(cell) | _attempt(lambda: _figures(cell, out, sheet))
    return record | {"seconds": time.monotonic() - began}


def train_experts_of(cells: Sequence[Cell], out: Path) -> dict[str, Record]:
    """Train the experts that `cells` share, so that no two processes train them. Returns the records of cells that cannot go on.

    What each method needs of the experts is its own business, so each job is taken to the point where it has them.
    """
    failed: dict[str, Record] = {}
    broken: Record | None = None
    for cell in cells:
        result = broken or _attempt(functools.partial(_to_experts, cell, out))
        if result["status"] == "failed":
            failed[cell.key] = about(cell) | result
        if str(result.get("code", "")).startswith("expert-"):  # the others would only find out again
            broken = result
    return failed


def about(cell: Cell) -> Record:
    """What a record says of the cell itself."""
    place = {"key": cell.key, "data": cell.data, "method": cell.method, "ipc": cell.ipc, "seed": cell.seed}
    return place | {"config": cell.config.to_dict(), "versions": versions()}


def failure(error: BaseException) -> Record:
    """How a cell failed: the sentence of a mistake that can be mended, or else only the kind of the defect."""
    if isinstance(error, FedistillError):
        return {"status": "failed", "code": error.code, "reason": error.sentence}
    trace = "".join(traceback.format_exception(error))
    return {"status": "failed", "code": "defect", "reason": f"defect: {type(error).__name__}", "trace": trace}


def _attempt(work: Callable[[], Record]) -> Record:
    try:
        return {"status": "ok", "code": "", "reason": ""} | work()
    except Exception as error:  # one bad cell must not stop the others
        return failure(error)


def _sites(cell: Cell) -> tuple[Dataset, list[Dataset]]:
    """The data of a cell, and the part of each site."""
    data_settings = {f.name: getattr(cell.config, f.name) for f in fields(Config) if f.metadata["scope"] == "data"}
    data = _load(Config(**data_settings), cell.data, cell.train_images)
    part = partition(data, cell.config)
    return data, [part.at(data, place) for place in range(len(part))]


@functools.lru_cache(maxsize=1)  # cells of one data set often follow each other
def _load(config: Config, name: str, train_images: int) -> Dataset:
    return load_subset(config, name, train_images)


def _to_experts(cell: Cell, out: Path) -> Record:
    _, sites = _sites(cell)
    for site in sites:
        check_settings(cell.config, task_of(site))
        check_budget(cell.config, site)
        while not has_experts(cell.config, site, site.name, out / "work"):
            advance(cell.config, site, site.name, out / "work", seconds=cell.config.slice_seconds)
    return {}


def _figures(cell: Cell, out: Path, sheet: bool) -> Record:
    data, sites = _sites(cell)
    if cell.method == WHOLE:
        check_settings(cell.config, task_of(data))
        pixels = data.train.images[0].numel()
        facts: Record = {"images": len(data.train), "upload_bytes": len(data.train) * pixels}
        return facts | {"models": _models(cell.config, data, of_split(data.train, task_of(data)))}
    if cell.arm == "experts":
        return _experts_themselves(cell, data, sites, out)
    if cell.arm == "fedavg":
        check_settings(cell.config, task_of(data))
        result, sent = average_sites(cell.config, data, sites, out / "work" / "fedavg" / cell.key)
        return _without_set(cell, data, result, sent)
    made, ends = [], []
    for site in sites:
        slices: list[Progress] = []
        made.append(distill_site(cell.config, site, site.name, out / "work", on_progress=slices.append))
        ends.append(slices[-1])
    merged = merge(made)
    if sheet:
        write_bytes(out / "sheets" / f"{cell.data}-ipc{cell.ipc}-{cell.method}.png", _sheet(merged))
    facts = {
        "images": len(merged),
        "upload_bytes": size(*encode(merged)),
        "seconds_experts": sum((end.seconds or {}).get("experts", 0.0) for end in ends),
        "seconds_distil": sum((end.seconds or {}).get("distill", 0.0) for end in ends),
        "iterations": sum(end.iterations for end in ends),
        "skipped": sum(end.skipped for end in ends),
        "notes": [note for end in ends for note in end.notes],
    }
    return facts | {"models": _models(cell.config, data, Material(merged.images, merged.labels))}


def _experts_themselves(cell: Cell, data: Dataset, sites: Sequence[Dataset], out: Path) -> Record:
    """One-shot ensemble: every site sends its experts."""
    _to_experts(cell, out)
    task = task_of(data)
    paths = [expert_paths(cell.config, site, site.name, out / "work") for site in sites]
    floats = sum(path.shape[1] for site in paths for path in site)
    result = ensemble(cell.config, task, paths, data)
    return _without_set(cell, data, result, 4 * floats)


def _without_set(cell: Cell, data: Dataset, result: Result, upload: int) -> Record:
    """The figures of an arm whose sites send networks."""
    scores = _scores(result, data.kind)
    return {"images": None, "upload_bytes": upload, "models": {architectures(cell.config)[0]: scores}}


def _models(config: Config, data: Dataset, material: Material) -> Record:
    task = task_of(data)
    return {
        model: _scores(select_and_test(config, task, model, material, data.val, data.test), data.kind)
        for model in architectures(config)
    }


def _scores(result: Result, kind: str) -> Record:
    """Means over networks of the figures that a kind of task has."""
    names = NAMES[kind]
    test = {name: mean_std([s[name] for s in result.scores])["mean"] for name in names}
    val = {f"val_{name}": mean_std([s[name] for s in result.val_scores])["mean"] for name in VALIDATED if name in names}
    return test | val | {"learning_rate": result.learning_rate, "seconds": result.seconds}


def _sheet(synthetic: SyntheticSet) -> bytes:
    buffer = io.BytesIO()
    contact_sheet(synthetic.pixels, synthetic.hard_labels, synthetic.class_names).save(buffer, "PNG")
    return buffer.getvalue()
