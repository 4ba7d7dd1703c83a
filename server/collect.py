"""Talking to the sites: every site at its own pace, deadlines, and repeats after a crash.

One conversation per site: a message, its reply, the next message at once, without waiting for the other sites.
Replies are fetched by one thread per message, since Flower fetches them one after the other and one broken upload
would hold up all that follow it.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import Arrays, encode

QUICK, MANY_QUICK = (
    1.0,
    50,
)  # replies within a second; more of them than this in a row, and the next message waits that long
PAUSES = (1.0, 30.0, 60.0, 120.0)  # before asking a crashed site again: Flower lets a dead node back in after 60 s
BROKEN_PULLS = 30  # in a row, before a reply is given up

# Flower's error codes; its reason text stays unread, since it may quote a site's exception.
CRASHED = {
    0: "its worker process died",
    3: "its reply did not arrive",
    4: "its reply is no longer available",
    5: "it is not connected",
    8: "its client process died",
}
BROKEN = {
    1: "it could not load the client app: is fedistill installed there?",
    2: "its client app stopped with an error",
    6: "a Flower mod refused the message",
    7: "it refused the app",
}

Receive = Callable[[int, RecordDict], RecordDict | None]


@dataclass(frozen=True)
class Failure:
    """Why a site gave no result. `status` is "failed" or "late"; `code` is that of the error, where there was one."""

    status: str
    reason: str
    code: str = ""


def wait_for_nodes(
    grid: Grid, expected: int, needed: int, timeout: float, among: Container[str] | None = None
) -> list[int]:
    """The nodes that are connected: `expected` of them, or at least `needed` once `timeout` seconds have passed.

    among: the numbers of the nodes that count; None: all.

    Raises `FedistillError` ("no-sites") if fewer than `needed` came.
    """
    end = time.monotonic() + timeout
    while True:
        nodes = sorted(node for node in grid.get_node_ids() if among is None or str(node) in among)
        if len(nodes) >= expected or (len(nodes) >= needed and time.monotonic() > end):
            return nodes
        if time.monotonic() > end:
            raise FedistillError(
                "no-sites", f"{len(nodes)} of {expected} sites connected within {timeout:.0f} s, {needed} are needed."
            )
        time.sleep(0.2)


def converse(
    grid: Grid,
    kind: str,
    first: Mapping[int, RecordDict],
    receive: Receive,
    again: Callable[[int, str], None],
    *,
    deadline: float,
) -> dict[int, Failure]:
    """Send each node its first message and go on until `receive` has nothing more to ask.

    receive: takes a reply and returns the next message for that node, or None at the end. A `FedistillError` that it
        raises ends the conversation with that site.
    again: told of every repeat after a crash. What a site has worked is on its disk, so a repeat goes on from there.
    Returns the nodes that failed or were late.
    """
    end = time.monotonic() + deadline
    replies: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
    open_with = dict(first)  # node -> what it was last asked
    tries, quick = dict.fromkeys(first, 0), dict.fromkeys(first, 0)
    asked: dict[int, float] = {}
    failures: dict[int, Failure] = {}

    def send(node: int, pause: float = 0.0) -> None:
        asked[node] = time.monotonic() + pause
        args = (grid, kind, node, open_with[node], end, pause, replies)
        threading.Thread(target=_exchange, args=args, daemon=True).start()

    def close(node: int, failure: Failure) -> None:
        del open_with[node]
        failures[node] = failure

    for node in first:
        send(node)
    while open_with:
        try:
            node, reply = replies.get(timeout=max(end - time.monotonic(), 0.001))
        except queue.Empty:
            for node in list(open_with):
                close(node, Failure("late", f"no answer within {deadline:.0f} s"))
            break
        code = None if reply is None or not reply.has_error() else reply.error.code
        if reply is None or code in CRASHED:
            why = CRASHED[code] if code is not None else "its reply could not be fetched"
            if tries[node] == len(PAUSES):
                close(node, Failure("failed", f"{why} ({tries[node] + 1} times)"))
                continue
            again(node, why)
            tries[node] += 1
            send(node, PAUSES[tries[node] - 1])
        elif code is not None:
            close(node, Failure("failed", BROKEN.get(code, f"Flower error {code}")))
        else:
            tries[node] = 0
            try:
                following = receive(node, reply.content)
            except FedistillError as error:
                close(node, Failure("failed", error.sentence, error.code))
                continue
            if following is None:
                del open_with[node]
            else:
                open_with[node] = following
                quick[node] = quick[node] + 1 if time.monotonic() - asked[node] < QUICK else 0
                send(node, QUICK if quick[node] > MANY_QUICK else 0.0)
    return failures


def _exchange(
    grid: Grid,
    kind: str,
    node: int,
    content: RecordDict,
    end: float,
    pause: float,
    replies: queue.SimpleQueue[tuple[int, Message | None]],
) -> None:
    """Push one message and put its reply in the queue, or None if it cannot be had. After `end` nobody listens."""
    time.sleep(min(pause, max(end - time.monotonic(), 0)))
    poll, broken, identity = 0.02, 0, None
    while time.monotonic() < end and broken < BROKEN_PULLS:
        try:
            if identity is None:
                message = Message(content, node, kind, ttl=end - time.monotonic() + 60)
                identity = next(iter(grid.push_messages([message])), None)
                if identity is None:
                    break
            for reply in grid.pull_messages([identity]):
                replies.put((node, reply))
                return
            broken = 0
        except Exception:  # the network, or a reply that Flower itself cannot read
            broken += 1
        time.sleep(poll)
        poll = min(poll * 1.2, 1.0)  # short messages return at once, long ones cost few requests
    replies.put((node, None))


def job(config: Config, **more: str | int | float) -> RecordDict:
    """A message to a site: the configuration and the values of one task."""
    return RecordDict({"job": ConfigRecord({"config": json.dumps(config.to_dict()), **more})})


def with_arrays(content: RecordDict, record: str, arrays: Arrays) -> RecordDict:
    content[record] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
    return content


def slice_job(config: Config, round: int, run: str, context: SyntheticSet | None) -> RecordDict:
    """A message that asks for one slice of work; `context` is the merged set of the round before."""
    if context is None:
        return job(config, round=round, run=run, seconds=config.slice_seconds)
    arrays, text = encode(context)
    return with_arrays(job(config, round=round, run=run, seconds=config.slice_seconds, context=text), "context", arrays)
