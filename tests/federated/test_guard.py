"""The site's own `flwr-clientapp`: Flower's, but for what the site does not let run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from archives import changed
from flwr.app import Context, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from client.guard import REPLACED, WITHHELD, guard
from fedistill.deploy import node_environment
from fedistill.site.code import codes
from fedistill.site.gate import decide
from fedistill.site.policy import read_policy
from server.collect import CRASHED

ROOT = Path(__file__).resolve().parents[2]


class Flower(ModuleType):
    """The parts of Flower that the guard replaces, noting what is done."""

    def __init__(self, archive: bytes) -> None:
        super().__init__("flower")
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.message = Message(RecordDict(), dst_node_id=1, message_type="query.describe")
        self.message.metadata.__dict__["_message_id"] = "1"
        self.context = Context(1, 1, {}, RecordDict(), {})
        self.app = SimpleNamespace(content=archive, hash_str="0" * 64)
        self.installed: list[bytes] = []
        self.pushed: list[Message] = []
        self.told: list[str] = []
        self.pull_task_input = lambda client: (self.message, self.context, None, self.app)
        self.install_from_fab = lambda content, skip_prompt: self.installed.append(content)
        self.get_load_client_app_fn = lambda **how: lambda *names: lambda message, context: f"ran {how['app_path']}"
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


def test_the_installed_app_is_loaded_from_the_installation(file: Path) -> None:
    flower = Flower(build_fab_from_disk(ROOT))
    guard(flower, file)
    assert flower.run() == f"ran {ROOT}"
    assert flower.installed == []  # Flower's own unpacking is not used


def test_other_code_is_neither_unpacked_nor_loaded(file: Path) -> None:
    flower = Flower(b"PK")
    guard(flower, file)
    assert error_of(flower.run())[0] == "bad-code"
    assert flower.installed == []


def test_nothing_runs_where_flower_does_not_ask(file: Path) -> None:
    flower = Flower(b"")
    guard(flower, file)
    flower.install_from_fab(b"anything", skip_prompt=True)
    reply = flower.get_load_client_app_fn(app_path=None)("id", "version", "hash")(flower.message, flower.context)
    assert error_of(reply)[0] == "code"
    assert flower.installed == []


def test_a_site_without_a_policy_names_no_file_to_the_server(tmp_path: Path) -> None:
    archive = build_fab_from_disk(ROOT)
    flower = Flower(archive)
    guard(flower, tmp_path / "secret-name.toml")
    code, sentence = error_of(flower.run())
    assert code == "code"
    assert "secret-name" not in sentence


def test_texts_of_exceptions_stay(file: Path) -> None:
    flower = Flower(b"")
    guard(flower, file)
    flower.run()
    flower.push_message(None, Message(Error(code=2, reason="patient 4711"), reply_to=flower.message), flower.context)
    assert (flower.pushed[0].error.code, flower.pushed[0].error.reason) == (2, WITHHELD)
    flower.push_task_output(client=None, context=None, sub_status="failed", details="patient 4711")
    flower.push_task_output(client=None, context=None, sub_status="completed", details="")
    assert flower.told == [WITHHELD, ""]


def test_a_process_that_is_stopped_before_its_reply_says_so(file: Path) -> None:
    """Flower's own says nothing to the server, which would wait until its deadline."""
    flower = Flower(b"")
    guard(flower, file)
    flower.pull_task_input(None)
    flower.push_task_output(client=None, context=flower.context, sub_status="failed", details="stopped")
    assert [(reply.error.code, reply.metadata.reply_to_message_id) for reply in flower.pushed] == [(8, "1")]
    assert "died" in CRASHED[8]


def test_a_process_that_has_replied_says_no_more(file: Path) -> None:
    flower = Flower(b"")
    guard(flower, file)
    flower.run()
    flower.push_message(None, Message(RecordDict(), reply_to=flower.message), flower.context)
    flower.push_task_output(client=None, context=flower.context, sub_status="completed", details="")
    assert [reply.has_error() for reply in flower.pushed] == [False]


HANGS = """\
import ctypes, signal
libc, alarm = ctypes.CDLL(None), signal.alarm
libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)
signal.alarm = lambda seconds: alarm(1)
"""


def test_a_process_that_hangs_at_its_end_is_ended(tmp_path: Path, file: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    words = [sys.executable, ROOT / "client" / "guard.py", file, "--help"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    assert subprocess.run(words, capture_output=True, timeout=60, env=env, check=False).returncode == -signal.SIGALRM


def test_flower_has_what_is_replaced() -> None:
    assert all(hasattr(run_clientapp, name) for name in REPLACED)


def test_the_supernode_finds_our_program_and_no_other_that_runs_code(tmp_path: Path, file: Path) -> None:
    env = node_environment(tmp_path / "home with space", file)
    found = {
        name: shutil.which(name, path=env["PATH"])
        for name in (*TASK_TYPE_TO_COMMAND.values(), "flower-superexec", "flwr")
    }
    assert {str(Path(str(path)).parent) for path in found.values()} == {str(tmp_path / "home with space" / "bin")}
    for name, path in found.items():
        done = subprocess.run([str(path), "--help"], capture_output=True, text=True, timeout=60, env=env, check=False)
        assert (done.returncode == 0) == (name in ("flwr-clientapp", "flower-superexec")), name
        if name == "flwr-clientapp":
            assert done.stdout.startswith("usage: flwr-clientapp")


def test_approved_code_runs_from_a_fresh_copy_of_what_was_approved(file: Path) -> None:
    archive = changed(build_fab_from_disk(ROOT), lambda files: files.update({"client/extra.py": b"a = 1"}))
    flower = Flower(archive)
    guard(flower, file)
    assert error_of(flower.run())[0] == "code"
    policy = read_policy(file)
    decide(policy, codes(policy)[0].id, approved=True, reason="")
    place = codes(policy)[0].folder / "app"
    (place / "client").mkdir(parents=True)
    (place / "client" / "left.py").write_text("of another time")
    assert flower.run() == f"ran {place}"
    assert (place / "client" / "extra.py").read_bytes() == b"a = 1"
    assert not (place / "client" / "left.py").exists()
