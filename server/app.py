"""Flower ServerApp: collect one synthetic set per site, merge them, train and judge the global models.

Everything that took work is in the run folder as soon as it exists, so a run that was stopped goes on from there:
what is already there is not asked for again.
"""

from __future__ import annotations

import dataclasses
import time
from functools import lru_cache
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import Partition, partition
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import evaluate_arms
from fedistill.evaluation.calibration import calibration_of
from fedistill.events import EventLog, claim_folder
from fedistill.files import write_json
from fedistill.privacy.rules import check_private
from fedistill.report.summary import write_summary
from fedistill.simulation import absolute
from fedistill.site.feasible import check_settings
from fedistill.synthetic.store import load_set, save_set
from server.compare import compare
from server.stages import Run, agree, collect_sets, describe_sites, evaluate_at_sites, merged_sets

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Every seed, then the summary. A `FedistillError` is written to `error.json` before it ends the run."""
    config = make_config(context.run_config).resolved()
    config = dataclasses.replace(config, out=config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{context.run_id}")
    config = absolute(config)  # the processes of a simulation may have other working directories
    out = Path(config.out)
    log(INFO, "Run folder: %s", out)
    claim_folder(out, config)
    (out / "error.json").unlink(missing_ok=True)
    events = EventLog(out / "events.jsonl")
    try:
        check_private(config)
        for seed in range(config.seed, config.seed + config.seeds):
            run_seed(grid, config.with_seed(seed), events)
        events.add(config.seed, "", "report", "start")
        write_summary(config, out)
        events.add(config.seed, "", "report", "done")
    except FedistillError as error:
        log(ERROR, error.sentence)
        write_json(out / "error.json", {"code": error.code, "sentence": error.sentence})
        raise
    except Exception as error:
        if config.server_data == "same":  # who simulates has the log before them
            raise
        sentence = f"An unexpected error ({type(error).__name__}): the log of the server says where."
        write_json(out / "error.json", {"code": "internal", "sentence": sentence})
        raise


@lru_cache(maxsize=1)
def divided(config: Config) -> tuple[Dataset, Partition]:
    """The data of a simulation and its partition, as every simulated site sees them."""
    data = load_data(config)
    return data, partition(data, config)


def run_seed(grid: Grid, config: Config, events: EventLog) -> None:
    """One seed: what the sites hold, what they teach, and what a model learns from it.

    Raises `FedistillError` if too few sites finish, or if they do not fit together.
    """
    out = Path(config.out)
    folder = out / f"seed-{config.seed}"
    simulated = config.server_data == "same"
    if (folder / "federated.json").exists() and ((folder / "arms.json").exists() or not simulated):
        return
    data, parts = divided(config) if simulated else (None, None)
    # the sites are told neither the server's folder nor, in a deployment, anything about disks
    work = (config.work or str(out / "work")) if simulated else ""
    run = Run(grid, dataclasses.replace(config, out="", work=work), folder, events)

    with run.stage("describe"):
        expected = len(parts.names) if parts is not None else config.sites
        if not expected:
            raise FedistillError("no-number", "sites=0: say how many sites take part, so that none is left out.")
        nodes, needed = describe_sites(run, expected, parts.names if parts is not None else ())
        task = agree(run.sites())
        check_settings(config, task)
    with run.stage("collect"):
        if not (folder / "merged").exists():
            val = data.val if data is not None else None
            save_set(collect_sets(run, nodes, task, needed, val), folder / "merged")
        merged = load_set(folder / "merged")
    with run.stage("evaluate"):
        if data is not None and parts is not None and not (folder / "arms.json").exists():

            def notify(step: int, total: int, message: str) -> None:
                run.note("", "evaluate", "progress", step=step, total=total, message=message)

            rounds = merged_sets(run)
            arms = evaluate_arms(config, data, parts, merged, Path(work) / "evaluation", notify, rounds)
            for model, figures in compare(run, nodes, data, parts, merged, needed).items():
                arms[model] |= figures
            calibration = calibration_of(config, data, merged, Path(work) / "evaluation")
            write_json(folder / "calibration.json", calibration)
            write_json(folder / "arms.json", arms)
        write_json(folder / "federated.json", evaluate_at_sites(run, nodes, task, merged))
