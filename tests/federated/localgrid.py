"""An in-process Grid for tests: the client app runs in threads, without Ray and without a network."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity  # private: Message(content, dst, type) reads it

from fedistill.config import Config
from server import app as server_app

Handler = Callable[[Message, Context], Message]


class LocalGrid(Grid):
    """One Context per node, kept between messages; counts the messages of every kind and node.

    break_with: asked before every message with (kind, node number, how many that node got before); returns None to let
    it through, a Flower error code, or a number of seconds below 1 to be slow for.
    gone: numbers of nodes that are not connected any more.
    """

    def __init__(
        self,
        client: Handler,
        nodes: list[dict[str, Any]],
        break_with: Callable[[str, int, int], float | None] = lambda kind, node, before: None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.contexts = {
            100 + i: Context(run_id=1, node_id=100 + i, node_config=dict(node), state=RecordDict(), run_config={})
            for i, node in enumerate(nodes)
        }
        self.gone: set[int] = set()
        self.sent: list[tuple[str, int]] = []
        self._client = client
        self._break = break_with
        self._pool = ThreadPoolExecutor(len(nodes))
        self._replies: dict[str, Future[Message]] = {}

    def count(self, kind: str, node: int | None = None) -> int:
        """Messages of this kind, to one node or to all."""
        return sum(k == kind and node in (None, n) for k, n in self.sent)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.contexts if node - 100 not in self.gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = identity
            self._replies[identity] = self._pool.submit(self._work, message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        done = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self.wait_for(i) for i in done]

    def wait_for(self, message_id: str) -> Message:
        return self._replies.pop(message_id).result()

    def _work(self, message: Message) -> Message:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id - 100
        before = self.count(kind, node)
        self.sent.append((kind, node))
        wrong = self._break(kind, node, before)
        if wrong is not None and wrong >= 1:
            return Message(Error(code=int(wrong), reason="secret: patient 4711"), reply_to=message)
        time.sleep(wrong or 0)
        return self._client(message, self.contexts[message.metadata.dst_node_id])


def real_site(name: str, work: Path, data: str = "phantom", **tables: Mapping[str, Any]) -> dict[str, Any]:
    """The node configuration of a site that is not simulated, with a policy file beside its work folder."""
    parts = {"site": {"name": name, "data": data, "work": str(work)}} | tables
    lines = [
        f"[{part}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items()) for part, keys in parts.items()
    ]
    file = work.with_name(f"{work.name}.toml")
    file.write_text("\n".join(lines))
    return {"site-config": str(file)}


def serve(grid: LocalGrid, config: Config) -> None:
    """The whole server app with `config` on the nodes of `grid`."""
    context = Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=config.to_dict())
    server_app.main(grid, context)
