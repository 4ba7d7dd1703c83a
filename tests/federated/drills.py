"""Things that go wrong between hospitals, done for real to processes on this machine: what is lost, and how long it takes.

    PYTHONPATH=. python tests/federated/drills.py --out drills.csv [NAME ...]
    PYTHONPATH=. python tests/federated/drills.py --out drills.csv --table

One server with TLS and two sites, set up with the commands that people use. Every drill runs the same job under another seed,
does its harm, and compares the merged set with that of an undisturbed run: `lost` says what had to be done again.
A drill that is in the file already is not done again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import drills_outside as outside
import numpy as np
from stage import JOB, LONGEST, SITES, Result, Stage, about, before_all, disturbed, set_of

from fedistill.deploy import HERE, environment, read_server, run_words
from fedistill.rehearsal import fedistill
from fedistill.simulation import app_folder
from fedistill.site.gate import identity
from fedistill.synthetic.store import load_set

KILLS, PARTS = 12, 0.6  # how many, and which share of them are parts of a run
NEWER = """\
import fedistill.config
fedistill.config.ALGORITHM += 1000
"""


def client_killed(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of the process that works at a site"""

    def harm() -> float:
        client = stage.client_of("north")
        os.kill(client, signal.SIGKILL)
        return time.monotonic()

    return disturbed(stage, name, seed, harm)


def client_stopped(stage: Stage, name: str, seed: int) -> Result:
    """SIGTERM to the process that works at a site, when it has its job"""

    def harm() -> float:
        client = stage.client_of("north")
        time.sleep(8)  # it imports PyTorch, and fetches the job
        os.kill(client, signal.SIGTERM)
        return time.monotonic()

    result = disturbed(stage, name, seed, harm, slice_seconds=20.0, iterations=1000)
    return replace(result, ok=result.ok and "its client process died" in result.sees)


def site_restarted(stage: Stage, name: str, seed: int) -> Result:
    """A site is stopped in good order while it works, and started again at once"""

    def harm() -> float:
        when = time.monotonic()
        stage.client_of("north")
        stage.stop("north")
        stage.back("north")
        return when

    return disturbed(stage, name, seed, harm)


def site_killed(stage: Stage, name: str, seed: int, **environment: str) -> Result:
    """kill -9 of everything at a site, which then starts again"""

    def harm() -> float:
        when = time.monotonic()
        stage.federation.kill("north")
        stage.back("north", **environment)
        return when

    return disturbed(stage, name, seed, harm)


