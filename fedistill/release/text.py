"""Text that comes from outside, on its way into and out of a release."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedistill.errors import FedistillError

# The brackets keep this line from finding itself. Whether data still are somebody's is for a lawyer to say, not for a tool.
CONCLUSIONS = re.compile(r"\w*an[o]nym\w*|\w*complian[t]\w*", re.IGNORECASE)
_MARKS = re.compile(r"([\\`*_{}\[\]<>#+!|~$&])")


def plain(text: str) -> str:
    """One line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escaped(text: str) -> str:
    """`text` as one line of Markdown that shows it and does nothing else."""
    return _MARKS.sub(r"\\\1", plain(text))


def quoted(text: str) -> str:
    """`text` as a YAML scalar in double quotes (JSON strings are YAML)."""
    return json.dumps(plain(text), ensure_ascii=False)


def check_words(folder: Path) -> None:
    """Raise `FedistillError` ("conclusion") where a text of the folder draws a legal conclusion instead of stating facts."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".md"):
            found = CONCLUSIONS.search(path.read_text(encoding="utf-8"))
            if found:
                raise FedistillError(
                    "conclusion",
                    f"{path.name} would say '{found[0]}', which is a legal conclusion: describe what was done to the data instead.",
                )
