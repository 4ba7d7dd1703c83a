"""`fedistill server ...`: what the operator of a federation does."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedistill.commands.shared import AsJson, say
from fedistill.errors import FedistillError
from fedistill.release.text import plain

if TYPE_CHECKING:
    from fedistill.certificates import Shown
    from fedistill.deploy import Server

app = typer.Typer(
    help="For the operator: set up a server, admit sites, run jobs.", no_args_is_help=True, rich_markup_mode=None
)

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="The server's folder.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What the site is called.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="What the run is called.")]
Certificate = Annotated[
    str | None,
    typer.Option(help="A certificate of your own for sites to see, with those between it and the authority."),
]
CertificateKey = Annotated[str | None, typer.Option(help="The private key of --certificate.")]
SLICE = 60.0  # seconds of work per message, unless the job says: each starts a process at the site, which takes seven
STARTING = 60.0  # seconds that a program of Flower may take to start


@app.command()
def init(
    folder: Folder,
    address: Annotated[str, typer.Option(help="Where sites reach the server: host, or host:port.")],
    port: Annotated[int, typer.Option(help="Port on this machine alone, behind the proxy.", min=1, max=65535)] = 8000,
    certificate: Certificate = None,
    certificate_key: CertificateKey = None,
    authority: Annotated[
        str | None,
        typer.Option(help="The certificate of the authority that --certificate is by; sites get it in their kits."),
    ] = None,
) -> None:
    """Write the folder of a server: certificates, a proxy that lets sites in and nobody else, units for systemd and Compose."""
    from fedistill.deploy import begin_server

    own = _own(certificate, certificate_key, authority)
    server = begin_server(Path(folder), address, port, own)
    say(
        f"{folder} is a server for {server.address}. nginx.conf is what may be reached from outside: nothing else should be."
    )


@app.command()
def renew(folder: Folder, certificate: Certificate = None, certificate_key: CertificateKey = None) -> None:
    """Make a new certificate for the server, by the same authority: sites notice nothing. Or take a new one of your own."""
    from fedistill.certificates import end_of, inside, keep_own, make_certificate, outside
    from fedistill.deploy import read_server

    server = read_server(Path(folder))
    before = outside(server.pki)
    own = _own(certificate, certificate_key, str(before.authority) if certificate or certificate_key else None)
    if own is not None and before == inside(server.pki):
        raise FedistillError(
            "no-own",
            f"{folder} has no certificate of your own: make the server anew with --certificate, for sites need new kits.",
        )
    if own is None:
        make_certificate(server.pki, server.host)
        new = inside(server.pki).certificate
    else:
        keep_own(server.pki, own, server.host)
        new = before.certificate
    say(
        f"{new} is valid until {end_of(new):%Y-%m-%d}. Start the server again, and have the proxy read it: nginx -s reload."
    )
    if own is None and before.certificate != new:
        say(
            f"What sites see is {before.certificate}, until {end_of(before.certificate):%Y-%m-%d}: renew it with --certificate."
        )


@app.command()
def start(folder: Folder) -> None:
    """Run the server until it is stopped."""
    from fedistill.certificates import check_certificates
    from fedistill.deploy import environment, link_commands, read_server
    from fedistill.processes import stop_engine, terminate_is_interrupt

    os.umask(0o077)
    server = read_server(Path(folder))
    for sentence in check_certificates(server.pki, server.host):
        say(f"Soon: {sentence}")
    children: list[subprocess.Popen[bytes]] = []
    try:
        with terminate_is_interrupt():
            for k, command in enumerate(link_commands(server)):
                home = environment(server.folder / "flower" / f"program-{k}")
                children.append(subprocess.Popen(command, cwd=server.folder, env=home))
                if k == 0:
                    _wait_for(server, children[0])
            while all(child.poll() is None for child in children):
                time.sleep(0.5)
    except KeyboardInterrupt:
        return
    finally:
        for child in reversed(children):
            if child.poll() is None:
                stop_engine(child, {})  # with the server's parts of runs, which Flower leaves at work
    raise FedistillError("stopped", "The server stopped by itself: what it printed says why.")


@app.command("add-site")
def add_site(folder: Folder, name: Name) -> None:
    """Make the kit of a site. It holds no secret; its fingerprint is to be told over another way than the kit."""
    from fedistill.deploy import make_kit, read_server

    path, fingerprint = make_kit(read_server(Path(folder)), name)
    say(f"Give {path} to {name}, and tell them by telephone: {fingerprint}")
    say(f"They send back {name}.key.pub: then `fedistill server admit {folder} {name} {name}.key.pub`.")


@app.command()
def admit(
    folder: Folder,
    name: Name,
    key: Annotated[str, typer.Argument(metavar="KEY.PUB", help="The public key that the site made.")],
) -> None:
    """Let a site in whose public key arrived. The server has to be running."""
    from fedistill.deploy import HERE, REMOVED, check_key, check_new, note_site, read_server

    server, public = read_server(Path(folder)), Path(key).absolute()
    held = check_key(server, public)
    check_new(server, name)
    try:
        told = _answer(server, "supernode", "register", str(public), HERE, "--name", name)
    except FedistillError as error:
        if "already in use" not in error.sentence:
            raise
        raise FedistillError(  # by a fedistill that kept no keys
            "known-key",
            f"The key in {key} was admitted before, as one of those that `fedistill server sites {folder}` lists "
            f"(`fedistill server rename-site` renames it), or it was removed: {REMOVED}",
        ) from None
    note_site(server, str(told["node-id"]), name, held)
    say(f"{name} is admitted.")


@app.command("rename-site")
def rename_site(
    folder: Folder, name: Name, new: Annotated[str, typer.Argument(metavar="NEW", help="What it should be called.")]
) -> None:
    """Give a site that was admitted under a wrong name the right one, which is that of its kit. Runs at work keep the old one."""
    from fedistill.deploy import check_new, node_of_name, note_site, read_server

    server = read_server(Path(folder))
    node = node_of_name(server, name)
    check_new(server, new)
    note_site(server, node, new)
    say(f"{name} is {new} now.")


@app.command("remove-site")
def remove_site(folder: Folder, name: Name) -> None:
    """Take a site out for good: its SuperNode stops, and its key is never taken again. The server has to be running."""
    from fedistill.deploy import HERE, forget_site, node_of_name, read_server

    server = read_server(Path(folder))
    node = node_of_name(server, name)
    _answer(server, "supernode", "unregister", node, HERE)
    forget_site(server, node)
    say(f"{name} is out. To come back it needs a new key: `fedistill site init` in another folder.")


@app.command()
def sites(folder: Folder, as_json: AsJson = False) -> None:
    """List the sites that were admitted, and which are connected."""
    from fedistill.deploy import HERE, admitted_sites, read_server

    server = read_server(Path(folder))
    names, told = admitted_sites(server), _answer(server, "supernode", "list", HERE)
    nodes = [{"name": names.get(str(node["node-id"]), ""), **node} for node in told["nodes"]]
    if as_json:
        print(json.dumps({"nodes": nodes}, indent=1))
        return
    table = Table("name", "node", "status", box=None)
    for node in nodes:
        table.add_row(node["name"], str(node["node-id"]), str(node["status"]))
    Console(markup=False, highlight=False).print(table)


@app.command()
def run(
    folder: Folder,
    job: Annotated[
        str, typer.Argument(metavar="JOB.TOML", help="The settings of the job, as of `fedistill simulate`.")
    ],
    name: Annotated[str | None, typer.Option(help="Of the run; default: the name of the file.")] = None,
) -> None:
    """Start a job, or go on with one. It runs on the server; `server status` says how far it is."""
    from fedistill.config import make_config
    from fedistill.deploy import HERE, admitted_file, admitted_sites, read_server, run_words
    from fedistill.events import claim_folder
    from fedistill.files import read_toml, write_json
    from fedistill.simulation import app_folder
    from fedistill.site.feasible import check_words

    server = read_server(Path(folder))
    settings: dict[str, Any] = {"server_data": "none", "slice_seconds": SLICE} | read_toml(Path(job), "bad-job")
    asked = admitted_sites(server)
    if isinstance(settings.get("sites"), list):
        asked = _named(asked, settings["sites"], folder)
        settings["sites"] = len(settings["sites"])
    settings["out"] = str(_run_folder(server, name or Path(job).stem))
    config = make_config(settings).resolved()
    check_words(config)
    if Path(config.out).exists():
        claim_folder(Path(config.out), config)  # another job of that name is refused
    if not config.sites:
        raise FedistillError(
            "no-number", f"{job}: say with sites = 3 how many take part, so that none is left out, or name them."
        )
    name = Path(config.out).name
    if _at_work(server, name):
        raise FedistillError(
            "at-work", f"{name} is at work: `fedistill server status {folder} {name}` says how far it is."
        )
    write_json(admitted_file(Path(config.out)), asked)
    told = _answer(server, "run", str(app_folder()), HERE, "-c", run_words(settings))
    write_json(_started(server, name), {"run": str(told["run-id"]), "cancelled": ""})
    say(f"Started: {config.out}")


@app.command()
def cancel(folder: Folder, name: Run) -> None:
    """Stop a run. What a site is at now ends with its slice; `server run` goes on with the run later."""
    from fedistill.deploy import HERE, read_server
    from fedistill.files import read_json, write_json

    server = read_server(Path(folder))
    place = _run_folder(server, name)
    if (place / "summary.json").exists():
        raise FedistillError("finished", f"{name} has finished: there is nothing to stop.")
    if not _started(server, name).exists():
        raise FedistillError("no-run", f"There is no run {name}: nothing of that name was started here.")
    if not _at_work(server, name):
        raise FedistillError(
            "not-at-work", f"{name} is not at work: `fedistill server status {folder} {name}` says why."
        )
    identity = read_json(_started(server, name))["run"]
    _answer(server, "stop", identity, HERE)
    write_json(_started(server, name), {"run": identity, "cancelled": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    say(
        f"{name} is stopped. Sites end the slice that they are at, and keep what they made; the same `server run` goes on."
    )


@app.command("fetch")
def fetch_results(
    folder: Folder, name: Run, to: Annotated[str, typer.Option(help="A new folder for the results.")]
) -> None:
    """Copy what others may have of a finished run: the merged set, the models, the report, the summary."""
    from fedistill.deploy import read_server
    from fedistill.results import fetch

    held = fetch(_run_folder(read_server(Path(folder)), name), Path(to))
    for path in held:
        say(f"{Path(to) / path}")
    say("The sets of single sites, the server's log of events and its keys stay where they are.")


def _named(admitted: dict[str, str], names: list[Any], folder: str) -> dict[str, str]:
    """Of the admitted sites, by the nodes' numbers, those that a job names.

    Raises `FedistillError` ("bad-job") where it names one twice, or none, or one that was not admitted.
    """
    if not names or len(set(map(str, names))) < len(names):
        raise FedistillError("bad-job", "sites = [...] of a job names each site that takes part, once.")
    if strangers := [str(name) for name in names if name not in admitted.values()]:
        raise FedistillError(
            "bad-job",
            f"The job names {', '.join(strangers)}, admitted under no such name: `fedistill server sites {folder}` lists them.",
        )
    return {node: name for node, name in admitted.items() if name in names}


@app.command()
def status(folder: Folder, name: Run, as_json: AsJson = False) -> None:
    """How far a run is: where each site stands, and what is wrong."""
    from dataclasses import asdict

    from fedistill.certificates import check_certificates
    from fedistill.deploy import read_server
    from fedistill.events import read_events
    from fedistill.files import read_json
    from fedistill.report.live import fold, render

    server = read_server(Path(folder))
    place, soon = _run_folder(server, name), []
    try:
        soon = check_certificates(server.pki, server.host)
    except FedistillError as expired:  # the run is there all the same
        soon = [expired.sentence]
    if not (place / "events.jsonl").exists() and not (place / "error.json").exists():
        raise FedistillError("no-run", f"There is no run {name}, or it has not begun.")
    events, _ = read_events(place / "events.jsonl")
    state = fold(asdict(event) for event in events)
    error = read_json(place / "error.json")["sentence"] if (place / "error.json").exists() else ""
    done = (place / "summary.json").exists()
    cancelled = read_json(_started(server, name))["cancelled"] if _started(server, name).exists() and not done else ""
    if as_json:
        told = {site or "server": asdict(line) for (_, site), line in state.sites.items()}
        facts = {"finished": done, "cancelled": cancelled, "error": error, "certificates": soon, "sites": told}
        print(json.dumps(facts, indent=1))
        return
    Console(markup=False, highlight=False).print(render(state))
    for sentence in soon:
        say(f"Certificates: {sentence}")
    if cancelled:
        say(f"Stopped by `server cancel`, {cancelled}.")
        return
    say(error or (f"Finished: {place / 'report.html'}" if done else "At work, or stopped with the server."))


@app.command()
def rehearse(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="[FOLDER]", help="A new folder, which is kept; default: one that is removed."),
    ] = None,
    sites: Annotated[int, typer.Option(help="How many hospitals.", min=2, max=9)] = 3,
) -> None:
    """Play a whole federation on this machine, with phantoms and the real commands, each of which is shown: a minute or two."""
    from fedistill.processes import terminate_is_interrupt
    from fedistill.rehearsal import rehearse as play

    with terminate_is_interrupt():
        play(None if folder is None else Path(folder), sites, say)


def _own(certificate: str | None, key: str | None, authority: str | None) -> Shown | None:
    """The operator's own certificates, all of them or none."""
    from fedistill.certificates import Shown

    given = [certificate, key, authority]
    if not any(given):
        return None
    if not all(given):
        raise FedistillError(
            "incomplete",
            "Give --certificate with --certificate-key, and to `server init` --authority too: or none of them.",
        )
    return Shown(*(Path(str(path)).absolute() for path in given))


