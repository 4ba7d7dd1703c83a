"""What mkdocs does not do by itself: pages that are made from the code, and files that lie outside of `docs/`.

`<!-- generated: NAME -->` in a page becomes what `GENERATED[NAME]` writes. A link out of `docs/` leads to a copy of the file, or to
a page that shows the folder, or for README.md, CHANGELOG.md and CONTRIBUTING.md to a page of their own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import click
import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

from fedistill import cli  # noqa: E402
from fedistill.config import LIGHT, PRESETS, PRIVATE, Config  # noqa: E402
from fedistill.methods.registry import METHODS  # noqa: E402

PROJECT = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
}
SCOPES = {
    "data": "Data, and the seed",
    "experts": "Experts, sketches and privacy",
    "distill": "Distillation",
    "merge": "Merging",
    "eval": "Global models and arms of comparison",
    "run": "How the work is carried out",
}
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
_KEPT = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of `docs/`."""
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    pages |= {place: (ROOT / name).read_text(encoding="utf-8") for name, place in PROJECT.items()}
    for name, place in PROJECT.items():
        files.append(
            File.generated(config, place, content=_moved((ROOT / name).read_text(encoding="utf-8"), "", place))
        )
    for uri, text in pages.items():
        origin = next((name for name, place in PROJECT.items() if place == uri), join("docs", uri))
        for target in _targets(text, origin):
            _add(target, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri not in PROJECT.values():
        markdown = _moved(markdown, join("docs", dirname(uri)), uri)
    return re.sub(r"<!-- generated: ([\w-]+) -->", lambda found: GENERATED[found[1]](), markdown)


def _targets(text: str, origin: str) -> Iterator[str]:
    """Paths from the root of the project, of what a file at `origin` links to outside of `docs/`."""
    for found in _LINK.finditer(_KEPT.sub("", text)):
        path = normpath(join(dirname(origin), found["target"]))
        if not path.startswith("docs/") and path not in PROJECT and (ROOT / path).exists():
            yield path


def _add(path: str, files: Files, config: MkDocsConfig) -> None:
    place = _place(path)
    if files.get_file_from_path(place) is not None:
        return
    source = ROOT / path
    if source.is_dir():
        files.append(File.generated(config, place, content=_listing(source, path)))
    else:
        files.append(File.generated(config, place, content=source.read_bytes()))


def _place(path: str) -> str:
    """Where in the site something from outside of `docs/` lies."""
    if path in PROJECT:
        return PROJECT[path]
    return join("files", path, "index.md") if (ROOT / path).is_dir() else join("files", path)


def _listing(folder: Path, path: str) -> str:
    parts = [f"# {path}"]
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".toml", ".csv", ".py", ".md")):
        kind = {".toml": "toml", ".py": "python"}.get(file.suffix, "text")
        parts.append(f"## {file.relative_to(folder)}\n\n```{kind}\n{file.read_text(encoding='utf-8')}\n```")
    return "\n\n".join(parts) + "\n"


def _moved(text: str, folder: str, uri: str) -> str:
    """Links of a text that lies in `folder` of the project as links of the page `uri`."""

    def link(found: re.Match[str]) -> str:
        path = normpath(join(folder, found["target"]))
        inside = path.startswith("docs/")
        if not (ROOT / path).exists() or (inside and folder):
            return found[0]
        place = path.removeprefix("docs/") if inside else _place(path)
        return f"{found['before']}{relpath(place, dirname(uri) or '.')}{found['anchor'] or ''}"

    kept = [m.span() for m in _KEPT.finditer(text)]
    return _LINK.sub(lambda m: m[0] if any(a <= m.start() < b for a, b in kept) else link(m), text)


def command_line() -> str:
    """Every command with its arguments and options, as the command line itself knows them."""
    parts: list[str] = []
    root = typer.main.get_command(cli.app)
    assert isinstance(root, click.Group)
    for name, command in root.commands.items():
        parts += _described(f"fedistill {name}", command, 2)
    return "\n\n".join(parts)


