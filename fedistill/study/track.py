"""Finished cells for the trackers that people use: a run per cell, its configuration, and its figures with the seed as the step.

Off unless it is asked for (`study run --track NAME`). Where it goes is what the tracker itself is set up for (MLFLOW_TRACKING_URI,
WANDB_MODE, ...); TensorBoard's files are in the folder of the study. Figures and settings are sent, and no image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fedistill.errors import FedistillError, unknown
from fedistill.files import read_json, write_json
from fedistill.study.plan import Cell, Study
from fedistill.study.results import FIGURES, collect, finished

Figures = Mapping[int, Mapping[str, float]]  # of each seed
Send = Callable[[Any, Study, Cell, Figures, Path], None]  # package, study, cell, figures, folder of the study


def track(name: str, study: Study, cells: Sequence[Cell], out: Path) -> int:
    """Send the finished cells that `name` was not sent yet; how many these were.

    Raises `FedistillError` on an unknown tracker, and on one that is not installed.
    """
    package, send = _tracker(name)
    file = out / f"tracked-{name}.json"
    sent = dict(read_json(file)) if file.exists() else {}
    rows = collect(out, study, cells)
    new = [cell for cell in cells if finished(out, cell) and set(cell.seeds) - set(sent.get(cell.key, ()))]
    for cell in new:
        before = set(sent.get(cell.key, ()))
        figures: dict[int, dict[str, float]] = defaultdict(dict)
        for row in rows:
            if row["cell"] == cell.key and row["seed"] not in before:
                where = f"{row['eval_model']}/{row['trained_on']}"
                figures[row["seed"]] |= {f"{where}/{k}": float(row[k]) for k in FIGURES if row[k] is not None}
        send(package, study, cell, figures, out)
        sent[cell.key] = cell.seeds
        write_json(file, sent)
    return len(new)


def check_tracker(name: str) -> None:
    """Raise `FedistillError` where `track` would: before hours of work."""
    _tracker(name)


def _tracker(name: str) -> tuple[Any, Send]:
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    module, send = TRACKERS[name]
    try:
        return import_module(module), send
    except ImportError:
        raise FedistillError(
            "not-installed", f"--track {name} needs a package that is not installed: pip install 'fedistill[{name}]'."
        ) from None


def _to_mlflow(mlflow: Any, study: Study, cell: Cell, figures: Figures, out: Path) -> None:
    mlflow.set_experiment(study.name)
    with mlflow.start_run(run_name=cell.name, tags={"cell": cell.key}):
        mlflow.log_params(cell.config.to_dict())
        for seed, values in figures.items():
            mlflow.log_metrics(dict(values), step=seed)


def _to_tensorboard(tensorboard: Any, study: Study, cell: Cell, figures: Figures, out: Path) -> None:
    with tensorboard.SummaryWriter(str(out / "tensorboard" / cell.key)) as writer:
        writer.add_text("cell", cell.name)
        writer.add_text("configuration", "\n".join(f"    {k} = {v!r}" for k, v in cell.config.to_dict().items()))
        for seed, values in figures.items():
            for key, value in values.items():
                writer.add_scalar(key, value, seed)


def _to_wandb(wandb: Any, study: Study, cell: Cell, figures: Figures, out: Path) -> None:
    with wandb.init(project=study.name, name=cell.name, config=cell.config.to_dict(), dir=str(out)) as run:
        for seed, values in figures.items():
            run.log(dict(values), step=seed)


TRACKERS: dict[str, tuple[str, Send]] = {
    "mlflow": ("mlflow", _to_mlflow),
    "tensorboard": ("torch.utils.tensorboard", _to_tensorboard),
    "wandb": ("wandb", _to_wandb),
}
