"""A real federation on this machine: a SuperLink with TLS, three SuperNodes with their own data, keys and policies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from localgrid import LocalGrid, serve

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.files import read_json
from fedistill.processes import process_tree, start_time
from fedistill.rehearsal import Federation, fedistill, rehearse, write_npz
from fedistill.synthetic.store import load_set

SETTINGS = {
    "sites": 3, "width": 8, "depth": 2, "experts": 1, "expert_steps": 60, "ipc": 1, "segment": 2, "iterations": 4, "syn_steps": 2,
    "eval_nets": 1, "eval_steps": 5, "eval_models": "mlp", "method": "mtt", "skip_above": 1000.0, "modality": "generic",
}  # fmt: skip


@pytest.mark.flower
def test_three_hospitals_over_tls_make_what_the_simulation_makes(tmp_path: Path) -> None:
    whole = make_config({"phantom_images": 90, "phantom_classes": 2, "phantom_size": 16, "partition": "iid"} | SETTINGS)
    data = load_data(whole.resolved())
    parts = partition(data, whole.resolved())
    files = {name: tmp_path / f"{name}.npz" for name in parts.names}
    for place, file in enumerate(files.values()):
        write_npz(file, parts.at(data, place))
    first, *others = parts.names
    rules = dict.fromkeys(others, "") | {first: "[release]\nmanual = true\n"}
    federation = Federation(tmp_path / "federation", files, rules)
    done = threading.Event()

    def officer() -> None:
        while not done.wait(0.5):
            if not federation.policy(first).exists():
                continue
            for request in json.loads(fedistill("site", "pending", "--json", "--site", federation.policy(first))):
                fedistill("site", "approve", request["id"], "--reason", "seen", "--site", federation.policy(first))
                return

    person = threading.Thread(target=officer)
    try:
        with federation:
            person.start()
            running = {
                pid: start_time(pid) for child in federation.processes.values() for pid in process_tree(child.pid)
            }
            out = federation.run("first", SETTINGS | {"slice_seconds": 30.0}, 240)
            told = json.loads(fedistill("server", "status", federation.server, "first", "--json"))
            nodes = json.loads(fedistill("server", "sites", federation.server, "--json"))
            here = json.loads(fedistill("site", "status", "--site", federation.policy(first), "--json"))
            fedistill("server", "fetch", federation.server, "first", "--to", tmp_path / "fetched")
    finally:
        done.set()
        person.join()
    assert len(running) >= 8  # a SuperLink, two SuperExecs, SuperNodes, and those that look after them
    assert not [pid for pid, began in running.items() if start_time(pid) == began]  # nothing outlives it
    assert (here["state"], here["last_message"]["kind"]) == ("connected", "evaluate.models")
    assert here["last_slice"]["phase"] == "ready"
    assert told["finished"]
    assert {site: line["status"] for site, line in told["sites"].items()} == dict.fromkeys(
        [*parts.names, "server"], "done"
    )
    assert sorted((node["name"], node["status"]) for node in nodes["nodes"]) == [
        (name, "online") for name in sorted(parts.names)
    ]
    log = json.loads(fedistill("site", "log", "--json", "--site", federation.policy(first)))
    assert [(d["approved"], d["reason"]) for d in log] == [(True, "seen")]
    summary = read_json(out / "summary.json")
    assert {site["status"] for site in summary["sites"]} == {"ok"}
    assert summary["arms"]["distilled"]["accuracy"]["mean"] is not None
    assert str(tmp_path / "federation" / first) not in json.dumps(summary)

    config = make_config(whole.to_dict() | {"out": str(tmp_path / "simulated")}).resolved()
    serve(LocalGrid(client_app, [{"partition-id": place} for place in range(3)]), config)
    places = (tmp_path / "fetched", tmp_path / "simulated")
    real, simulated = (load_set(place / "seed-0/merged") for place in places)
    assert real.sites == simulated.sites
    assert torch.equal(real.images, simulated.images)
    assert torch.equal(real.labels, simulated.labels)


@pytest.mark.flower
def test_a_rehearsal_plays_it_all_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines: list[str] = []
    rehearse(None, 2, lines.append)
    commands = [" ".join(line.split()[2:4]) for line in lines if line.startswith("$ fedistill ")]
    for command in (
        *("server init", "server start", "server add-site", "site init", "site check", "server admit", "site start"),
        *("server sites", "server run", "site pending", "site show", "site approve", "server status", "server fetch"),
    ):
        assert command in commands
    assert "epsilon=3.00" in lines[-2]
    assert not list(tmp_path.iterdir())
