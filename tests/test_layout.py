"""What may import what, and the Flower app's configuration: rules that the layout of the project promises."""

from __future__ import annotations

import ast
import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedistill.config import Config

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "fedistill").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_knows_neither_flower_nor_the_app(path: Path) -> None:
    assert not {"flwr", "ray", "client", "server", "simulations"} & set(imports(path))


def test_opacus_stays_in_privacy() -> None:
    users = {p.relative_to(ROOT / "fedistill").parts[0] for p in LIBRARY if "opacus" in set(imports(p))}
    assert users <= {"privacy"}


def test_client_and_server_do_not_import_each_other() -> None:
    for folder, other in (("client", "server"), ("server", "client")):
        for path in (ROOT / folder).glob("*.py"):
            assert other not in set(imports(path)), path


def test_flower_configuration_is_the_configuration() -> None:
    flower = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert flower["config"] == dataclasses.asdict(Config())
    assert {k: type(v) for k, v in flower["config"].items()} == {
        k: type(v) for k, v in dataclasses.asdict(Config()).items()
    }
    assert flower["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
