"""Docstrings of this project describe an argument per line, `name: what it is`: on a page each becomes a point of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^((?:\*{0,2}[a-z_]+)(?:, [a-z_]+)*): (?=\S)")


class Points(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = points(obj.docstring.value)


def points(text: str) -> str:
    """The docstring in Markdown."""
    lines: list[str] = []
    before = ""  # what the line before was
    for line in text.splitlines():
        kind = "point" if _ARGUMENT.match(line) else "text"
        if line.startswith(("Returns ", "Raises ")):
            kind = "end"
        elif line.startswith("    ") and before == "point":
            kind = "point"  # what goes on of an argument
        if kind != before and line.strip() and (kind != "text" or before == "point"):
            lines.append("")
        lines.append(_ARGUMENT.sub(r"- `\1`: ", line) if kind == "point" else line)
        before = kind if line.strip() else ""
    return "\n".join(lines)