def run_killed(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of the server's part of a run; the same command again"""

    def harm() -> float:
        when = time.monotonic()
        os.kill(stage.process("server", "flwr-serverapp"), signal.SIGKILL)
        time.sleep(5)
        stage.again(name)
        return when

    return disturbed(stage, name, seed, harm)


def server_killed(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of everything at the server, which then starts again; the same command again"""

    def harm() -> float:
        when = time.monotonic()
        stage.federation.kill("server")
        stage.federation.start_server()
        stage.again(name)
        return when

    return disturbed(stage, name, seed, harm)


def killed_often(stage: Stage, name: str, seed: int) -> Result:
    """kill -9 of one thing or another, a dozen times while the run is at work; all start again as under systemd"""
    chance, kills = random.Random(seed), Counter[str]()
    out = stage.begin(name, seed=seed, quorum=2, iterations=400)
    stage.wait(out, stage.distils(out))
    steps, harm = stage.steps(out, "north"), time.monotonic()
    with stage.kept(out) as needed:
        while kills.total() < KILLS and not (out / "summary.json").exists():
            time.sleep(chance.uniform(2, 12))
            if (what := killed(stage, out, chance)) is None:
                break
            kills[what] += 1
            if what in ("run", "server"):
                needed.set()
        end = time.monotonic() + LONGEST
        while not (out / "summary.json").exists():
            if time.monotonic() > end:
                raise TimeoutError(f"{kills}: {stage.told(out)[-6:]}")
            time.sleep(0.5)
    result = stage.judged(name, seed, out, harm, steps, iterations=400)
    told = ", ".join(f"{what} {count}" for what, count in sorted(kills.items()))
    return replace(
        result, ok=result.ok and kills.total() == KILLS, sees=f"{result.sees}. {kills.total()} kills: {told}"
    )


def killed(stage: Stage, out: Path, chance: random.Random) -> str | None:
    """What was killed: chosen by chance, and waited for, since it may be down. A part of a run, or a whole machine, which takes its
    parts with it. None: the run has ended."""
    parts = {f"client of {site}": (site, "guard.py") for site in SITES} | {"run": ("server", "flwr-serverapp")}
    what = chance.choice([*parts] if chance.random() < PARTS else ["server", *SITES])
    while not (out / "summary.json").exists():
        if what in parts:
            if (pid := stage.find(*parts[what])) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return what
        elif stage.federation.processes[what].poll() is None:
            stage.federation.kill(what)
            return what
        time.sleep(0.1)
    return None


def disk_full(stage: Stage, name: str, seed: int) -> Result:
    """A site's disk is full; then it is not, and the same command again"""
    work = stage.site("south") / "work"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(work)], check=True)
    try:
        out = stage.begin(name, seed=seed, quorum=2)
        stage.wait(out, stage.distils(out, "south"))
        steps, harm = stage.steps(out, "north"), time.monotonic()
        with suppress(OSError), open(work / "filler", "wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        said = stage.wait(out)
        (work / "filler").unlink()
        stage.again(name)
        stage.wait_anew(out)
        result = stage.judged(name, seed, out, harm, steps)
        return replace(result, ok=result.ok and "disk" in said, sees=said)
    finally:
        subprocess.run(["umount", "-l", str(work)], check=True)


def work_torn(stage: Stage, name: str, seed: int) -> Result:
    """A site's machine dies and leaves half a file; it is removed, as the site is told, and the same command again"""
    out = stage.begin(name, seed=seed, quorum=2)
    stage.wait(out, stage.distils(out, "south"))
    stage.federation.kill("south")
    steps, harm = stage.steps(out, "north"), time.monotonic()
    torn = max((stage.site("south") / "work").rglob("state.safetensors"), key=lambda file: file.stat().st_mtime)
    torn.write_bytes(torn.read_bytes()[:1000])
    stage.back("south")
    said = stage.wait(out)
    errors = (stage.site("south") / "work" / "errors.log").read_text()
    torn.unlink()
    stage.again(name)
    stage.wait_anew(out)
    result = stage.judged(name, seed, out, harm, steps)
    return replace(result, ok=result.ok and str(torn) in errors and str(torn) not in said, sees=said)


def two_at_once(stage: Stage, name: str, seed: int) -> Result:
    """Two runs on the same sites at the same time"""
    harm = time.monotonic()
    first, second = stage.begin(name, seed=seed), stage.begin(f"{name}-2", seed=seed + 100)
    stage.wait(first)
    stage.wait(second)
    one = stage.judged(name, seed, first, harm, [])
    two = stage.judged(name, seed + 100, second, harm, [])
    return replace(one, ok=one.ok and two.ok, sees="both runs", lost="nothing")


def never_answers(stage: Stage, name: str, seed: int) -> Result:
    """A site that stops in the middle and does not come back: after `deadline` the run goes on without it"""
    out = stage.begin(name, seed=seed, deadline=150.0, quorum=1, iterations=100)
    stage.wait(out, stage.distils(out, "south"))
    harm = time.monotonic()
    stage.federation.kill("south")
    stage.wait(out)
    seconds, south = time.monotonic() - harm, about(out, "south")
    stage.back("south")
    ok = set_of(out, seed) == set_of(stage.expected(seed, iterations=100), seed, "north") and south["status"] == "late"
    return Result(name, ok, seconds, f"south: {south['reason']}", "that site's part")


def wrong_data(stage: Stage, name: str, seed: int) -> Result:
    """A site whose classes have other names"""
    file, began = stage.files["south"], time.monotonic()
    with np.load(file) as found:
        arrays = dict(found) | {"class_names": np.array(["cat", "dog"])}
    changed = io.BytesIO()
    np.savez(changed, **arrays)
    with stage.swapped(file, changed.getvalue()):
        said = stage.wait(stage.begin(name, seed=seed, quorum=1))
    return Result(name, "class" in said, time.monotonic() - began, said, "nothing: no site had begun")


def policy_refuses(stage: Stage, name: str, seed: int) -> Result:
    """A job that one site's policy does not allow"""
    policy, began = stage.federation.policy("south"), time.monotonic()
    with stage.swapped(policy, policy.read_bytes() + b'[jobs]\nmethod = ["sketch"]\n'):
        out = stage.begin(name, seed=seed, quorum=1)
        stage.wait(out)
    told = [line for line in stage.told(out) if "not allowed" in line]
    ok = bool(told) and load_set(out / f"seed-{seed}" / "merged").sites == ("north",)
    return Result(name, ok, time.monotonic() - began, "; ".join(told), "that site's part")


def other_code(stage: Stage, name: str, seed: int) -> Result:
    """A server that sends other code than the sites installed; one site approves it and the other does not"""
    app, began = stage.folder / "app", time.monotonic()
    shutil.copytree(app_folder() / "client", app / "client", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(app_folder() / "server", app / "server", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(app_folder() / file, app / file)
    with open(app / "client" / "app.py", "a") as code:
        code.write(f"\nPath({str(stage.folder / 'ran')!r}).touch()\n")
    out = stage.federation.server / "runs" / name
    settings = JOB | {"seed": seed, "quorum": 1, "server_data": "none", "out": str(out)}
    server = read_server(stage.federation.server)

    def run() -> None:
        env = environment(server.folder / "flower")
        subprocess.run(
            ["flwr", "run", str(app), HERE, "-c", run_words(settings)], env=env, check=True, capture_output=True
        )

    run()
    said = stage.wait(out)
    refused = not (stage.folder / "ran").exists() and "was not approved" in said
    waiting = json.loads(fedistill("site", "code", "--json", "--site", stage.federation.policy("north")))
    fedistill("site", "approve", waiting[0]["id"], "--site", stage.federation.policy("north"))
    run()
    stage.wait_anew(out)
    ran = (stage.folder / "ran").exists() and load_set(out / f"seed-{seed}" / "merged").sites == ("north",)
    return Result(name, refused and ran, time.monotonic() - began, said, "that site's part")


def upgraded(stage: Stage, name: str, seed: int) -> Result:
    """A site's fedistill changes between two slices so that stored work no longer counts"""
    place = stage.folder / "newer"
    place.mkdir()
    (place / "sitecustomize.py").write_text(NEWER)
    result = site_killed(stage, name, seed, PYTHONPATH=before_all(place))
    stage.federation.kill("north")
    stage.back("north")
    out = stage.federation.server / "runs" / name
    made, expected = (load_set(run / f"seed-{seed}" / "merged") for run in (out, stage.expected(seed)))
    ours, theirs = made.manifest["north"], expected.manifest["north"]
    anew = ours["configuration"] != theirs["configuration"]  # the set says by which version it was made
    same = replace(made, manifest={**made.manifest, "north": {**ours, "configuration": theirs["configuration"]}})
    return replace(result, ok=anew and identity(same) == identity(expected), lost="all that the site had made")


DRILLS: dict[str, Callable[[Stage, str, int], Result]] = {
    "client-killed": client_killed,
    "client-stopped": client_stopped,
    "site-restarted": site_restarted,
    "site-killed": site_killed,
    "run-killed": run_killed,
    "server-killed": server_killed,
    "killed-often": killed_often,
    "upload-cut": outside.upload_cut,
    "answers-late": outside.answers_late,
    "answers-twice": outside.answers_twice,
    "never-answers": never_answers,
    "disk-full": disk_full,
    "work-torn": work_torn,
    "two-at-once": two_at_once,
    "wrong-data": wrong_data,
    "policy-refuses": policy_refuses,
    "other-code": other_code,
    "upgraded": upgraded,
    "clock-off": outside.clock_off,
    "wrong-authority": outside.wrong_authority,
    "expired-certificate": outside.expired_certificate,
    "unknown-key": outside.unknown_key,
    "key-twice": outside.key_twice,
    "behind-nginx": outside.behind_nginx,
    "own-networks": outside.own_networks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("drills", nargs="*", default=list(DRILLS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what is in the file, and do nothing else")
    given = parser.parse_args()
    rows = list(csv.DictReader(given.out.read_text().splitlines())) if given.out.exists() else []
    if given.table:
        print(table(rows))
        return
    done = {row["drill"] for row in rows}
    wanted = [name for name in given.drills if name not in done]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder, Stage(Path(folder)) as stage:
        stage.proxied("south")
        for name in wanted:
            stage.mended()
            result = drilled(stage, name)
            append(given.out, result)
            print(result, flush=True)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """In Markdown, in the order of `DRILLS`."""
    lines = ["| harm | as it should be | seconds | what is told | lost |", "|---|---|---:|---|---|"]
    for row in sorted(rows, key=lambda row: list(DRILLS).index(row["drill"])):
        cells = (
            DRILLS[row["drill"]].__doc__,
            "yes" if row["ok"] == "True" else "no",
            row["seconds"],
            row["sees"],
            row["lost"],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def drilled(stage: Stage, name: str) -> Result:
    """A drill that goes wrong itself does not stop the others."""
    began = time.monotonic()
    try:
        return DRILLS[name](stage, name, 1 + list(DRILLS).index(name))
    except Exception as error:
        traceback.print_exc()
        stage.mend = list(SITES)
        return Result(name, False, time.monotonic() - began, f"{type(error).__name__}: {error}"[:300], "")


def append(file: Path, result: Result) -> None:
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if new:
            writer.writerow(f.name for f in fields(Result))
        writer.writerow([result.drill, result.ok, f"{result.seconds:.0f}", result.sees, result.lost])


if __name__ == "__main__":
    main()
