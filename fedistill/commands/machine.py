"""`fedistill site start | check | status`: a site's machine, and its way to the server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedistill.commands.shared import AsJson, Where, say, screen
from fedistill.errors import FedistillError

if TYPE_CHECKING:
    from fedistill.data.dataset import Dataset
    from fedistill.site.policy import Policy


def start(
    file: Where = "site.toml",
    port: Annotated[
        int, typer.Option(help="Port on this machine alone, for Flower's own use.", min=1, max=65535)
    ] = 9094,
) -> None:
    """Connect to the server and work for it until stopped; a SuperNode that ends is started again."""
    from fedistill.deploy import node_command, node_environment
    from fedistill.site.connection import check_files
    from fedistill.site.folder import check_account
    from fedistill.site.node import keep_running
    from fedistill.site.policy import read_policy

    policy, place = read_policy(Path(file)), Path(file).absolute()
    link = policy.connection
    if link is None:
        raise FedistillError("no-connection", f"{file} has no [connection]: `fedistill site init --kit` writes one.")
    check_files(link)
    check_account(policy.work, policy.name)
    os.umask(0o077)  # what is made here is for nobody else
    policy.work.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = node_command(place, link.server, link.authority, link.key, port)
    keep_running(policy, link, command, node_environment(place.with_name("flower"), place))


def check(
    file: Where = "site.toml",
    probe: Annotated[
        bool, typer.Option("--probe", help="Say too what distilling these data may reach: a minute.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say whether the policy is understood, the data can be used, there is room, and the server can be reached.

    Exit code 1: something is wrong with the connection.
    """
    from fedistill.config import make_config
    from fedistill.data.sources import load_data
    from fedistill.privacy.ledger import Ledger
    from fedistill.site.folder import ledger_file
    from fedistill.site.gate import requests
    from fedistill.site.policy import read_policy
    from fedistill.site.room import free, needed

    policy = read_policy(Path(file))
    asked: dict[str, Any] = {"data": policy.data} | ({"privacy": "dp", "epsilon": 1.0} if policy.required else {})
    data = load_data(make_config(asked).resolved())
    ledger = ledger_file(policy.work, policy.name)
    spends = Ledger(ledger, create=False).verify().count if ledger.exists() else 0
    counts = dict(zip(data.class_names, data.train.counts(data.classes), strict=True))
    facts: dict[str, Any] = {
        "site": policy.name,
        "train": len(data.train),
        "classes": counts,
        "small_classes": [c for c, n in counts.items() if 0 < n < policy.smallest_class],
        "patients": data.train.patient is not None,
        "spends": spends,
        "waiting": [request.id for request in requests(policy) if request.decision is None],
    }
    if policy.unit == "patient" and not facts["patients"]:
        raise FedistillError(
            "no-patients", f"{file}: unit=patient, and the data do not name patients: give a manifest with that column."
        )
    facts["disk"] = {"free_bytes": free(policy.work), "job_bytes": needed(policy, data)}
    facts["connection"], facts["problems"], facts["warnings"] = _connection(policy)
    if facts["disk"]["free_bytes"] < facts["disk"]["job_bytes"]:
        facts["warnings"].append("The disk may not hold one job: see disk.")
    facts["probe"] = _probe(policy, data) if probe else None
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _tell(facts)
    if facts["problems"]:
        raise typer.Exit(1)


def status(file: Where = "site.toml", as_json: AsJson = False) -> None:
    """What is going on here, as far as this site's own disk says."""
    from fedistill.site.policy import read_policy
    from fedistill.site.status import sentences, status_of

    found = status_of(read_policy(Path(file)))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for sentence in sentences(found):
        say(sentence)


def _connection(policy: Policy) -> tuple[dict[str, Any] | None, list[str], list[str]]:
    """What is known of the connection, what is wrong with it, and what is not wrong yet."""
    from fedistill.certificates import end_of
    from fedistill.site.connection import CLOCK_WRONG, clock_sentence, reach, warnings

    link = policy.connection
    if link is None:
        return None, [], []
    try:
        found = reach(link)
    except FedistillError as error:
        return {"server": link.server, "reached": False}, [error.sentence], []
    facts = {
        "server": link.server,
        "reached": True,
        "certificate_ends": found.certificate_ends.isoformat(),
        "authority_ends": end_of(link.authority).isoformat(),
        "clock_seconds": found.clock,
    }
    told = warnings(link, found)
    wrong = [clock_sentence(found)] if abs(found.clock) >= CLOCK_WRONG else []
    return facts, wrong, [sentence for sentence in told if sentence not in wrong]


def _probe(policy: Policy, data: Dataset) -> dict[str, Any]:
    """What `fedistill probe` finds in the site's own data, on the screen too. It stays here."""
    from fedistill.config import make_config
    from fedistill.evaluation.probe import probe
    from fedistill.report.probe import budgets_table, conclusion

    with screen.status("Training small networks"):
        found = probe(make_config({"data": policy.data}).resolved(), data)
    screen.print(budgets_table(found))
    screen.print(conclusion(found), highlight=False, markup=False)
    return found.to_dict()


def _tell(facts: dict[str, Any]) -> None:
    counts = ", ".join(f"{c} {n}" for c, n in facts["classes"].items())
    say(f"{facts['site']}: {facts['train']} training images ({counts}).")
    if facts["small_classes"]:
        say(f"Too small for jobs without privacy: {', '.join(facts['small_classes'])}.")
    say(f"{facts['spends']} entries on the ledger, {len(facts['waiting'])} sets wait for a decision.")
    disk = {name: f"{size / 1e9:.1f} GB" for name, size in facts["disk"].items()}
    say(f"{disk['free_bytes']} of disk are free; a job with the usual settings takes about {disk['job_bytes']}.")
    link = facts["connection"]
    if link is None:
        say("No [connection]: nothing was asked of a server.")
    elif link["reached"]:
        say(
            f"{link['server']} is reached; its certificate is by the right authority, until {link['certificate_ends'][:10]}."
        )
    for sentence in facts["warnings"]:
        say(f"Warning: {sentence}")
    for sentence in facts["problems"]:
        say(f"Wrong: {sentence}")
