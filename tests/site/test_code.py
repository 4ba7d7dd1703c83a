"""Which code of a server may run at a site."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import Files, changed
from flwr.cli.build import build_fab_from_disk
from typer.testing import CliRunner

from fedistill.cli import app
from fedistill.errors import FedistillError
from fedistill.site.code import check_code, code_of, codes, differences, identity_of
from fedistill.site.gate import decide, read_log
from fedistill.site.policy import Policy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sent() -> bytes:
    """As Flower packs the app of this checkout."""
    return build_fab_from_disk(ROOT)


def policy_at(folder: Path, code: str = "installed") -> Policy:
    return Policy(name="north", data="phantom", work=folder, code=code)


def refused(policy: Policy, archive: bytes) -> FedistillError:
    with pytest.raises(FedistillError) as error:
        check_code(policy, archive)
    return error.value


def test_what_is_installed_here_may_run(tmp_path: Path, sent: bytes) -> None:
    assert differences(sent) == []
    check_code(policy_at(tmp_path), sent)
    assert codes(policy_at(tmp_path)) == []


def edit(name: str, content: bytes) -> Callable[[Files], None]:
    return lambda files: files.update({name: content})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda files: files.update({"client/app.py": files["client/app.py"] + b"import os\n"}), "client/app.py"),
        (lambda files: files.pop("server/collect.py"), "server/collect.py"),
        (edit("client/extra.py", b""), "client/extra.py"),
        (edit("client/app.cpython-311-x86_64-linux-gnu.so", b"\x7fELF"), "client/app.cpython-311-x86_64-linux-gnu.so"),
        (edit("torch/__init__.py", b""), "torch/__init__.py"),  # found before the installed one
        (edit("client/guard.py", b""), "client/guard.py"),
        (edit("sitecustomize.pth", b""), "sitecustomize.pth"),
        (
            lambda files: files.update({"pyproject.toml": files["pyproject.toml"].replace(b"client.app:app", b"os:path")}),
            "pyproject.toml",
        ),
        (edit("pyproject.toml", b"[tool"), "pyproject.toml"),
        (
            lambda files: files.update({"pyproject.toml": files["pyproject.toml"].replace(b'"joblib', b'"evil", "joblib')}),
            "pyproject.toml",
        ),
    ],
)  # fmt: skip
def test_other_code_waits_for_a_person(tmp_path: Path, sent: bytes, change: Callable[[Files], None], name: str) -> None:
    policy, archive = policy_at(tmp_path), changed(sent, change)
    assert differences(archive) == [name]
    error = refused(policy, archive)
    assert error.code == "code"
    assert identity_of(archive) in error.sentence
    assert [code.id for code in codes(policy)] == [identity_of(archive)]
    decide(policy, identity_of(archive), approved=True, reason="read")
    check_code(policy, archive)
    check_code(policy, sent)  # and so may the installed one still


def test_a_text_may_differ(sent: bytes) -> None:
    assert differences(changed(sent, edit("README.md", b"hello"))) == []


def test_a_rejected_code_never_runs(tmp_path: Path, sent: bytes) -> None:
    policy = policy_at(tmp_path)
    decide(policy, identity_of(sent), approved=False, reason="no")
    assert "rejected" in refused(policy, sent).sentence


def test_approval_of_code_is_taken_back_once_and_for_good(tmp_path: Path, sent: bytes) -> None:
    policy, archive = policy_at(tmp_path), changed(sent, edit("client/extra.py", b"a = 1\n"))
    name = identity_of(archive)
    refused(policy, archive)
    file = tmp_path / "site.toml"
    file.write_text(f'[site]\nname = "north"\ndata = "phantom"\nwork = "{tmp_path}"\n')
    for word in ("approve", "reject"):
        done = CliRunner().invoke(app, ["site", word, name, "--site", str(file)], catch_exceptions=False)
        assert done.exit_code == 0
        if word == "approve":
            check_code(policy, archive)
            (code_of(policy, name).folder / "app.fab").write_bytes(b"changed meanwhile")  # no reason to let it run on
    assert "rejected" in refused(policy, archive).sentence
    assert code_of(policy, name).decision == read_log(tmp_path / "site-north")[-1]
    assert [d.approved for d in read_log(tmp_path / "site-north")] == [True, False]
    for approved in (True, False):
        with pytest.raises(FedistillError, match=r"was rejected by .*: that stands"):
            decide(policy, name, approved=approved, reason="")


def test_a_careful_site_approves_the_installed_code_too(tmp_path: Path, sent: bytes) -> None:
    policy = policy_at(tmp_path, "approved")
    assert refused(policy, sent).code == "code"
    decide(policy, identity_of(sent), approved=True, reason="")
    check_code(policy, sent)


def test_approval_is_of_these_bytes(tmp_path: Path, sent: bytes) -> None:
    policy = policy_at(tmp_path)
    first = changed(sent, edit("client/extra.py", b"a = 1\n"))
    refused(policy, first)
    decide(policy, identity_of(first), approved=True, reason="")
    assert refused(policy, changed(sent, edit("client/extra.py", b"a = 2\n"))).code == "code"
    (code_of(policy, identity_of(first)).folder / "app.fab").write_bytes(sent)
    with pytest.raises(FedistillError, match="was changed after it came"):
        code_of(policy, identity_of(first)).load()


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for k in range(6):
            packed.writestr(f"{k}.py", bytes(10_000_000))
    return out.getvalue()


def twice() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr("client/app.py", b"good")
        with pytest.warns(UserWarning, match="Duplicate"):
            packed.writestr("client/app.py", b"bad")
    return out.getvalue()


def packed_otherwise() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("client/app.py", b"good")
    return out.getvalue()


@pytest.mark.parametrize(
    "make", [bomb, twice, packed_otherwise, lambda: b"", lambda: b"PK" + bytes(100), lambda: bytes(11_000_000)]
)
def test_traps_are_refused_and_not_kept(tmp_path: Path, make: Callable[[], bytes]) -> None:
    assert refused(policy_at(tmp_path, "approved"), make()).code == "bad-code"
    assert codes(policy_at(tmp_path)) == []


def test_the_commands_show_code_and_decide(tmp_path: Path, sent: bytes) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f'[site]\nname = "north"\ndata = "phantom"\nwork = "{tmp_path}"\n')
    archive = changed(sent, edit("client/extra.py", b"print('hi')\x1b[2J\n"))
    refused(policy_at(tmp_path), archive)
    name = identity_of(archive)

    def told(*words: str) -> str:
        done = CliRunner().invoke(app, ["site", *words, "--site", str(file)], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.output

    assert name[:12] in told("pending")
    assert "client/extra.py" in told("code")
    shown = told("code", name[:12])
    assert "+print('hi')" in shown
    assert "\x1b" not in shown
    told("approve", name, "--reason", "harmless")
    assert "Code of jobs" not in told("pending")
    assert [(d.id, d.approved) for d in read_log(tmp_path / "site-north")] == [(name, True)]
