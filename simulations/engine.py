"""One simulated run on Flower's Ray engine: `python engine.py OUT [PARENT]`, where OUT holds a config.json.

Every site is a virtual SuperNode. As many of them work at once as there are actors (one per core, or `workers`), so
memory follows the sites at work and not the sites simulated. Exit code 0: done, 2: a mistake that the user can mend
(in error.json), 1: a defect (in the log). PARENT is the process that must stay alive: without it, the run ends.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# Before flwr and ray are imported: nothing here calls home, and nothing is installed while it runs.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or a thread of Flower starts Ray again while it is being shut down
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# The app (`client`, `server`) lies beside this folder, in the checkout as in the wheel. Ray's workers inherit the path.
APP = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, APP)
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (APP, os.environ.get("PYTHONPATH", "")) if p)

import ray  # noqa: E402
import torch  # noqa: E402
from flwr.app import Context  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

from client.app import app as client_app  # noqa: E402
from fedistill.config import Config, make_config  # noqa: E402
from fedistill.errors import FedistillError  # noqa: E402
from fedistill.files import read_json  # noqa: E402
from server.app import divided  # noqa: E402
from server.app import main as server_main  # noqa: E402

RESTARTS = 5  # of one actor: Flower keeps a dead actor in its pool, where it would fail every message it is given
OBJECT_STORE = 512 * 2**20  # bytes; what passes through are messages, the data stay in the actors


def run(config: Config) -> None:
    """Carry out the run. Raises `FedistillError` as the server app does."""
    _, parts = divided(config.with_seed(config.seed))
    sites = len(parts.names)
    at_once = min(config.worker_count(), sites)
    start_ray(at_once)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config = config.to_dict()  # run_simulation hands over an empty one
        server_main(grid, context)

    share = gpu_share(config.device, at_once)
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": share, "max_restarts": RESTARTS}
    run_simulation(server, client_app, sites, backend_config={"client_resources": resources})


def gpu_share(device: str, at_once: int) -> float:
    """The part of a GPU that each of `at_once` processes gets."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return min(1.0, int(1000 * gpus / at_once) / 1000)


def start_ray(actors: int) -> None:
    """Start Ray before Flower does: Flower would not take our signal handler, object store and log level."""
    # "local": not a cluster that happens to run here
    where: dict[str, Any] = {"address": "local", "num_cpus": actors, "object_store_memory": OBJECT_STORE}
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        path = os.pathsep.join((os.environ["PYTHONPATH"], "${PYTHONPATH}"))  # Ray puts each worker's own in
        where = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}  # which does not inherit ours
    ray.init(include_dashboard=False, logging_level=logging.WARNING, **where)
    signal.signal(signal.SIGTERM, stop)


def stop(number: int = signal.SIGTERM, frame: FrameType | None = None) -> NoReturn:
    """End this process and Ray, whatever Flower's threads are waiting for."""
    leave(128 + number)


def leave(code: int) -> NoReturn:
    timer = threading.Timer(10, os._exit, (code,))
    timer.daemon = True
    timer.start()
    sys.stdout.flush()
    sys.stderr.flush()
    ray.shutdown()
    os._exit(code)


def watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    leave(1)


def main(arguments: list[str]) -> NoReturn:
    logging.getLogger("flwr").addFilter(lambda record: "deprecated" not in record.getMessage().lower())
    out = Path(arguments[0]).resolve()
    if len(arguments) > 1:
        threading.Thread(target=watch, args=(int(arguments[1]),), daemon=True).start()
    try:
        run(dataclasses.replace(make_config(read_json(out / "config.json")), out=str(out)))
    except FedistillError as error:
        print(error.sentence, file=sys.stderr)
        leave(2)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
