"""What a site's SuperNode starts in place of Flower's own `flwr-clientapp`: that, but the server's code runs only where the site
lets it, and the text of an exception stays at the site.

    guard.py SITE.TOML [what the SuperNode adds]

It belongs to the site's installation and never travels. Flower has no door for this in its open-source part, so private names
of it are replaced; where a version lacks one of them, nothing runs. Other programs of Flower that run what a server sends are kept
from the SuperNode by `fedistill.deploy.node_environment`.
"""

from __future__ import annotations

import logging
import signal
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

REPLACED = ("pull_task_input", "install_from_fab", "get_load_client_app_fn", "push_message", "push_task_output")
LINGER = 30  # seconds that a process may take to end
CRASHED = 8  # Flower's code for a client app that died
WITHHELD = "what went wrong is said at the site only"


def guard(flower: ModuleType, policy_file: Path) -> None:
    """Put the site's check into `flwr.supernode.runtime.run_clientapp`."""
    pull, _, loader, push, output = (getattr(flower, name) for name in REPLACED)
    verdict: list[Path | FedistillError] = [FedistillError("code", "The code of this job was not looked at.")]
    asked: list[tuple[Message, Context]] = []  # what has no reply yet

    def pull_and_judge(client: Any) -> Any:
        message, context, run, app = pull(client)
        asked.append((message, context))
        verdict[:] = [judge(policy_file, app.content)]
        return message, context, run, app

    def load_allowed(*_: Any, **__: Any) -> Callable[..., Any]:
        if isinstance(found := verdict[0], FedistillError):
            return lambda *_: lambda message, context: refusal(message, found)
        return loader(default_app_ref="", app_path=str(found), multi_app=True)

    def push_without_text(client: Any, message: Message, context: Context) -> None:
        if message.has_error():
            message = Message(Error(code=message.error.code, reason=WITHHELD), reply_to=asked[0][0])
        push(client, message, context)
        asked.clear()

    def output_without_text(*args: Any, client: Any, **kwargs: Any) -> None:
        """The last thing that a process says. Where it was stopped before its reply, a server would wait until its deadline."""
        if asked:
            message, context = asked[0]
            push(client, Message(Error(code=CRASHED, reason=WITHHELD), reply_to=message), context)
        output(*args, client=client, **kwargs | ({"details": WITHHELD} if kwargs.get("details") else {}))

    flower.pull_task_input = pull_and_judge  # type: ignore[attr-defined]
    flower.install_from_fab = lambda *_, **__: None  # type: ignore[attr-defined]
    flower.get_load_client_app_fn = load_allowed  # type: ignore[attr-defined]
    flower.push_message = push_without_text  # type: ignore[attr-defined]
    flower.push_task_output = output_without_text  # type: ignore[attr-defined]


def judge(policy_file: Path, archive: bytes) -> Path | FedistillError:
    """The folder to load an app from, or why it must not run."""
    try:
        return check_code(read_policy(policy_file), archive)
    except FedistillError as error:
        if error.code in ("code", "bad-code"):
            return error
        log.error(error.sentence)  # it names the site's own files
        return FedistillError("code", "A file of this site's own cannot be used: its SuperNode's output says why.")


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
    try:
        flwr_clientapp()
    finally:  # native code can hang when a process ends, and neither Python nor Flower's own timer runs any more
        signal.alarm(LINGER)
