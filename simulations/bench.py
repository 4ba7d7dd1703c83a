"""The cells of a benchmark on Ray: `python bench.py OUT [PARENT]`, where OUT holds a plan.json (see `fedistill.bench.run`).

As many tasks run at once as there are `workers`, each in a process with one thread. On a cluster (RAY_ADDRESS) OUT must lie
on a disk that all machines see, and fedistill must be installed on them. Exit code 0: done, though cells may have failed,
1: a defect (in the log). PARENT is the process that must stay alive: without it, the work ends.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations.engine import gpu_share, leave, start_ray, watch  # isort: skip

import ray

from fedistill.bench.plan import Cell
from fedistill.bench.schedule import Engine, work_off
from fedistill.config import make_config
from fedistill.files import read_json


def run(out: Path) -> None:
    plan = read_json(out / "plan.json")
    cells = [
        Cell(**entry | {"config": make_config(entry["config"]), "against": tuple(entry["against"])})
        for entry in plan["cells"]
    ]
    start_ray(plan["workers"] or os.cpu_count() or 1)
    workers = plan["workers"] or int(ray.cluster_resources().get("CPU", 1))
    work_off(cells, out, ray_engine(gpu_share(plan["device"], workers)), workers=workers, first_seed=plan["first_seed"])


def ray_engine(gpus: float) -> Engine:
    """One core and `gpus` of a GPU per task. A task whose process dies is not tried again here, but by the next run."""
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)

    def submit(function: Callable[..., Any], *arguments: Any) -> Any:
        return remote(function).remote(*arguments)

    def wait(handles: Sequence[Any]) -> Any:
        return ray.wait(list(handles), num_returns=1)[0][0]

    return Engine(submit=submit, wait=wait, result=ray.get)


def main(arguments: list[str]) -> NoReturn:
    if len(arguments) > 1:
        threading.Thread(target=watch, args=(int(arguments[1]),), daemon=True).start()
    try:
        run(Path(arguments[0]).resolve())
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
