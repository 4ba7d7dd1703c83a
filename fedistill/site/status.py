"""What a site's own disk says of its part in a federation. What the server thinks of it only the server knows."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedistill.site.code import codes
from fedistill.site.folder import site_folder
from fedistill.site.gate import requests
from fedistill.site.node import Node, read_node, watched
from fedistill.site.policy import Policy

LINES = 3  # of errors.log


def status_of(policy: Policy) -> dict[str, Any]:
    """Plain values, for --json."""
    node = read_node(policy) or Node()
    lines, count = _last_lines(policy.work / "errors.log")
    return {
        "site": policy.name,
        "running": node.alive,
        "state": node.state if node.alive or watched(policy) else "stopped",
        "since": node.since,
        "tries": node.tries,
        "why": node.why,
        "last_message": {"kind": node.message, "time": node.message_time, "answered": node.answered}
        if node.message
        else None,
        "last_slice": _last_slice(site_folder(policy.work, policy.name)),
        "errors": {"lines": count, "last": lines},
        "waiting": [request.id for request in requests(policy) if request.decision is None]
        + [code.id for code in codes(policy) if code.decision is None],
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    state = {
        "connected": "is connected",
        "starting": "is starting, or waits for the server",
        "stopped": "is not running",
    }
    word = state.get(found["state"], "ended, and is tried again")
    why = f": {found['why']}" if found["why"] and found["state"] != "connected" else ""
    since = f" (since {found['since']})" if found["since"] else ""
    told = [f"{found['site']}: the SuperNode {word}{since}{why}."]
    if message := found["last_message"]:
        answered = "answered" if message["answered"] else "being worked at, or lost"
        told.append(f"Last message: {message['kind']}, {message['time']}, {answered}.")
    if work := found["last_slice"]:
        told.append(f"Last slice of work ended {work['time']}, in phase {work['phase']}.")
    told.append(
        f"{len(found['waiting'])} decisions wait: `fedistill site pending`." if found["waiting"] else "Nothing waits."
    )
    errors = found["errors"]
    if errors["lines"]:
        told += [
            f"errors.log has {errors['lines']} lines, the last of which:",
            *(f"| {line}" for line in errors["last"]),
        ]
    return told


def _last_slice(folder: Path) -> dict[str, str] | None:
    """When work was last stored, and in which phase: "experts" (or what takes their place), "distill", or "ready"."""
    files = {
        "experts": folder.glob("*/seconds-experts.json"),
        "distill": folder.glob("*/*/seconds-distill.json"),
        "ready": folder.glob("*/*/progress-*.json"),
    }
    found = [(path.stat().st_mtime, phase) for phase, paths in files.items() for path in paths]
    if not found:
        return None
    when, phase = max(found)
    return {"time": datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds"), "phase": phase}


def _last_lines(path: Path) -> tuple[list[str], int]:
    """The last lines of a log, and how many it has."""
    count, last = 0, deque[str](maxlen=LINES)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                count += 1
                if line.strip():
                    last.append(line.rstrip()[:200])
    except FileNotFoundError:
        return [], 0
    return list(last), count
