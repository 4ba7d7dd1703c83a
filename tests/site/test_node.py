"""A SuperNode is started again where that helps, and the note on disk says what is so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from authority import hospital, served

from fedistill import cli
from fedistill.deploy import make_site_key
from fedistill.errors import FedistillError
from fedistill.site import node
from fedistill.site.node import Node, keep_running, node_file, read_node, watched
from fedistill.site.policy import Connection, Policy
from fedistill.site.status import sentences, status_of

REFUSED = "Exit Code: 305\\nFailed to initialize the connection to the SuperLink.\\n[code: 2004] Failed to activate SuperNode."
FAKE = """
import os, signal, sys, time
place = {place!r}
tries = len(open(place).read()) if os.path.exists(place) else 0
open(place, "a").write("x")
signal.signal(signal.SIGTERM, lambda *_: (print("SuperNode terminated gracefully.", flush=True), sys.exit(0)))
def connect():
    print("\\033[92mINFO \\033[0m:      SuperNode ID: 77", flush=True)
def receive():
    print("\\033[92mINFO \\033[0m:      Receiving: train.distill message (ID: 1)", flush=True)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def stay():
    time.sleep(60)
def refuse():
    print("{refused}", flush=True); sys.exit(1)
{body}
"""


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return Policy(name="north", data="phantom", work=tmp_path / "work")


@pytest.fixture
def link(tmp_path: Path) -> Any:
    """To a server that is there."""
    own = hospital(tmp_path / "own", "127.0.0.1")
    make_site_key(tmp_path / "own/site.key")
    with served(own.certificate, own.key) as port:
        yield Connection(server=f"127.0.0.1:{port}", authority=own.authority, key=tmp_path / "own/site.key")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "PAUSE", 0.05)


def fake(tmp_path: Path, body: str) -> list[str]:
    program = tmp_path / "supernode.py"
    program.write_text(FAKE.format(place=str(tmp_path / "tries"), refused=REFUSED, body=body))
    return [sys.executable, str(program)]


def tries(tmp_path: Path) -> int:
    return len((tmp_path / "tries").read_text())


def when(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def stopped_when(condition: Callable[[], bool]) -> None:
    """Send this process a SIGTERM once something is so."""
    import threading

    def wait() -> None:
        when(condition)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait).start()


def test_a_supernode_that_gave_up_and_lingers_is_ended(
    policy: Policy,
    link: Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(node, "LINGER", 0.1)
    lost = "connect()\nif tries == 0:\n    print('ERROR : SSL/TLS handshake error detected.', flush=True)\nstay()"
    stopped_when(lambda: (read_node(policy) or Node()).state == "connected" and tries(tmp_path) == 2)
    keep_running(policy, link, fake(tmp_path, lost), os.environ)
    assert "Another try" in capsys.readouterr().err


def test_a_killed_supernode_is_started_again(
    policy: Policy, link: Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "connect()\nif tries == 0: receive(); die()\nif tries < 3: refuse()\nstay()"
    stopped_when(lambda: (read_node(policy) or Node()).state == "connected" and tries(tmp_path) == 4)
    keep_running(
        policy, link, fake(tmp_path, body.replace("connect()\n", "if tries in (0, 3): connect()\n")), os.environ
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("The SuperNode ended")]
    assert [("it was killed" in line, "takes a minute" in line) for line in lines] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    found = read_node(policy)
    assert found is not None
    assert (found.state, found.alive, found.message, found.answered) == ("stopped", False, "train.distill", False)
    assert not watched(policy)


def test_status_while_it_runs(policy: Policy, link: Connection, tmp_path: Path) -> None:
    (policy.work / "site-north/1-2/3").mkdir(parents=True)
    (policy.work / "site-north/1-2/seconds-experts.json").write_text("3.0")
    (policy.work / "errors.log").write_text("one\ntwo\n\nthree\nfour\n")
    assert status_of(policy)["state"] == "stopped"
    seen: list[dict[str, Any]] = []

    def connected() -> bool:
        seen[:] = [status_of(policy)]
        return seen[0]["state"] == "connected" and seen[0]["last_message"] is not None

    stopped_when(connected)
    keep_running(policy, link, fake(tmp_path, "connect()\nreceive()\nstay()"), os.environ)
    found = seen[0]
    assert (found["running"], found["last_message"]["kind"]) == (True, "train.distill")
    assert found["last_slice"]["phase"] == "experts"
    assert found["errors"] == {"lines": 5, "last": ["two", "three", "four"]}
    assert found["waiting"] == []
    told = "\n".join(sentences(found))
    assert all(
        words in told for words in ("is connected", "train.distill", "in phase experts", "| four", "Nothing waits")
    )
    after = status_of(policy)
    assert (after["running"], after["state"], after["why"]) == (False, "stopped", "it was told to")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("print('Exit Code: 302', flush=True); sys.exit(1)", "is none that Flower takes"),
        (
            "print('[Errno 98] error while attempting to bind: address already in use'); sys.exit(1)",
            "choose another with --port",
        ),
        ("print('Exit Code: 606', flush=True); sys.exit(1)", "does not fit the server's"),
        ("refuse()", "its key is not admitted"),
    ],
)
def test_what_never_mends_ends_with_a_sentence(
    body: str, why: str, policy: Policy, link: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "PATIENCE", 0.3)
    with pytest.raises(FedistillError, match=why):
        keep_running(policy, link, fake(tmp_path, body), os.environ)
    found = read_node(policy)
    assert found is not None
    assert (found.state, why in found.why) == ("stopped", True)
    assert (tries(tmp_path) > 1) is (body == "refuse()")


def test_a_wrong_authority_and_a_wrong_clock_never_mend(policy: Policy, tmp_path: Path) -> None:
    own, other = (hospital(tmp_path / name, "127.0.0.1") for name in ("own", "other"))
    make_site_key(own.key.with_name("site.key"))
    for shown, clock, why in ((other, 0.0, "is not by the authority"), (own, 400.0, "s behind the server's")):
        with served(shown.certificate, shown.key, clock=clock) as port:
            link = Connection(server=f"127.0.0.1:{port}", authority=own.authority, key=own.key.with_name("site.key"))
            with pytest.raises(FedistillError, match=why):
                keep_running(policy, link, fake(tmp_path, "sys.exit(1)"), os.environ)


def test_a_server_that_is_away_is_waited_for(
    policy: Policy, link: Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Connection(server="127.0.0.1:1", authority=link.authority, key=link.key)
    stopped_when(lambda: (tmp_path / "tries").exists() and tries(tmp_path) == 3)
    keep_running(policy, away, fake(tmp_path, "if tries < 2: sys.exit(1)\nstay()"), os.environ)
    assert capsys.readouterr().err.count("Nothing listens at 127.0.0.1:1") == 2


def test_two_of_one_site_do_not_run(policy: Policy, link: Connection, tmp_path: Path) -> None:
    failed: list[FedistillError] = []

    def second() -> bool:
        if not ((read_node(policy) or Node()).state == "connected" and watched(policy)):
            return False
        try:
            keep_running(policy, link, ["never"], os.environ)
        except FedistillError as error:
            failed.append(error)
        return True

    stopped_when(second)
    keep_running(policy, link, fake(tmp_path, "connect()\nstay()"), os.environ)
    assert [error.code for error in failed] == ["busy"]


def test_what_a_killed_start_left_behind_is_ended(policy: Policy, link: Connection, tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        node_file(policy).parent.mkdir(parents=True)
        note = Node(pid=left.pid, began=node.start_time(left.pid), state="connected")
        node_file(policy).write_text(json.dumps(note.__dict__))
        assert status_of(policy)["state"] == "connected"  # it is: nobody looks after it
        stopped_when(lambda: (tmp_path / "tries").exists() and (read_node(policy) or Node()).state == "connected")
        keep_running(policy, link, fake(tmp_path, "connect()\nstay()"), os.environ)
        assert left.wait(5) == -signal.SIGTERM
    finally:
        left.kill()
        left.wait()


def test_a_note_that_is_none(policy: Policy) -> None:
    node_file(policy).parent.mkdir(parents=True)
    for text in ("", "[]", '{"pid": 1, "other": 2}'):
        node_file(policy).write_text(text)
        assert read_node(policy) is None
        assert status_of(policy)["state"] == "stopped"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.toml").write_text(f'[site]\nname = "north"\ndata = "phantom"\nwork = "{tmp_path / "work"}"\n')
    cli.app(["site", "status", "--site", str(tmp_path / "site.toml")], standalone_mode=False)
    assert "north: the SuperNode is not running" in capsys.readouterr().err
    cli.app(["site", "status", "--json", "--site", str(tmp_path / "site.toml")], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["running"] is False
    assert not (tmp_path / "work").exists()  # asking changes nothing
