"""The site's own `flwr-clientapp`: Flower's, but for what the site does not let run."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from client.guard import WITHHELD, guard
from fedistill.deploy import guarded

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pull_task_input", "install_from_fab", "get_load_client_app_fn", "push_message", "push_task_output")


class Flower(ModuleType):
    """The parts of Flower that the guard replaces, noting what is done."""

    def __init__(self, archive: bytes, told: str) -> None:
        super().__init__("flower")
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.message = Message(RecordDict(), dst_node_id=1, message_type="query.describe")
        self.message.metadata.__dict__["_message_id"] = "1"
        self.context = Context(1, 1, {}, RecordDict(), {})
        self.app = SimpleNamespace(content=archive, hash_str=told)
        self.installed: list[bytes] = []
        self.pushed: list[Message] = []
        self.told: list[str] = []
        self.pull_task_input = lambda client: (self.message, self.context, None, self.app)
        self.install_from_fab = lambda content, skip_prompt: self.installed.append(content)
        self.get_load_client_app_fn = lambda **_: lambda *names: lambda message, context: "the server's code ran"
        self.push_message = lambda client, message, context: self.pushed.append(message)
        self.push_task_output = lambda **about: self.told.append(about["details"])

    def run(self) -> Any:
        """In the order of `run_clientapp`."""
        message, context, _, app = self.pull_task_input(None)
        self.install_from_fab(app.content, skip_prompt=True)
        return self.get_load_client_app_fn(app_path=None)("id", "version", app.hash_str)(message, context)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "site.toml"
    found.write_text(f'[site]\nname = "north"\ndata = "phantom"\nwork = "{tmp_path / "work"}"\n')
    return found


def error_of(reply: Message) -> tuple[str, str]:
    record = reply.content.config_records["error"]
    return str(record["code"]), str(record["sentence"])


def test_the_installed_app_runs(file: Path) -> None:
    archive = build_fab_from_disk(ROOT)
    flower = Flower(archive, hashlib.sha256(archive).hexdigest())
    guard(flower, file)
    assert flower.run() == "the server's code ran"
    assert flower.installed == [archive]


def test_other_code_is_neither_unpacked_nor_loaded(file: Path) -> None:
    archive = b"PK"
    flower = Flower(archive, hashlib.sha256(archive).hexdigest())
    guard(flower, file)
    assert error_of(flower.run())[0] == "bad-code"
    assert flower.installed == []


def test_an_app_under_the_name_of_another_is_refused(file: Path) -> None:
    flower = Flower(build_fab_from_disk(ROOT), "0" * 64)
    guard(flower, file)
    assert "not what its hash says" in error_of(flower.run())[1]
    assert flower.installed == []


def test_nothing_runs_where_flower_does_not_ask(file: Path) -> None:
    flower = Flower(b"", "")
    guard(flower, file)
    flower.install_from_fab(b"anything", skip_prompt=True)
    reply = flower.get_load_client_app_fn(app_path=None)("id", "version", "hash")(flower.message, flower.context)
    assert error_of(reply)[0] == "code"
    assert flower.installed == []


def test_a_site_without_a_policy_names_no_file_to_the_server(tmp_path: Path) -> None:
    archive = build_fab_from_disk(ROOT)
    flower = Flower(archive, hashlib.sha256(archive).hexdigest())
    guard(flower, tmp_path / "secret-name.toml")
    code, sentence = error_of(flower.run())
    assert code == "code"
    assert "secret-name" not in sentence


def test_texts_of_exceptions_stay(file: Path) -> None:
    flower = Flower(b"", "")
    guard(flower, file)
    flower.run()
    flower.push_message(None, Message(Error(code=2, reason="patient 4711"), reply_to=flower.message), flower.context)
    assert (flower.pushed[0].error.code, flower.pushed[0].error.reason) == (2, WITHHELD)
    flower.push_task_output(client=None, context=None, sub_status="failed", details="patient 4711")
    flower.push_task_output(client=None, context=None, sub_status="completed", details="")
    assert flower.told == [WITHHELD, ""]


def test_flower_has_what_is_replaced() -> None:
    assert all(hasattr(run_clientapp, name) for name in PARTS)


def test_the_program_that_the_supernode_finds_is_ours(tmp_path: Path, file: Path) -> None:
    program = guarded(tmp_path / "home with space", file) / "flwr-clientapp"
    assert os.access(program, os.X_OK)
    done = subprocess.run([str(program), "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: flwr-clientapp")
