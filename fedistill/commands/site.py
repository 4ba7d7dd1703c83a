"""`fedistill site ...`: what a hospital's engineer and its data-protection officer do, on the site's own machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedistill.commands.machine import check, start, status
from fedistill.commands.shared import AsJson, Where, say
from fedistill.errors import FedistillError
from fedistill.release.text import plain

if TYPE_CHECKING:
    from fedistill.site.code import Code
    from fedistill.site.gate import Request
    from fedistill.site.policy import Policy

app = typer.Typer(
    help="At a hospital: what may leave, and what waits for a decision.", no_args_is_help=True, rich_markup_mode=None
)

Id = Annotated[
    str, typer.Argument(metavar="ID", help="Of a set or of code, or how it begins; `site pending` lists them.")
]
Reason = Annotated[str, typer.Option(help="One line for the log, which stays at the site.")]

TEMPLATE = """\
# The policy of this site. No server can change it; a job that does not fit is refused.
[site]
name = {name}
data = {data}
work = {work}                 # experts, sets, the ledger: keep it, and keep it private
code = "installed"          # jobs may run the code that is installed here; other code waits for `fedistill site approve`

[privacy]
required = true             # jobs without differential privacy are refused
unit = "image"              # what a job has to protect at least: "image", or "patient" where the data name patients
max_epsilon = 3.0           # of one job
max_delta = 1e-3
lifetime_epsilon = 10.0     # of all jobs together, by the ledger
lifetime_delta = 1e-3

[release]
manual = true               # every set waits for `fedistill site approve`
largest_set = 1000          # synthetic images
smallest_class = 20         # real images: smaller classes take no part in a job without privacy
answers = true              # counts of right answers on held-out images may leave (with privacy: noisy ones that are paid for)

[jobs]                      # what a job may ask for; settings that are not named here are free
method = ["sketch", "ptm", "mtt", "teach"]
ipc = {{ from = 1, to = 50 }}
"""


@app.command()
def init(
    data: Annotated[str, typer.Option(help="An image folder, a .csv manifest or an .npz file.")],
    work: Annotated[str, typer.Option(help="Folder for experts, sets and the ledger.")],
    name: Annotated[str | None, typer.Option(help="What the site is called, where there is no kit.")] = None,
    kit: Annotated[str | None, typer.Option(help="The kit of the server's operator.")] = None,
    file: Where = "site.toml",
) -> None:
    """Write a careful policy to begin with, to be read and changed by people; with a kit, make the site's key too."""
    from fedistill.data.sources import is_name
    from fedistill.deploy import check_path, make_site_key, read_kit, unit_of
    from fedistill.files import write_bytes, write_once

    if (name is None) == (kit is None):
        raise FedistillError(
            "name-or-kit", "A site has its name from --kit, or from --name where there is no server yet."
        )
    place = Path(file)
    if place.exists():
        raise FedistillError("exists", f"{file} exists already: edit it, or choose another --site.")
    absolute = Path(data).expanduser().absolute()
    there = absolute.exists() and not is_name(data)
    found = read_kit(Path(kit)) if kit is not None else None
    called = found.name if found is not None else str(name)
    place_of_work = Path(work).expanduser().absolute()  # shells expand --work ~/w, and not --work=~/w
    words = {"name": called, "data": str(absolute) if there else data, "work": str(place_of_work)}
    text = TEMPLATE.format(**{key: json.dumps(word, ensure_ascii=False) for key, word in words.items()})
    if found is not None:
        check_path(place.absolute())
        authority = place.with_name(f"{called}.ca.crt")
        if write_once(authority, found.authority) != found.authority:
            raise FedistillError("exists", f"{authority} is of another federation: choose another folder for this one.")
        signer = place.with_name(f"{called}.kit.pub")
        if write_once(signer, found.signer) != found.signer:
            raise FedistillError(
                "exists",
                f"{kit} is not by the server whose kits {signer} is for: ask the operator, or choose another folder.",
            )
        public = make_site_key(place.with_name(f"{called}.key"))
        text += f'\n[connection]\nserver = "{found.address}"\nauthority = "{called}.ca.crt"\nkey = "{called}.key"\n'
        say(f"The fingerprint of the kit is {found.fingerprint}: the operator must say the same over the telephone.")
        say(f"Send {public} to the operator.")
        unit = unit_of(f"site start --site {place.absolute()}")
        write_bytes(place.with_name("fedistill-site.service"), unit.encode())
    write_bytes(place, text.encode())
    say(f"{file} is written: read it, change it, then `fedistill site check`.")


