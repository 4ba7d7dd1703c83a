"""Child processes: those that are ended are gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedistill.errors import FedistillError
from fedistill.processes import check_cluster, end_all, start_engine, start_time, tree_with_times
from fedistill.rehearsal import free_port

LARGE = "import time; held = bytes(range(256)) * 1_000_000; print(flush=True); time.sleep(600)"
PARENT = f"""
import subprocess, sys, time
below = [subprocess.Popen([sys.executable, "-c", {LARGE!r}], stdout=subprocess.PIPE) for _ in range(2)]
for child in below:
    child.stdout.readline()
print(flush=True)
time.sleep(600)
"""

WITH_IMAGES = """
import time, joblib, numpy
def train(images):
    time.sleep(600)
joblib.Parallel(2, backend="loky")(joblib.delayed(train)(numpy.zeros(2_000_000)) for _ in range(2))
"""


def test_large_processes_below_another_are_gone_when_all_have_been_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        tree = tree_with_times(parent.pid)
        end_all(tree)
        assert len(tree) == 3
        assert not [pid for pid, began in tree.items() if start_time(pid) == began]


def test_a_process_with_words_in_another_encoding_is_ended_too() -> None:
    words = [sys.executable, b"-c", b"input()", b"/data/M\xfcller"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        end_all(tree_with_times(process.pid))
        assert process.wait(10) < 0


def test_another_process_under_the_number_of_an_ended_one_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        end_all({process.pid: "an earlier time"})
        assert process.poll() is None
        process.communicate(b"\n")


def test_images_that_ended_processes_shared_are_gone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))  # in place of shared memory
    with subprocess.Popen([sys.executable, "-c", WITH_IMAGES]) as parent:
        until = time.monotonic() + 60
        while not list(tmp_path.rglob("*.pkl")) and time.monotonic() < until:
            time.sleep(0.05)
        assert list(tmp_path.rglob("*.pkl"))
        end_all(tree_with_times(parent.pid))
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:99999", "nowhere.invalid:6379", "a..b:1"]
)
def test_a_ray_cluster_that_does_not_answer_is_said_at_once(monkeypatch, tmp_path: Path, form: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", form.format(port=free_port()))
    with pytest.raises(FedistillError, match="but no Ray cluster answers there: start it, or unset RAY_ADDRESS"):
        start_engine(tmp_path, "engine.py", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "[::1]:{port}", "auto", "local", ""])
def test_a_ray_cluster_that_answers_or_has_no_port_is_taken(monkeypatch, form: str) -> None:
    host = "::1" if "::" in form else "127.0.0.1"
    try:
        cluster = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip(f"{host} is no address of this machine.")
    with cluster:
        monkeypatch.setenv("RAY_ADDRESS", form.format(port=cluster.getsockname()[1]))
        check_cluster()
