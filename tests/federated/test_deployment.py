"""A real federation on this machine: a SuperLink with TLS, three SuperNodes with their own data, keys and policies."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from deployed import Federation
from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.files import read_json
from fedistill.simulation import app_folder
from fedistill.site.gate import decide, read_log, requests
from fedistill.site.policy import read_policy
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
    policies = {}
    for place, (name, file) in enumerate(files.items()):
        write_npz(file, parts.at(data, place))
        manual = {"release": {"manual": True}} if place == 0 else {}
        policies[name] = Path(real_site(name, tmp_path / f"work-{name}", str(file), **manual)["site-config"])
    careful = read_policy(policies[parts.names[0]])
    done = threading.Event()

    def officer() -> None:
        while not done.wait(0.2):
            for request in requests(careful):
                time.sleep(1)  # the server hears that it waits
                decide(careful, request.id, approved=True, reason="seen", who="officer")
                return

    person = threading.Thread(target=officer)
    person.start()
    out = tmp_path / "run"
    try:
        with Federation(tmp_path / "federation", policies) as federation:
            federation.run(app_folder(), SETTINGS | {"server_data": "none", "slice_seconds": 30.0}, out, 240)
    finally:
        done.set()
        person.join()
    assert [d.who for d in read_log(careful.work / f"site-{parts.names[0]}")] == ["officer"]
    summary = read_json(out / "summary.json")
    assert {site["status"] for site in summary["sites"]} == {"ok"}
    assert summary["arms"]["distilled"]["accuracy"]["mean"] is not None
    assert "/work-" not in json.dumps(summary)

    config = make_config(whole.to_dict() | {"out": str(tmp_path / "simulated")}).resolved()
    serve(LocalGrid(client_app, [{"partition-id": place} for place in range(3)]), config)
    real, simulated = (load_set(place / "seed-0/merged") for place in (out, tmp_path / "simulated"))
    assert real.sites == simulated.sites
    assert torch.equal(real.images, simulated.images)
    assert torch.equal(real.labels, simulated.labels)