for command in (start, check, status):
    app.command()(command)


@app.command()
def pending(
    file: Where = "site.toml",
    everything: Annotated[bool, typer.Option("--all", help="With what was decided before.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what waits for a decision."""
    from fedistill.site.code import codes
    from fedistill.site.gate import requests

    found = [r for r in requests(_policy(file)) if everything or r.decision is None]
    if as_json:
        print(json.dumps([_facts(request) for request in found], indent=1))
        return
    table = Table("id", "made (UTC)", "method", "images per class", "epsilon", "decision", box=None)
    for request in found:
        config, decision = request.job["config"], _word(request)
        epsilon = f"{config['epsilon']:g}" if config["privacy"] == "dp" else "no guarantee"
        made = request.made[:16].replace("T", " ")
        table.add_row(_short(request.id), made, plain(config["method"]), str(config["ipc"]), epsilon, decision)
    Console(markup=False, highlight=False).print(table if found else "Nothing waits.")
    if waiting := [_short(c.id) for c in codes(_policy(file)) if c.decision is None]:
        _print(f"Code of jobs that waits for a decision (`fedistill site code`): {', '.join(waiting)}")


@app.command()
def code(
    name: Annotated[
        str, typer.Argument(metavar="[ID]", help="Show how this code differs from what is installed.")
    ] = "",
    file: Where = "site.toml",
    as_json: AsJson = False,
) -> None:
    """List code that servers sent and that is not simply what is installed here; or show one, to be approved or rejected."""
    from fedistill.site.code import changes, code_of, codes, differences

    if name:
        found = code_of(_policy(file), name)
        archive = found.load()
        if as_json:
            print(json.dumps(_about(found) | {"differs": differences(archive)}, indent=1))
            return
        _print(f"{found.id}, came {found.made}: {_word(found)}. All of it: {found.folder / 'app.fab'} (a zip archive)")
        for line in changes(archive).splitlines() or ["It is what is installed here."]:
            safe = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
            Console(markup=False, highlight=False).print(safe, soft_wrap=True)
        return
    everything = [(c, differences(c.load())) for c in codes(_policy(file))]
    if as_json:
        print(json.dumps([_about(c) | {"differs": other} for c, other in everything], indent=1))
        return
    table = Table("id", "came (UTC)", "differs from what is installed in", "decision", box=None)
    for c, other in everything:
        table.add_row(_short(c.id), c.made[:16].replace("T", " "), plain(", ".join(other)) or "nothing", _word(c))
    Console(markup=False, highlight=False).print(table if everything else "No other code came.")


@app.command()
def show(name: Id, file: Where = "site.toml", as_json: AsJson = False) -> None:
    """One screen about a set: what it promises, what is in it, which job made it, and where its images are to be seen."""
    from fedistill.config import Config
    from fedistill.release.audit import audit_sentence
    from fedistill.release.claim import read_claim
    from fedistill.site.gate import request_of
    from fedistill.site.look import audit_of, lay_out

    request = request_of(_policy(file, writes=True), name)
    made = request.load()
    look, attacked = lay_out(request, made), audit_of(request)
    claim, counts = read_claim(made), made.groups.bincount(minlength=len(made.class_names)).tolist()
    usual = Config().resolved().to_dict()
    job = {key: value for key, value in request.job["config"].items() if value != usual.get(key)}
    facts = _facts(request) | {
        "guarantee": claim.sentence,
        "images": len(made),
        "per_class": dict(zip((*made.class_names, "no finding"), counts, strict=False)),
        "sheet": str(look / "contact-sheet.png"),
        "privacy": str(look / "privacy.json"),
        "audit": attacked,
        "changed_settings": job,
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    _print(f"Set {request.id}, made {request.made}: {_word(request)}")
    _print(claim.sentence)
    _print(f"{len(made)} images: " + ", ".join(f"{c} {n}" for c, n in facts["per_class"].items() if n))
    for note in made.manifest[made.sites[0]].get("privacy", {}).get("not_covered", []):
        _print(f"Not covered: {note}")
    _print("Job: " + ", ".join(f"{key}={value}" for key, value in job.items()))
    _print(audit_sentence(attacked) if attacked else f"Not attacked: `fedistill site audit {_short(request.id)}` does.")
    _print(f"Look at {facts['sheet']}, and at stretched.png and privacy.json beside it.")


@app.command()
def audit(
    name: Id,
    file: Where = "site.toml",
    canaries: Annotated[int, typer.Option(help="Images with wrong labels whose presence is to be guessed.")] = 64,
    shadows: Annotated[int, typer.Option(help="Rehearsals, each of which is the job's whole work.")] = 8,
) -> None:
    """Attack what the job of a set does, on this site's data; what comes of it stays beside the set, and `site show` tells it.

    Exit code 1: the bound contradicts the claim.
    """
    from fedistill.commands.audit import attack
    from fedistill.commands.audit import show as tell
    from fedistill.config import make_config
    from fedistill.data.sources import load_data
    from fedistill.site.gate import request_of

    policy = _policy(file, writes=True)
    request = request_of(policy, name)
    config = make_config(request.job["config"] | {"data": policy.data}).resolved()
    data = policy.check_data(config, replace(load_data(config), name=policy.name))
    result = attack(config, data, request.folder / "audit", canaries=canaries, shadows=shadows)
    tell(result, request.folder / "audit")
    if result["contradicts"]:
        raise typer.Exit(1)


@app.command()
def approve(name: Id, file: Where = "site.toml", reason: Reason = "") -> None:
    """Let a set leave, or the code of a job run."""
    _decide(name, file, reason, approved=True)


@app.command()
def reject(name: Id, file: Where = "site.toml", reason: Reason = "") -> None:
    """Do not let a set leave, or the code of a job run, which may have been approved before.

    The server learns that it was rejected, and nothing more.
    """
    _decide(name, file, reason, approved=False)


@app.command()
def log(file: Where = "site.toml", as_json: AsJson = False) -> None:
    """Who let what out, or did not, and whether the record of it holds."""
    from dataclasses import asdict

    from fedistill.site.folder import site_folder
    from fedistill.site.gate import read_log

    policy = _policy(file)
    found = read_log(site_folder(policy.work, policy.name))
    if as_json:
        print(json.dumps([asdict(decision) for decision in found], indent=1))
        return
    table = Table("time (UTC)", "set", "decision", "by", "reason", box=None)
    for d in found:
        what, who = "approved" if d.approved else "rejected", d.who or "the policy"
        table.add_row(d.time[:16].replace("T", " "), _short(d.id), what, who, plain(d.reason))
    Console(markup=False, highlight=False).print(table if found else "Nothing was decided yet.")


def _decide(name: str, file: str, reason: str, *, approved: bool) -> None:
    from fedistill.site.code import code_of
    from fedistill.site.gate import CODE_MARK, decide, request_of

    policy = _policy(file, writes=True)
    request: Code | Request = code_of(policy, name) if name.startswith(CODE_MARK) else request_of(policy, name)
    if approved:
        request.load()  # still what was looked at
    decision = decide(policy, request.id, approved=approved, reason=reason)
    say(f"{request.id} is {'approved' if approved else 'rejected'} by {decision.who}.")


def _policy(file: str, *, writes: bool = False) -> Policy:
    """The policy in a file. writes: whether the command writes to the site's folder, which its own account alone may do."""
    from fedistill.site.folder import check_account
    from fedistill.site.policy import read_policy

    policy = read_policy(Path(file))
    if writes:
        check_account(policy.work, policy.name)
    return policy


def _facts(request: Request) -> dict[str, Any]:
    return {"id": request.id, "made": request.made, "decision": _word(request), "job": request.job}


def _about(code: Code) -> dict[str, Any]:
    return {"id": code.id, "made": code.made, "decision": _word(code)}


def _short(name: str) -> str:
    """Enough of an id to tell it from others."""
    from fedistill.site.gate import CODE_MARK

    return name[: 8 + len(CODE_MARK) * name.startswith(CODE_MARK)]


def _word(request: Code | Request) -> str:
    if request.decision is None:
        return "waits"
    return f"{'approved' if request.decision.approved else 'rejected'} by {request.decision.who or 'the policy'}"


def _print(text: str) -> None:
    """What a server said, too, must not steer the terminal, or begin a line."""
    Console(markup=False, highlight=False).print(plain(text), soft_wrap=True)
