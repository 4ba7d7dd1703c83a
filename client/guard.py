"""What a site's SuperNode starts in place of Flower's own `flwr-clientapp`: that, but the server's code runs only where the site
lets it, and the text of an exception stays at the site.

    guard.py SITE.TOML [what the SuperNode adds]

It belongs to the site's installation and never travels. Flower has no door for this in its open-source part, so private names
of it are replaced; where a version of Flower lacks one of them, or does not call it, nothing runs.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fedistill.errors import FedistillError
from fedistill.site.code import check_code
from fedistill.site.policy import read_policy

log = logging.getLogger(__name__)

WITHHELD = "what went wrong is said at the site only"


def guard(flower: ModuleType, policy_file: Path) -> None:
    """Put the site's check into `flwr.supernode.runtime.run_clientapp`."""
    pull, install, loader, push, output = (
        getattr(flower, name)
        for name in (
            "pull_task_input",
            "install_from_fab",
            "get_load_client_app_fn",
            "push_message",
            "push_task_output",
        )
    )
    refused: list[FedistillError] = [FedistillError("code", "The code of this job was not looked at.")]
    asked: list[Message] = []

    def pull_and_judge(client: Any) -> Any:
        message, context, run, app = pull(client)
        asked.append(message)
        refused[:] = judge(policy_file, app.content, app.hash_str)
        return message, context, run, app

    def install_allowed(*args: Any, **kwargs: Any) -> Any:
        return None if refused else install(*args, **kwargs)

    def load_allowed(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        if refused:
            return lambda *_: lambda message, context: refusal(message, refused[0])
        return loader(*args, **kwargs)

    def push_without_text(client: Any, message: Message, context: Context) -> None:
        if message.has_error():
            message = Message(Error(code=message.error.code, reason=WITHHELD), reply_to=asked[0])
        push(client, message, context)

    def output_without_text(*args: Any, **kwargs: Any) -> None:
        output(*args, **kwargs | ({"details": WITHHELD} if kwargs.get("details") else {}))

    flower.pull_task_input = pull_and_judge  # type: ignore[attr-defined]
    flower.install_from_fab = install_allowed  # type: ignore[attr-defined]
    flower.get_load_client_app_fn = load_allowed  # type: ignore[attr-defined]
    flower.push_message = push_without_text  # type: ignore[attr-defined]
    flower.push_task_output = output_without_text  # type: ignore[attr-defined]


def judge(policy_file: Path, archive: bytes, told: str) -> list[FedistillError]:
    """Why an app must not run, or nothing. told: the hash under which Flower will look for what it unpacked."""
    if hashlib.sha256(archive).hexdigest() != told:
        return [FedistillError("bad-code", "The code of this job is not what its hash says.")]
    try:
        check_code(read_policy(policy_file), archive)
    except FedistillError as error:
        if error.code in ("code", "bad-code"):
            return [error]
        log.error(error.sentence)  # it names the site's own files
        return [FedistillError("code", "A file of this site's own cannot be used: its SuperNode's output says why.")]
    return []


def refusal(message: Message, error: FedistillError) -> Message:
    """As `client.app` answers on an error."""
    return Message(
        RecordDict({"error": ConfigRecord({"code": error.code, "sentence": error.sentence})}), reply_to=message
    )


if __name__ == "__main__":
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    guard(run_clientapp, Path(sys.argv[1]))
    sys.argv = ["flwr-clientapp", *sys.argv[2:]]
    flwr_clientapp()
