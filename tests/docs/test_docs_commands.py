"""Every command of README.md and of the documentation: run small, page by page, or where its page says why not, parsed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
import typer
from blocks import PAGES, ROOT, Block, blocks
from examples import write_examples
from workshop import programs

from fedistill import cli
from fedistill.commands.shared import pairs
from fedistill.config import make_config
from fedistill.errors import FedistillError

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in BLOCKS if block.kind == "commands"]
SECONDS = 600.0  # that a block may take on a busy machine, before it counts as hung


def runs(page: Path) -> list[Block]:
    """What a page runs and writes, in order."""
    return [block for block in blocks(page) if block.kind and "not run" not in block.said]


@pytest.fixture(scope="module")
def workshop() -> Iterator[Path]:
    """A folder with `bin/fedistill` and `bin/python`, and the readers' files in `examples`."""
    with tempfile.TemporaryDirectory(prefix="fedistill-docs-") as name:  # not tmp_path: a socket's path is short
        place, door = Path(name), Path(name) / "door"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("workshop.py")), str(door)],
            stdout=subprocess.PIPE,
            env=environment,
        ) as process:
            try:
                assert process.stdout is not None
                (place / "examples").mkdir()
                write_examples(place / "examples")
                programs(place / "bin", door)
                assert process.stdout.readline() == b"ready\n"
                yield place
            finally:
                process.kill()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runs(page)], ids=lambda page: str(page.relative_to(ROOT)).replace("/", "-")
)
def test_a_page_does_what_it_says(page: Path, workshop: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{workshop / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "MEDMNIST_ROOT": str(workshop / "examples" / "medmnist"),
        "OMP_NUM_THREADS": "1",
    }
    for block in runs(page):
        for name in block.said.get("with", "").split():
            (tmp_path / name).symlink_to(workshop / "examples" / name)
        if block.kind == "file":
            file = tmp_path / block.said["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
            continue
        python = block.kind == "python"
        done = subprocess.run(
            [workshop / "bin" / "python"] if python else ["bash", "-euo", "pipefail"],
            input=block.text if python else block.script,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == block.exit_code, f"{block.name}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.name.replace("/", "-"))
def test_commands_exist_with_their_options_and_settings(block: Block) -> None:
    for words in block.commands():
        make_config(pairs(parsed(words).params.get("settings")))


def parsed(words: Sequence[str]) -> click.Context:
    """A command line as the command line understands it; nothing is done."""
    command: click.Command = typer.main.get_command(cli.app)
    context, left = click.Context(command, info_name="fedistill"), list(words)
    while isinstance(command, click.Group) and left and not left[0].startswith("-"):
        name = left.pop(0)
        assert name in command.commands, f"there is no command `fedistill {' '.join(words)}`"
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    if left in (["--help"], ["--version"]):
        return context
    try:
        return command.make_context(command.name, left, parent=context.parent)
    except click.ClickException as error:
        raise AssertionError(f"`fedistill {' '.join(words)}`: {error.format_message()}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)).replace("/", "-"))
def test_commands_in_sentences_exist(page: Path) -> None:
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(?:\$ )?fedistill ([^`\n]+)`", text):
        command: click.Command = typer.main.get_command(cli.app)
        for word in code.split():
            if word.isupper() or word in ("|", "..."):
                continue
            if isinstance(command, click.Group) and not word.startswith("-"):
                assert word in command.commands, f"`fedistill {code}`"
                command = command.commands[word] if "|" not in code else command
            if word.startswith("--") and word not in ("--help", "--version"):
                options = {name for parameter in command.params for name in parameter.opts}
                assert word.partition("=")[0] in options, f"`fedistill {code}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)).replace("/", "-"))
def test_code_is_fenced_and_comments_are_understood(page: Path) -> None:
    text = page.read_text()
    fenced = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^(?: {4}|\t)(?:\$ |fedistill |python |pip )", fenced, re.MULTILINE)
    comments = re.findall(r"<!-- *(not run|exits|file|with)\b", text)
    assert len(comments) == sum(len(block.said) for block in blocks(page)), "a comment is not right above its block"
    for block in blocks(page):
        assert all(block.said.values())
        if block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("simulat --data phantom", "no command"),
        ("simulate --dta phantom", "No such option"),
        ("simulate --ipc many", "not a valid"),
        ("server init", "Missing"),
        ("study explain", "no command"),
    ],
)
def test_a_wrong_command_is_found(words: str, wrong: str) -> None:
    with pytest.raises(AssertionError, match=wrong):
        parsed(words.split())


def test_a_wrong_setting_is_found() -> None:
    words = ["simulate", "--set", "phantom_imges=90"]
    with pytest.raises(FedistillError, match="did you mean 'phantom_images'"):
        make_config(pairs(parsed(words).params["settings"]))


def test_variables_and_comments_of_a_block_are_understood() -> None:
    text = 'P="fedistill study plan --out x"   # a comment\n$P budget --jobs 2  # and --none\ncd y && fedistill options | head\n'
    block = Block(page=ROOT / "README.md", line=1, language="bash", text=text, said={})
    assert list(block.commands()) == [["study", "plan", "--out", "x", "budget", "--jobs", "2"], ["options"]]
