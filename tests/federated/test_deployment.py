"""A real federation on this machine: a SuperLink with TLS, three SuperNodes with their own data, keys and policies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from deployed import Federation, fedistill
from localgrid import LocalGrid, serve

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.files import read_json
from fedistill.synthetic.store import load_set

SETTINGS = {
    "sites": 3, "width": 8, "depth": 2, "experts": 1, "expert_steps": 60, "ipc": 1, "segment": 2, "iterations": 4, "syn_steps": 2,
    "eval_nets": 1, "eval_steps": 5, "eval_models": "mlp", "method": "mtt", "skip_above": 1000.0, "modality": "generic",
}  # fmt: skip


def write_npz(path: Path, data: Dataset) -> None:
    """As files of MedMNIST have it."""
    arrays = {"class_names": np.array(data.class_names)}
    for part in ("train", "val", "test"):
        split: Split = getattr(data, part)
        arrays |= {f"{part}_images": split.images[:, 0].numpy(), f"{part}_labels": split.labels[:, None].numpy()}
    np.savez(path, **arrays)


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
            out = federation.run("first", SETTINGS | {"slice_seconds": 30.0}, 240)
            told = json.loads(fedistill("server", "status", federation.server, "first", "--json"))
            nodes = json.loads(fedistill("server", "sites", federation.server, "--json"))
    finally:
        done.set()
        person.join()
    assert told["finished"]
    assert {site: line["status"] for site, line in told["sites"].items()} == dict.fromkeys(
        [*parts.names, "server"], "done"
    )
    assert [node["status"] for node in nodes["nodes"]] == ["online"] * 3
    log = json.loads(fedistill("site", "log", "--json", "--site", federation.policy(first)))
    assert [(d["approved"], d["reason"]) for d in log] == [(True, "seen")]
    summary = read_json(out / "summary.json")
    assert {site["status"] for site in summary["sites"]} == {"ok"}
    assert summary["arms"]["distilled"]["accuracy"]["mean"] is not None
    assert str(tmp_path / "federation" / first) not in json.dumps(summary)

    config = make_config(whole.to_dict() | {"out": str(tmp_path / "simulated")}).resolved()
    serve(LocalGrid(client_app, [{"partition-id": place} for place in range(3)]), config)
    real, simulated = (load_set(place / "seed-0/merged") for place in (out, tmp_path / "simulated"))
    assert real.sites == simulated.sites
    assert torch.equal(real.images, simulated.images)
    assert torch.equal(real.labels, simulated.labels)
