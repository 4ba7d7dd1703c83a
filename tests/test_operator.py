"""What an operator does with a run: stops it, goes on with it, takes its results; and the server as containers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedistill import cli
from fedistill.commands import server as commands
from fedistill.config import make_config
from fedistill.deploy import Server, admitted_file, admitted_sites, begin_server, make_kit
from fedistill.errors import FedistillError
from fedistill.files import write_json

JOB = "sites = 3\n"


def say(*words: object) -> None:
    cli.app(list(map(str, words)), standalone_mode=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return begin_server(tmp_path_factory.mktemp("operator") / "server", "fed.example.org:444", 8123)


class Flower:
    """Answers as the `flwr` command does, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.runs: dict[str, str] = {}

    def __call__(self, server: Server, *words: str) -> dict[str, Any]:
        self.asked.append(words)
        if words[0] == "run":
            self.runs[str(len(self.runs) + 100)] = "running"
            return {"success": True, "run-id": max(self.runs)}
        if words[0] == "stop":
            self.runs[words[1]] = "finished:stopped"
        if words[:2] == ("supernode", "register"):
            return {"success": True, "node-id": 7001}
        if words[:2] == ("supernode", "unregister"):
            return {"success": True, "node-id": int(words[2])}
        if words[:2] == ("supernode", "list"):
            return {"success": True, "nodes": [{"node-id": "7001", "status": "online"}]}
        return {"runs": [{"run-id": name, "status": status} for name, status in self.runs.items()]}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    found = Flower()
    monkeypatch.setattr(commands, "_answer", found)
    return found


@pytest.mark.parametrize(("line", "seconds"), [("", "60.0"), ("slice_seconds = 5.0\n", "5.0")])
def test_sites_work_for_a_minute_per_message_unless_the_job_says(
    server: Server, flower: Flower, tmp_path: Path, line: str, seconds: str
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB + line)
    say("server", "run", server.folder, job)
    assert f"slice_seconds={seconds}" in flower.asked[-1][-1].split()


def test_a_run_is_stopped_and_goes_on(
    server: Server, flower: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    say("server", "run", server.folder, job)
    with pytest.raises(FedistillError, match="job is at work"):  # two would write to one folder
        say("server", "run", server.folder, job)
    say("server", "cancel", server.folder, "job")
    assert [words for words in flower.asked if words[0] == "stop"] == [("stop", "100", "here")]
    (server.folder / "runs/job").mkdir(parents=True)
    (server.folder / "runs/job/events.jsonl").write_text("")
    say("server", "status", server.folder, "job", "--json")
    assert json.loads(capsys.readouterr().out)["cancelled"].startswith("20")
    (server.folder / "runs/job/events.jsonl").unlink()
    (server.folder / "runs/job").rmdir()
    with pytest.raises(FedistillError, match="is not at work"):
        say("server", "cancel", server.folder, "job")
    say("server", "run", server.folder, job)
    assert json.loads((server.folder / "started/job.json").read_text()) == {"run": "101", "cancelled": ""}
    flower.runs.clear()  # as a server whose database was lost
    say("server", "run", server.folder, job)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["cancel", "{server}", "nothing"], "nothing of that name was started here"),
        (["cancel", "{server}", "No Name"], "is no name for a run"),
        (["cancel", "{server}", "done"], "has finished"),
        (["fetch", "{server}", "nothing", "--to", "{out}"], "has not finished"),
        (["fetch", "{server}", "../job", "--to", "{out}"], "is no name for a run"),
        (["fetch", "{server}", "done", "--to", "{server}"], "nothing is overwritten"),
        (["fetch", "{server}", "done", "--to", "{server}/server.toml/x"], "cannot be written"),
    ],
)
def test_what_an_operator_gets_wrong_with_a_run(
    words: list[str], why: str, server: Server, flower: Flower, tmp_path: Path
) -> None:
    finished(server)
    with pytest.raises(FedistillError, match=why):
        say("server", *(word.format(server=server.folder, out=tmp_path / "out") for word in words))
    assert not list(tmp_path.iterdir())


def finished(server: Server) -> Path:
    """A run's folder, with what every phase leaves there."""
    run = server.folder / "runs/done"
    write_json(run / "summary.json", {"seed": 0})
    write_json(run / "config.json", make_config({}).to_dict())
    names = ("report.html", "results.md", "events.jsonl", "log.txt", "seed-0/sites.json", "seed-0/elected.json")
    names += ("seed-0/round-1/site-north/set.safetensors", "seed-0/model-mlp.safetensors")
    names += ("seed-0/merged/set.safetensors", "seed-0/merged/manifest.json", "seed-0/merged/contact-sheet.png")
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    return run