def _described(name: str, command: click.Command, level: int) -> Iterator[str]:
    yield f"{'#' * level} {name}"
    help_text = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help or "")
    yield _escaped(help_text.strip())
    if isinstance(command, click.Group):
        for below, one in command.commands.items():
            yield from _described(f"{name} {below}", one, level + 1)
        return
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{name} {usage}\n```"
    rows = [_row(parameter, context) for parameter in command.params if parameter.name != "help"]
    if rows:
        yield "\n".join(["| | | default |", "|---|---|---|", *rows])


def _row(parameter: click.Parameter, context: click.Context) -> str:
    told = getattr(parameter, "help", None) or ""
    if isinstance(parameter, click.Option):
        word = "" if parameter.is_flag else " " + parameter.make_metavar(context)
        what = ", ".join([*parameter.opts, *parameter.secondary_opts]) + word
        default = parameter.default
        shown = (
            "required"
            if parameter.required
            else ""
            if default in (None, False, ()) or callable(default)
            else f"`{default}`"
        )
        if parameter.envvar:
            shown += f" (or `${parameter.envvar}`)"
    else:
        what, shown = parameter.make_metavar(context), "required" if parameter.required else ""
    return f"| `{what.replace('|', chr(92) + '|')}` | {_escaped(told)} | {shown} |"


def settings() -> str:
    """Every key of the configuration."""
    parts = []
    for scope, title in SCOPES.items():
        rows = [
            f"| `{f.name}` | {_default(f.name, f.default)} | {_escaped(f.metadata['help'])}{_values(f.metadata)} |"
            for f in fields(Config)
            if f.metadata["scope"] == scope
        ]
        parts.append("\n".join([f"## {title}", "", "| key | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _default(name: str, default: Any) -> str:
    if any(name in amounts for amounts in PRESETS.values()):
        return "by preset"
    return "empty" if default == "" else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _values(about: Any) -> str:
    if about["choices"]:
        return ". One of " + ", ".join(f"`{c}`" for c in about["choices"])
    low, high = about["low"], about["high"]
    if low is not None and high is not None:
        return f". From {low:g} to {high:g}"
    return f". At least {low:g}" if low else ""


def presets() -> str:
    """What the presets fill in."""
    keys = list(PRESETS["quick"])
    rows = [
        f"| `{key}` | " + " | ".join(str(p[key]) for p in PRESETS.values()) + f" | {PRIVATE.get(key, '')} |"
        for key in keys
    ]
    light = ", ".join(f"`{name}` {factor}" for name, factor in LIGHT.items())
    head = ["| key | " + " | ".join(PRESETS) + " | with `privacy=dp` |", "|---|" + "---:|" * (len(PRESETS) + 1)]
    return "\n".join(
        [
            *head,
            *rows,
            "",
            f"`iterations` of a preset are multiplied for methods whose iterations cost less: {light}; "
            "and `dm` has twice as many where there are more than two images per class.",
        ]
    )


def methods() -> str:
    """Every method with its source."""
    rows = []
    for name, method in METHODS.items():
        needs = "sketch" if method.sketch else "experts" if method.experts else "–"
        reads = "yes" if method.sees_images else "no"
        rows.append(f"| `{name}` | {_escaped(method.summary)} | {needs} | {reads} | {_escaped(method.source)} |")
    head = [
        "| method | what it does | made of the images beforehand | reads real images while it distils | source |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def _escaped(text: str) -> str:
    """For a cell of a table. Code stays code."""
    text = " ".join(text.split()) if "\n\n" not in text else text
    return re.sub(r"(`[^`]*`)|([|<*_])", lambda m: m[1] or ("\\" + m[2] if m[2] != "<" else "&lt;"), text)


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "settings": settings,
    "presets": presets,
    "methods": methods,
}