def _started(server: Server, name: str) -> Path:
    """Which of Flower's runs a run is, and whether it was stopped on purpose."""
    return server.folder / "started" / f"{name}.json"


def _at_work(server: Server, name: str) -> bool:
    """Whether Flower is at a run that was started here before."""
    from fedistill.deploy import HERE
    from fedistill.files import read_json

    if not _started(server, name).exists():
        return False
    identity = read_json(_started(server, name))["run"]
    runs = _answer(server, "list", HERE)["runs"]
    return any(str(r["run-id"]) == identity and not str(r["status"]).startswith("finished") for r in runs)


def _run_folder(server: Server, name: str) -> Path:
    from fedistill.deploy import NAME

    if not NAME.fullmatch(name):
        raise FedistillError("bad-name", f"'{name}' is no name for a run: use lower-case letters, digits and dashes.")
    return server.folder / "runs" / name


def _answer(server: Server, *words: str) -> dict[str, Any]:
    """What Flower's own command answers. Raises `FedistillError`, with its complaint, where it fails."""
    from fedistill.deploy import environment

    env = environment(server.folder / "flower") | {"COLUMNS": "200"}
    command = ["flwr", *words, "--format", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {}
    if done.returncode or found.get("success") is not True:  # it may complain and yet end as if nothing were wrong
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and "://" not in line]
        why = plain(str(found.get("error-message") or " ".join(lines[-2:]) or "it said nothing"))
        raise FedistillError("flower", f"flwr {words[0]} failed (is the server running?): {why}")
    return dict(found)


def _wait_for(server: Server, child: subprocess.Popen[bytes]) -> None:
    """Until the SuperLink can be reached."""
    import socket

    end = time.monotonic() + STARTING
    while child.poll() is None and time.monotonic() < end:
        with socket.socket() as found:
            found.settimeout(1)
            if found.connect_ex(("127.0.0.1", server.port)) == 0:
                return
        time.sleep(0.2)
