"""A `fedistill` and a `python` that start at once and do little work, so that every command of the documentation can be run.

One process imports everything; each command is a fork of it. `Config.resolved` gives every amount of work a low ceiling, and what
would start Ray works in the command's own process: engines are tested elsewhere (`tests/federated`, `tests/study`, `tests/bench`).

    python workshop.py SOCKET       the process; the programs that `programs` writes connect to it
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = {
    "phantom_images": 240, "phantom_size": 16, "width": 4, "depth": 2, "experts": 2, "expert_steps": 60, "iterations": 4,
    "syn_steps": 2, "eval_nets": 1, "eval_steps": 5, "sketch_networks": 2, "sketch_frequencies": 16, "ipc": 5, "seeds": 2,
    "fl_rounds": 4, "fl_steps": 2,
}  # fmt: skip
CLIENT = """\
import array, json, os, socket, sys
door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
door.connect({door!r})
asked = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
door.sendmsg([len(asked).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
door.sendall(asked)
answer = door.recv(1)
sys.exit(answer[0] if answer else 70)
"""


def programs(folder: Path, door: Path) -> None:
    """Write `fedistill` and `python` into `folder`."""
    folder.mkdir()
    for name in ("fedistill", "python"):
        program = folder / name
        program.write_text(f"#!{sys.executable} -IS\n" + CLIENT.format(door=str(door), name=name))
        program.chmod(0o755)


def serve(door: str) -> NoReturn:
    warm()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(door)
    listening.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    print("ready", flush=True)
    while True:
        asking, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            os.setpgid(0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asking.sendall(bytes([answer(asking)]))
            os.killpg(0, signal.SIGKILL)  # workers that would linger, too
        asking.close()


def warm() -> None:
    """Import what commands import, and put the small engines in their places."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "150"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "federated")]
    import matplotlib.pyplot  # noqa: F401
    import opacus  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    from localgrid import LocalGrid, serve

    import fedistill.bench.run
    import fedistill.commands.audit
    import fedistill.evaluation.fit
    import fedistill.evaluation.probe
    import fedistill.experts.train
    import fedistill.privacy.dpsgd
    import fedistill.release.make
    import fedistill.simulation
    import fedistill.study.cell
    import fedistill.study.run
    from client.app import app as client_app
    from fedistill.bench.plan import Cell
    from fedistill.bench.schedule import Engine, work_off
    from fedistill.config import Config, make_config
    from fedistill.files import read_json, write_json
    from fedistill.study.results import record_path
    from server import collect, stages
    from server.app import divided

    torch.set_num_threads(1)
    collect.PAUSES, stages.WAIT_SIMULATED = (0.01, 0.01), 0.5  # type: ignore[assignment]
    resolved = Config.resolved

    def small(config: Config) -> Config:
        whole = resolved(config)
        amounts = {k: min(getattr(whole, k), most) for k, most in CEILINGS.items()}
        return replace(whole, slice_seconds=60.0, eval_models=whole.eval_models.split(",")[0], **amounts)

    def simulated(out: Path, console: Any, command: str) -> None:
        config = make_config(read_json(out / "config.json"))
        _, parts = divided(config.with_seed(config.seed))
        write_json(out / "engine.json", {"peak_memory_bytes": None, "seconds": 0.0, "command": command})
        serve(LocalGrid(client_app, [{"partition-id": i} for i in range(len(parts.names))]), config)

    def cell(one: Any, out: Path) -> Any:
        record_path(out, one.key).parent.mkdir(exist_ok=True)
        write_json(record_path(out, one.key), fedistill.study.cell.run(out, one.key))
        return fedistill.study.run.Child(cell=one, process=subprocess.Popen(["true"]), below={})

    def benchmark(app: Path, name: str, out: Path) -> Any:
        plan = read_json(out / "plan.json")
        cells = [
            Cell(**e | {"config": make_config(e["config"]), "against": tuple(e["against"])}) for e in plan["cells"]
        ]
        engine = Engine(submit=lambda f, *a: (f, a), wait=lambda todo: todo[0], result=lambda work: work[0](*work[1]))
        work_off(cells, out, engine, workers=1, first_seed=plan["first_seed"])
        return subprocess.Popen(["true"])

    class InTurn:
        """Instead of joblib's processes, each of which would import everything again."""

        def __init__(self, **_: Any) -> None: ...

        def __call__(self, calls: Any) -> list[Any]:
            return [function(*arguments, **named) for function, arguments, named in calls]

    attack = fedistill.commands.audit.attack
    fedistill.commands.audit.attack = lambda *a, shadows, **more: attack(*a, shadows=min(shadows, 4), **more)
    for module in (
        fedistill.evaluation.fit,
        fedistill.evaluation.probe,
        fedistill.experts.train,
        fedistill.privacy.dpsgd,
    ):
        module.Parallel = InTurn  # type: ignore[attr-defined]
    fedistill.evaluation.fit.LEARNING_RATES = stages.LEARNING_RATES = stages.LEARNING_RATES[:1]
    fedistill.evaluation.probe.STEPS = fedistill.evaluation.probe.STEPS_ON_ALL = 5  # a probe has amounts of its own
    Config.resolved = small  # type: ignore[method-assign]
    fedistill.simulation._run_engine = simulated
    fedistill.study.run._start = cell
    fedistill.bench.run.start_engine = benchmark


def answer(asking: socket.socket) -> int:
    """The exit code of one command."""
    head, places, *_ = asking.recvmsg(4, socket.CMSG_SPACE(12))
    handed = array.array("i", places[0][2])
    wanted = int.from_bytes(head, "big")
    text = b""
    while len(text) < wanted:
        text += asking.recv(wanted - len(text))
    name, words, folder, environment = json.loads(text)
    for standard, other in enumerate(handed):
        os.dup2(other, standard)
        os.close(other)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    sys.argv = [name, *words]
    try:
        fedistill_command() if name == "fedistill" else python_program(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def fedistill_command() -> None:
    from fedistill import cli

    cli.main()


def python_program(words: list[str]) -> None:
    """What `python`, with a file or with a program at its input, would do. Examples find the user's `images` and `labels`."""
    import torch

    program = Path(words[0]).read_text() if words else sys.stdin.read()
    given = {"images": torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8), "labels": torch.arange(60) % 3}
    exec(compile(program, "example", "exec"), {"__name__": "__main__", **given})


if __name__ == "__main__":
    serve(sys.argv[1])
