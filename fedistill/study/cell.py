"""One cell in a process of its own: `python -m fedistill.study.cell OUT KEY PARENT`, where OUT holds a study.json.

Runs the simulation in `OUT/cells/KEY` and leaves in `OUT/records/KEY.json` what came out: rows of the results, or how it failed.
Exit code 0: there is a record, 130: stopped. PARENT is the process that must stay alive: without it, the cell stops.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.files import read_json, write_json
from fedistill.study.results import defect, record_path, rows_of_run


def run(out: Path, key: str) -> dict[str, Any]:
    """The record of the cell `key` of the study in `out`. Never raises, except where it is stopped."""
    from fedistill.simulation import simulate

    began, config = time.monotonic(), Config(**read_json(out / "study.json")["configs"][key])
    record: dict[str, Any] = {"key": key, "seeds": list(range(config.seed, config.seed + config.seeds)), "rows": []}
    try:
        # The record says what is finished, and a study may go back to fewer seeds, which a run refuses to.
        (Path(config.out) / "summary.json").unlink(missing_ok=True)
        summary = simulate(config, Console(file=sys.stdout, width=120))
        record |= {"status": "ok", "code": "", "reason": "", "rows": rows_of_run(config, Path(config.out))}
        record |= {"peak_memory_bytes": summary["peak_memory_bytes"]}
    except FedistillError as error:
        record |= {"status": "failed", "code": error.code, "reason": error.sentence}
    except Exception as error:  # one bad cell must not stop the others
        traceback.print_exc()
        record |= {"status": "failed", "code": "defect", "reason": defect(out, key, type(error).__name__)}
    return record | {"seconds": time.monotonic() - began}


def watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # as if the parent had asked for it


def main(arguments: list[str]) -> None:
    out, key, parent = Path(arguments[0]), arguments[1], int(arguments[2])
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
    write_json(record_path(out, key), run(out, key))


if __name__ == "__main__":
    main(sys.argv[1:])
