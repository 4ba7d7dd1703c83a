"""A simulation on a Ray cluster that runs already, whose workers know nothing of the app."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from localgrid import LocalGrid, serve
from rich.console import Console

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.processes import stop_engine, tree_with_times
from fedistill.rehearsal import free_port
from fedistill.simulation import simulate
from fedistill.synthetic.store import load_set

TINY = {
    "partition": "iid", "sites": 2, "phantom_images": 60, "phantom_classes": 2, "phantom_size": 16, "width": 4,
    "depth": 2, "experts": 1, "expert_steps": 30, "ipc": 1, "segment": 2, "iterations": 2, "syn_steps": 2,
    "eval_nets": 1, "eval_steps": 2, "eval_models": "mlp",
}  # fmt: skip
# The Python below the virtual environment, with its packages but not its .pth files: like the app inside an installed
# fedistill, the checkout is not on the path of the cluster's workers.
RAY = (str(Path(sys.executable).resolve()), "-m", "ray.scripts.scripts")
SURROUNDINGS = {
    **os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """One machine with two cores at RAY_ADDRESS: the folder of its logs. Only its own processes are ended."""
    port = free_port()
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: a short path
        words = ["start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"]
        words += ["--include-dashboard=false", "--object-store-memory=100000000"]
        log = Path(folder) / "head.log"
        with open(log, "wb") as file:
            head = subprocess.Popen([*RAY, *words], stdout=file, stderr=file, env=SURROUNDINGS, start_new_session=True)
        try:
            end = time.monotonic() + 60
            while "Ray runtime started" not in log.read_text():
                if head.poll() is not None or time.monotonic() > end:
                    raise TimeoutError(log.read_text())
                time.sleep(0.1)
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            monkeypatch.chdir(tmp_path)  # Ray puts the folder of the command on the path of its workers
            yield Path(folder) / "session_latest" / "logs"
        finally:
            stop_engine(head, tree_with_times(head.pid))


@pytest.mark.flower
def test_the_sites_work_on_the_cluster_and_it_stays(cluster: Path, tmp_path: Path) -> None:
    there, here = (make_config(TINY | {"out": str(tmp_path / name)}).resolved() for name in ("there", "here"))
    summary = simulate(there, Console(file=StringIO()))
    assert [site["status"] for site in summary["sites"]] == ["ok"] * 2
    assert sum(":actor_name:ClientAppActor" in log.read_text() for log in cluster.glob("worker-*.out")) == 2
    check = [*RAY, "health-check", "--address", os.environ["RAY_ADDRESS"]]
    subprocess.run(check, env=SURROUNDINGS, timeout=30, check=True)

    serve(LocalGrid(client_app, [{"partition-id": place} for place in range(2)]), here)
    found, expected = (load_set(Path(config.out) / "seed-0/merged") for config in (there, here))
    assert found.sites == expected.sites
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)
