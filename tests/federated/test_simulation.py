"""`simulate`: bad input is refused before work starts; one real run on Flower's Ray engine; stop and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedistill.config import Config
from fedistill.data import partition as partition_module
from fedistill.errors import FedistillError
from fedistill.events import read_events
from fedistill.files import read_json
from fedistill.processes import process_tree, start_time, tree_with_times
from fedistill.simulation import absolute, app_folder, check, simulate

TINY = {
    "partition": "iid", "sites": 3, "phantom_images": 90, "phantom_classes": 2, "phantom_size": 16, "width": 8,
    "depth": 2, "experts": 1, "expert_steps": 60, "ipc": 1, "segment": 2, "iterations": 4, "syn_steps": 2,
    "eval_nets": 1, "eval_steps": 5, "eval_models": "mlp",
}  # fmt: skip


def test_bad_input_leaves_no_folder(tmp_path: Path) -> None:
    for config in (Config(data="pathmnst"), Config(method="dattm"), Config(eval_models="vitt"), Config(sites=1000)):
        with pytest.raises(FedistillError):
            simulate(Config(**config.to_dict() | {"out": str(tmp_path / "run")}), Console(file=StringIO()))
    assert not (tmp_path / "run").exists()


def test_every_seed_is_divided_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that few draws can divide: a seed that cannot is found at once, and the seeds before it alone are sound."""
    monkeypatch.setattr(partition_module, "_DRAWS", 1)
    few = Config(**TINY | {"method": "dm", "partition": "dirichlet", "alpha": 0.1, "sites": 4})  # type: ignore[arg-type]

    def sound(seed: int) -> bool:
        try:
            check(few.with_seed(seed))
        except FedistillError:
            return False
        return True

    first = next(seed for seed in range(50) if sound(seed) and not sound(seed + 1))
    with pytest.raises(FedistillError, match=f"^With seed {first + 1}: In 1 draws") as caught:
        check(replace(few, seed=first, seeds=2))
    assert caught.value.code == "empty-site"


def test_a_budget_that_a_site_of_a_later_seed_does_not_have() -> None:
    findings = TINY | {"method": "dm", "task": "multilabel", "partition": "quantity"}
    sizes = {}
    for seed in range(10):
        sizes[seed] = min(len(site.train) for site in check(Config(**findings | {"ipc": 1, "seed": seed})))  # type: ignore[arg-type]
    first = next(seed for seed in range(9) if sizes[seed + 1] < sizes[seed] - 1)
    config = Config(**findings | {"ipc": sizes[first] // 2, "seed": first, "seeds": 2})  # type: ignore[arg-type]
    check(replace(config, seeds=1))
    with pytest.raises(FedistillError, match=f"^With seed {first + 1}: ipc=") as caught:
        check(config)
    assert caught.value.code == "budget"


def test_a_name_of_data_stays_one_beside_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("phantom", "bloodmnist", "images"):
        Path(folder).mkdir()
    for said, becomes in (("phantom", "phantom"), ("bloodmnist", "bloodmnist"), ("images", str(tmp_path / "images"))):
        assert absolute(Config(data=said)).data == becomes
    assert absolute(Config(data="no-such")).data == "no-such"


def test_app_is_found() -> None:
    assert (app_folder() / "client" / "app.py").exists()


def test_process_tree_sees_a_grandchild() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    if not Path("/proc/self/stat").exists():
        pytest.skip("there is no /proc")
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 10
        while len(process_tree(child.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        tree = process_tree(child.pid)
        assert len(tree) == 2
        assert all(map(start_time, tree))
    finally:
        for pid in process_tree(child.pid):
            os.kill(pid, signal.SIGKILL)
        child.wait()
    assert process_tree(child.pid) == []


@pytest.mark.flower
def test_real_run_on_the_ray_engine(tmp_path: Path) -> None:
    config = Config(**TINY, out=str(tmp_path / "run"), seeds=1, fl_rounds=1, fl_steps=2)  # type: ignore[arg-type]
    summary = simulate(config, Console(file=StringIO()))
    assert [s["status"] for s in summary["sites"]] == ["ok"] * 3
    assert summary["arms"]["fedavg"]["upload_bytes"] > 0
    assert summary["peak_memory_bytes"] is None or summary["peak_memory_bytes"] > 10**8
    began = time.monotonic()
    assert simulate(config, Console(file=StringIO())) == summary  # finished: nothing starts
    assert time.monotonic() - began < 5
    with pytest.raises(FedistillError, match="other settings"):
        simulate(Config(**TINY | {"ipc": 2}, out=str(tmp_path / "run")), Console(file=StringIO()))  # type: ignore[arg-type]


@pytest.mark.flower
def test_stopped_run_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = TINY | {"expert_steps": 1500, "slice_seconds": 1.0, "out": str(out)}
    code = (
        "from rich.console import Console; from fedistill.config import Config; "
        "from fedistill.simulation import simulate; "
        f"simulate(Config(**{values!r}), Console(), command='again')"
    )
    path = os.pathsep.join([str(app_folder()), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and not any(e.step for e in read_events(out / "events.jsonl")[0]):
        time.sleep(0.1)
    below = tree_with_times(child.pid)
    child.terminate()
    said, _ = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "The same command goes on from here: again" in said
    time.sleep(0.5)
    assert [pid for pid, started in below.items() if started and start_time(pid) == started] == []
    simulate(Config(**values), Console(file=StringIO()))  # type: ignore[arg-type]
    assert read_json(out / "summary.json")["sites"][0]["status"] == "ok"
