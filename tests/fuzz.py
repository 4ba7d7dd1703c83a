"""The drill: many spoiled inputs for everything that reads bytes from outside.

    python tests/fuzz.py --inputs 100000 --seed 0 [--out FILE.csv] [--only READER] [--repeat FILE]

An input is taken, to the bit, or refused with a code; anything else is a fault, whose input is saved to be tried again with
`--repeat`, and the exit code is 1. Inputs that reach a new line of the readers are spoiled further.
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hostile import Input, Reader, loaded, mutated, outcome, readers, saved  # noqa: E402

WATCHED = (
    "fedistill/wire.py",
    "fedistill/synthetic",
    "fedistill/release",
    "fedistill/deploy.py",
    "server/replies.py",
    "client/",
)
SHARES = {"release": 0.2, "job: judge models": 0.5, "folder of a set": 0.7}  # of an equal part, for what takes longest
MOST_KEPT = 400  # inputs that reached something new, per reader
ADDRESSES = 2 * 2**30  # bytes that may be asked for beyond what the drill itself has


class Lines:
    """The lines of the watched files that were reached; `fresh` counts those that were new."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.fresh = 0
        self._watched: dict[str, bool] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in self._watched:
            self._watched[name] = name.startswith(tuple(str(ROOT / part) for part in WATCHED))
        return self._line if self._watched[name] else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if place not in self.seen:
            self.seen.add(place)
            self.fresh += 1
        return self._line


def peak() -> float:
    """The most memory that this process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def drill(name: str, reader: Reader, inputs: int, seed: int, lines: Lines, faults: Path) -> dict[str, Any]:
    rng, kept, counts = Random(f"{seed} {name}"), list(reader.seeds), Counter[str]()
    for given in reader.seeds:
        if (found := outcome(reader, given)) != "taken":
            raise SystemExit(f"{name}: a valid input is {found}")
    began, before, longest = time.monotonic(), peak(), 0.0
    for k in range(inputs):
        given = mutated(rng.choice(kept), rng, reader.seeds)
        lines.fresh, start = 0, time.monotonic()
        sys.settrace(lines)
        try:
            found = outcome(reader, given)
        except Exception as error:
            sys.settrace(None)
            found = f"FAULT {type(error).__name__}"
            file = faults / f"{name.replace(' ', '-').replace(':', '')}-{seed}-{k}.json"
            if counts[found] < 5:
                faults.mkdir(parents=True, exist_ok=True)
                file.write_text(saved(given))
                print(f"{name}: {file}\n{traceback.format_exc()}", file=sys.stderr)
        finally:
            sys.settrace(None)
        counts[found] += 1
        longest = max(longest, time.monotonic() - start)
        if lines.fresh and len(kept) < MOST_KEPT:
            kept.append(given)
    seconds = time.monotonic() - began
    return {"counts": counts, "seconds": seconds, "longest": longest, "grown": peak() - before}


def main() -> int:
    parser = argparse.ArgumentParser(description="Spoiled inputs for everything that reads bytes from outside.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--repeat", type=Path)
    parser.add_argument("--faults", type=Path, default=Path("faults"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, lines = [], Lines()
    with tempfile.TemporaryDirectory() as place:
        found = readers(Path(place))
        if asked.repeat:
            given: Input = loaded(asked.repeat.read_text())
            print(outcome(found[asked.only], given))
            return 0
        chosen = {name: reader for name, reader in found.items() if asked.only in (None, name)}
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + ADDRESSES, resource.RLIM_INFINITY))
        parts = sum(SHARES.get(name, 1.0) for name in chosen)
        for name, reader in chosen.items():
            count = int(asked.inputs * SHARES.get(name, 1.0) / parts) + 1
            told = drill(name, reader, count, asked.seed, lines, asked.faults)
            print(f"{name}: {count} in {told['seconds']:.0f} s, longest {told['longest']:.2f} s, +{told['grown']:.0f} MB,",
                  ", ".join(f"{code} {n}" for code, n in told["counts"].most_common()), flush=True)  # fmt: skip
            figures = (f"{told['seconds']:.1f}", f"{told['longest']:.3f}", f"{told['grown']:.0f}")
            rows += [(name, code, n, count, *figures) for code, n in told["counts"].most_common()]
    print(f"{sum(row[2] for row in rows)} inputs, {len(lines.seen)} lines reached, {peak():.0f} MB at most")
    if asked.out:
        with open(asked.out, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("reader", "outcome", "inputs", "of", "seconds", "longest_seconds", "memory_grown_mb"))
            table.writerows(rows)
    return 1 if any(row[1].startswith("FAULT") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
