"""Time and memory of a simulated federation against its sites: `python simulations/benchmarks/scaling.py --out scaling.csv`.

Every site has the same number of phantoms and the same work, so twice the sites are twice the work: what a site costs should not
depend on how many there are, and the memory only on how many work at the same time. A row is a `fedistill simulate`;
`site_seconds` is the time from the first message about distillation to the last set, times the cores, over the sites.
Numbers of sites that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fedistill.events import read_events
from fedistill.files import read_json

SITES = (2, 4, 8, 16, 32)
PER_SITE = 143  # phantoms, of which 70 % are training images
WORK = (
    "ipc=5", "method=cf", "preset=quick", "partition=iid", "phantom_classes=4", "eval_models=convnet", "eval_nets=1",
    "eval_steps=10", "iterations=200", "expert_steps=100", "experts=2",
)  # fmt: skip
COLUMNS = ("sites", "seconds", "site_seconds", "peak_memory_bytes")


def measure(sites: int) -> dict[str, float]:
    """One federation of so many sites."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        sets = [word for pair in (*WORK, f"phantom_images={PER_SITE * sites}") for word in ("--set", pair)]
        command = [sys.executable, "-m", "fedistill.cli", "simulate", "--data", "phantom", "--sites", str(sites), *sets]
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        events, _ = read_events(out / "events.jsonl")
        times = {e.status: e.t for e in events if e.phase == "collect" and not e.site and e.status in ("start", "done")}
        summary = read_json(out / "summary.json")
    cores = min(os.cpu_count() or 1, sites)
    return {
        "sites": sites,
        "seconds": round(summary["seconds"], 1),
        "site_seconds": round((times["done"] - times["start"]) * cores / sites, 2),
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    file = parser.parse_args().out
    rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    for sites in SITES:
        if str(sites) in {row["sites"] for row in rows}:
            continue
        rows.append({k: str(v) for k, v in measure(sites).items()})
        print(rows[-1], flush=True)
        with open(file, "w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
