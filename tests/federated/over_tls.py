"""A real federation over TLS on this machine against the simulation of it, and what messages cost.

    PYTHONPATH=. python tests/federated/over_tls.py equal --data wbc_sites.npz --modality microscopy
    PYTHONPATH=. python tests/federated/over_tls.py cost

equal: sites with keys and data of their own against simulated ones of one process, under a server that has no data; says what is
equal in sets, counts of answers and summary, seed by seed.
cost: seconds of a message that asks for next to nothing, and of a set of 100 MB from the site's last look at it until the
server has checked and stored it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from contextlib import chdir
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from localgrid import LocalGrid, serve

from client.app import app as client_app
from fedistill.config import make_config
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.events import Event, read_events
from fedistill.files import read_json
from fedistill.rehearsal import Federation, write_npz
from fedistill.synthetic.store import load_set

SIDE, IMAGES = 96, 3700  # of three channels: 102 MB


def equal(folder: Path, source: str, modality: str, ipc: int, seeds: int) -> None:
    settings: dict[str, Any] = {"preset": "quick", "ipc": ipc, "seeds": seeds, "modality": modality, "workers": 1}
    whole = make_config(settings | {"data": source, "partition": "site"}).resolved()
    data = load_data(whole)
    parts = partition(data, whole)
    files = {name: folder / f"{name}.npz" for name in parts.names}
    for place, file in enumerate(files.values()):
        write_npz(file, parts.at(data, place))
    simulated = folder / "simulated"
    nodes = [{"partition-id": place} for place in range(len(files))]
    alone = {"data": source, "partition": "site", "server_data": "none", "sites": len(files)}
    config = make_config(settings | alone | {"out": str(simulated), "work": str(folder / "work")}).resolved()
    with chdir(folder):  # a server without data leaves it to the sites where they work
        serve(LocalGrid(client_app, nodes), config)
    with Federation(folder / "federation", files, dict.fromkeys(files, "")) as federation:
        real = federation.run("real", settings | {"sites": len(files)}, 3600)
    for seed in range(seeds):
        one, other = (place / f"seed-{seed}" for place in (simulated, real))
        first, second = (load_set(place / "merged") for place in (one, other))
        sets = first.sites == second.sites and all(
            torch.equal(getattr(first, name), getattr(second, name)) for name in ("images", "labels", "site")
        )
        counts = read_json(one / "federated.json") == read_json(other / "federated.json")
        print(f"seed {seed}: sets equal: {sets}; counts of answers equal: {counts}")
    there, here = (plain(read_json(place / "summary.json")) for place in (simulated, real))
    print("summaries differ in:", ", ".join(sorted(differing(there, here))) or "nothing")
    print(json.dumps(here["arms"]["distilled"]))


def plain(value: Any) -> Any:
    """Without what time, place and chance of the day put in."""
    if isinstance(value, dict):
        return {
            k: plain(v)
            for k, v in value.items()
            if not re.search(r"second|time|created|path|out$|work$|engine|version", k)
        }
    return [plain(v) for v in value] if isinstance(value, list) else value


def differing(one: Any, other: Any, at: str = "") -> set[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return set().union(
            *(differing(one.get(k), other.get(k), f"{at}.{k}".strip(".")) for k in one.keys() | other.keys())
        )
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return set().union(*(differing(a, b, at) for a, b in zip(one, other, strict=True)))
    return set() if one == other else {at}


def cost(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["a", "b"])}
    for name, n in (("train", IMAGES), ("val", 4), ("test", 4)):
        arrays |= {f"{name}_images": rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)}
        arrays |= {f"{name}_labels": (np.arange(n) % 2)[:, None].astype(np.uint8)}
    np.savez(folder / "large.npz", **arrays)
    small = {
        "width": 8,
        "depth": 2,
        "experts": 1,
        "expert_steps": 20,
        "segment": 1,
        "iterations": 1,
        "syn_steps": 1,
        "syn_batch": 2,
    }
    rest = {
        "eval_nets": 1,
        "eval_steps": 1,
        "eval_models": "mlp",
        "method": "mtt",
        "skip_above": 1e9,
        "slice_seconds": 600.0,
    }
    with Federation(folder / "federation", {"large": folder / "large.npz"}, {"large": ""}) as federation:
        waits = []
        for ipc in (1, 1, 1, IMAGES // 2):
            name = f"ipc-{ipc}-{len(waits)}"
            out = federation.run(name, small | rest | {"sites": 1, "ipc": ipc, "seed": len(waits)}, 1800)
            events, _ = read_events(out / "events.jsonl")
            waits.append(at(events, "describe", "done") - at(events, "describe", "start"))
            made = max(
                (federation.folder / "large" / "work").rglob("request.json"), key=lambda file: file.stat().st_mtime
            )
            left = datetime.fromisoformat(read_json(made)["made"]).timestamp()
            sent = read_json(out / "summary.json")["sites"][0]["upload_bytes"]
            print(
                f"set of {sent / 1e6:.1f} MB: with the server after {at(events, 'collect', 'done') - left:.1f} s (to the second)"
            )
    print(f"a message that asks for next to nothing: {statistics.median(waits):.1f} s (median of {len(waits)})")


def at(events: list[Event], phase: str, status: str) -> float:
    return next(e.t for e in events if e.phase == phase and e.status == status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["equal", "cost"])
    parser.add_argument("--data")
    parser.add_argument("--modality", default="auto")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.what == "cost":
            cost(Path(folder))
        else:
            equal(Path(folder), str(Path(given.data).absolute()), given.modality, given.ipc, given.seeds)


if __name__ == "__main__":
    main()
