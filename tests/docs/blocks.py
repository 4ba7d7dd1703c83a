"""The code blocks of the documentation, and what the comment above a block says of it.

<!-- not run: WHY -->       the commands of the block are parsed, and not run
<!-- exits 1: WHY -->       its last command is expected to end with this exit code
<!-- file: NAME -->         the block (TOML, CSV, ...) is the file NAME in the folder where the page's commands run
<!-- with: NAME ... -->     files that readers are supposed to have: `examples.py` makes small ones
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_site" not in p.parts)]

_FENCE = re.compile(
    r"(?P<above>(?:^[ ]*<!--.*?-->\n)*)"
    r"^(?P<indent>[ ]*)(?P<fence>```+)[ ]*(?P<language>[\w.-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- (not run|exits \d+|file|with): (.+?) -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """text: without the indentation of the fence. said: what the comments above it say, by their first words."""

    page: Path
    line: int
    language: str
    text: str
    said: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def kind(self) -> str:
        """commands, python, file, or nothing: no reader would type it."""
        if self.language in ("bash", "console", "sh", "shell") or (not self.language and self.text.startswith("$ ")):
            return "commands"
        if self.language in ("python", "py"):
            return "python"
        return "file" if "file" in self.said else ""

    @property
    def script(self) -> str:
        """What a shell is to do."""
        if not re.search(r"^\$ ", self.text, re.MULTILINE):
            return self.text
        lines, more = [], False
        for line in self.text.splitlines():
            if line.startswith("$ ") or more:
                lines.append(line.removeprefix("$ "))
                more = line.endswith("\\")
        return "\n".join(lines) + "\n"

    @property
    def exit_code(self) -> int:
        return next((int(word.split()[1]) for word in self.said if word.startswith("exits ")), 0)

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of `fedistill`, with the block's own variables filled in."""
        known: dict[str, str] = {}
        for line in self.script.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;|(?<!\\)\|", _without_comment(line)):
                text = re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], found[0]), part.strip())
                if found := re.fullmatch(r"(\w+)=(\"[^\"]*\"|'[^']*'|\S*)", text):
                    known[found[1]] = found[2].strip("\"'")
                    continue
                found = re.match(r"(?:\w+=\S* |docker compose .* exec \w+ )*fedistill (?P<rest>.*)", text)
                if found:
                    yield shlex.split(re.sub(r"[12]?>.*|&$", "", found["rest"]))


def _without_comment(line: str) -> str:
    found = re.match(r"((?:[^\"'#]|\"[^\"]*\"|'[^']*'|(?<=\S)#)*)", line)
    return found[1] if found else line


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        said = dict(_COMMENT.findall(match["above"]))
        lines = [line[indent:] if line[:indent].isspace() else line for line in match["text"].splitlines()]
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("fence")) + 1,
                language=match["language"],
                text="\n".join(lines) + "\n",
                said=said,
            )
        )
    return found