def test_results_are_a_clean_folder(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(server)
    say("server", "fetch", server.folder, "done", "--to", tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    merged = [f"seed-0/merged/{name}" for name in ("contact-sheet.png", "manifest.json", "set.safetensors")]
    assert found == ["report.html", "results.md", *merged, "seed-0/model-mlp.safetensors", "summary.json"]
    told = capsys.readouterr().err
    assert all(str(tmp_path / "out" / name) in told for name in ("seed-0/merged", "report.html"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FedistillError, match="nothing is overwritten"):
        say("server", "fetch", server.folder, "done", "--to", tmp_path / "out")


def test_containers_show_the_proxy_and_nothing_else(server: Server) -> None:
    found: dict[str, Any] = yaml.safe_load((server.folder / "compose.yaml").read_text())["services"]
    place = str(server.folder)
    assert set(found) == {"server", "proxy"}
    assert found["proxy"]["ports"] == ["444:444"]
    assert "listen 444 ssl" in (server.folder / "nginx.conf").read_text()
    assert "ports" not in found["server"]
    assert found["server"]["network_mode"] == "service:proxy"
    assert found["server"]["command"] == ["fedistill", "server", "start", place]
    assert found["server"]["volumes"] == [f"{place}:{place}"]
    mounts = found["proxy"]["volumes"]
    assert all(mount.endswith(":ro") for mount in mounts)
    inner = [mount.split(":")[0] for mount in mounts]
    assert inner == [f"{place}/{name}" for name in ("nginx.conf", "pki/server.crt", "pki/server.key", "pki/ca.crt")]
    assert "secret" not in json.dumps(found["proxy"])


@pytest.mark.parametrize("name", ['a "strange" one', "$NAME", "two;words"])
def test_a_folder_whose_name_means_something_else_to_other_programs_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FedistillError, match="choose a folder without it") as caught:
        begin_server(tmp_path / name, "fed.example.org", 8123)
    assert caught.value.code == "bad-path"
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("told", ['{"success": false, "error-message": "no such thing"}', "no JSON"])
def test_what_flower_complains_of_in_its_answer_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """It ends as if nothing were wrong."""
    begin_server(tmp_path / "fed", "fed.example.org", 8123)
    done = subprocess.CompletedProcess(["flwr"], 0, told, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(FedistillError, match="is the server running") as caught:
        cli.app(["server", "sites", str(tmp_path / "fed")], standalone_mode=False)
    assert ("no such thing" in caught.value.sentence) == ("no such thing" in told)


def test_a_run_knows_under_which_name_each_key_was_admitted(
    server: Server, flower: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flower does not tell the name that it is given."""
    (tmp_path / "north.key.pub").write_text("ecdsa-sha2-nistp384 AAAA")
    make_kit(server, "north")
    say("server", "admit", server.folder, "north", tmp_path / "north.key.pub")
    capsys.readouterr()
    say("server", "sites", server.folder, "--json")
    assert json.loads(capsys.readouterr().out)["nodes"] == [{"name": "north", "node-id": "7001", "status": "online"}]
    job = tmp_path / "named.toml"
    job.write_text(JOB)
    say("server", "run", server.folder, job)
    assert json.loads(admitted_file(server.folder / "runs" / "named").read_text()) == {"7001": "north"}


def test_a_wrong_name_is_refused_and_mended(flower: Flower, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = begin_server(tmp_path / "fed", "fed.example.org", 8123)
    key, same = tmp_path / "kk.pub", tmp_path / "same.pub"
    key.write_text("ecdsa-sha2-nistp384 AAAA")
    same.write_text("ecdsa-sha2-nistp384 AAAA somebody@host\n")
    make_kit(server, "north")
    make_kit(server, "south")

    def refused(why: str, *words: object) -> None:
        before = flower.asked[:]
        with pytest.raises(FedistillError, match=why):
            say("server", words[0], server.folder, *words[1:])
        assert flower.asked == before

    refused("is no name for a site", "admit", "nrth ../x", key)
    refused("no kit for 'nrth'.*is it spelt right", "admit", "nrth", key)
    say("server", "admit", server.folder, "south", key)
    refused("same.pub was admitted as 'south': .*rename-site", "admit", "north", same)
    refused("No site was admitted as 'west'", "rename-site", "west", "north")
    refused("no kit for 'nrth'", "rename-site", "south", "nrth")
    say("server", "rename-site", server.folder, "south", "north")
    assert admitted_sites(server) == {"7001": "north"}
    other = tmp_path / "other.pub"
    other.write_text("ecdsa-sha2-nistp384 BBBB")
    refused("'north' is admitted already", "admit", "north", other)
    say("server", "remove-site", server.folder, "north")
    assert flower.asked[-1] == ("supernode", "unregister", "7001", "here")
    assert admitted_sites(server) == {}
    refused("of a site that was removed: Flower takes it never again", "admit", "north", key)
    say("server", "admit", server.folder, "north", other)


def test_a_key_from_before_keys_were_kept(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def known(*_: object) -> None:
        raise FedistillError(
            "flower", "flwr supernode failed (is the server running?): [code: 23] Public key already in use."
        )

    monkeypatch.setattr(commands, "_answer", known)
    make_kit(server, "east")
    (tmp_path / "k.pub").write_text("ecdsa-sha2-nistp384 CCCC")
    with pytest.raises(FedistillError, match="was admitted before, as one of those that `fedistill server sites"):
        say("server", "admit", server.folder, "east", tmp_path / "k.pub")


def test_a_job_names_the_sites_that_take_part(server: Server, flower: Flower, tmp_path: Path) -> None:
    for node, name in (("7001", "north"), ("7002", "south"), ("7003", "west")):
        (server.folder / "sites" / node).write_text(name)
    job = tmp_path / "two.toml"
    job.write_text('sites = ["north", "west"]\n')
    say("server", "run", server.folder, job)
    assert json.loads(admitted_file(server.folder / "runs/two").read_text()) == {"7001": "north", "7003": "west"}
    assert "sites=2" in flower.asked[-1][-1].split()


@pytest.mark.parametrize(
    ("names", "said"),
    [('["north", "east"]', "names east, admitted under no such name"), ('["north", "north"]', "once"), ("[]", "once")],
)
def test_a_job_cannot_name_strangers(server: Server, flower: Flower, tmp_path: Path, names: str, said: str) -> None:
    (server.folder / "sites" / "7001").write_text("north")
    job = tmp_path / "job.toml"
    job.write_text(f"sites = {names}\n")
    with pytest.raises(FedistillError, match=said):
        say("server", "run", server.folder, job)
    assert not flower.asked
