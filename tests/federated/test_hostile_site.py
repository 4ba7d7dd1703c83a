"""A site that sends whatever it likes: it has failed, with a code and a sentence, and the others go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hostile import header, npy
from localgrid import LocalGrid, serve
from test_flow import NODES, TINY

from client.app import app as client_app
from fedistill.files import read_json
from fedistill.synthetic.store import load_set
from fedistill.wire import encode, read_npy

Spoil = Callable[[RecordDict], RecordDict]


def arrays_of(content: RecordDict) -> dict[str, Array]:
    return dict(content.array_records["set"].items())


def with_array(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(content: RecordDict) -> RecordDict:
        arrays = arrays_of(content)
        old = arrays[name]
        arrays[name] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=change(old.data))
        content["set"] = ArrayRecord(arrays)
        return content

    return spoil


def with_text(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(content: RecordDict) -> RecordDict:
        about = json.loads(str(content.config_records["text"]["set"]))
        change(about)
        content["text"] = ConfigRecord({"set": json.dumps(about, sort_keys=True)})
        return content

    return spoil


def filled(value: float) -> Callable[[bytes], bytes]:
    return lambda data: npy(np.full_like(read_npy(data), value))


def instead(**records: Any) -> Spoil:
    return lambda content: RecordDict(records)


def without_set(content: RecordDict) -> RecordDict:
    return RecordDict({"reply": content["reply"], "set": MetricRecord({"x": 1.0})})


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "a terabyte": (with_array("pixels", lambda d: header("'|u1'", "(1099511627776,)", b"abc")), "bad-reply"),
    "objects": (with_array("pixels", lambda d: header("'|O'", "(1,)", b"cos\nsystem\n(S'x'\ntR.")), "bad-reply"),
    "cut": (with_array("pixels", lambda d: d[:-1]), "bad-reply"),
    "not finite": (with_array("range", filled(np.nan)), "bad-set"),
    "labels out of range": (with_array("labels", filled(200)), "bad-set"),
    "another site": (with_text(lambda about: about.update(sites=["site-1"])), "refused-set"),
    "the manifest of another site": (with_text(lambda about: about["manifest"].update({"site-1": {}})), "refused-set"),
    "another kind": (with_text(lambda about: about.update(kind="ordinal")), "refused-set"),
    "no set": (without_set, "bad-reply"),
    "nothing": (instead(), "bad-reply"),
    "deep": (instead(reply=ConfigRecord({"json": '{"a":' * 100_000})), "bad-reply"),
    "not text": (instead(reply=ConfigRecord({"json": [1, 2]})), "bad-reply"),
    "a surrogate": (instead(reply=ConfigRecord({"json": json.dumps({"phase": "ready", "notes": ["\ud800"]})})), "bad-reply"),
    "no code": (instead(error=ConfigRecord({"code": "<script>", "sentence": "x"})), "bad-reply"),
}  # fmt: skip


def test_the_run_goes_on_without_such_sites(tmp_path: Path) -> None:
    """One site as it should be, and beside it one of every kind above."""

    def client(message: Message, context: Context) -> Message:
        reply, number = client_app(message, context), context.node_id - 101
        if number >= 0 and "set" in reply.content:
            return Message(list(HOSTILE.values())[number][0](reply.content), reply_to=message)
        return reply

    count = len(HOSTILE) + 1
    config = dataclasses.replace(TINY, sites=count, phantom_images=30 * count, quorum=1, out=str(tmp_path / "run"))
    serve(LocalGrid(client, [{"partition-id": k} for k in range(count)]), config)
    sites = read_json(tmp_path / "run/seed-0/sites.json")
    told = {about["site"]: (about["status"], about["code"]) for about in sites.values()}
    assert told.pop("site-1") == ("ok", "")
    assert told == {f"site-{k}": ("failed", code) for k, (_, code) in enumerate(HOSTILE.values(), 2)}
    assert all(10 < len(about["reason"]) < 600 for about in sites.values() if about["status"] == "failed")
    assert load_set(tmp_path / "run/seed-0/merged").sites == ("site-1",)
    assert not (tmp_path / "run/error.json").exists()
    folder = tmp_path / "run/seed-0/round-1/site-site-1"
    assert encode(load_set(folder))[1] == (folder / "manifest.json").read_text()


def job(**changes: Any) -> RecordDict:
    told = {"config": json.dumps(TINY.to_dict()), "round": 1, "run": "r", "seconds": 0.1, "split": "test"} | changes
    return RecordDict({"job": ConfigRecord({key: value for key, value in told.items() if value is not None})})


def with_record(content: RecordDict, name: str, arrays: dict[str, bytes]) -> RecordDict:
    held = {k: Array(dtype="x", shape=(1,), stype="numpy.ndarray", data=v) for k, v in arrays.items()}
    content[name] = ArrayRecord(held)
    return content


MESSAGES: dict[str, tuple[str, RecordDict, str]] = {
    "no job": ("train.distill", RecordDict(), "bad-job"),
    "no configuration": ("query.describe", job(config=None), "bad-job"),
    "a deep configuration": ("query.describe", job(config='{"a":' * 100_000), "bad-job"),
    "a long configuration": ("query.describe", job(config=" " * 70_000 + "{}"), "bad-job"),
    "a wide network": ("query.describe", job(config=json.dumps(TINY.to_dict() | {"width": 10**9})), "bad-value"),
    "no round": ("train.distill", job(round=None), "bad-job"),
    "a late round": ("train.distill", job(round=2), "bad-job"),
    "a round as text": ("train.distill", job(round="1"), "bad-job"),
    "a long word": ("train.distill", job(run="x" * 300), "bad-job"),
    "a path": ("train.distill", job(run="../../x"), "bad-job"),
    "no end": ("train.distill", job(seconds=float("nan")), "bad-job"),
    "context without text": (
        "train.distill",
        with_record(job(), "context", {"pixels": header("'|u1'", "(1099511627776,)", b"")}),
        "bad-context",
    ),
    "no models": ("evaluate.models", job(), "bad-job"),
    "a model of a terabyte": (
        "evaluate.models",
        with_record(job(), "models", {"mlp": header("'<f4'", "(1099511627776,)", b"")}),
        "bad-array",
    ),
    "a model that does not fit": ("evaluate.models", with_record(job(), "models", {"mlp": npy(np.ones(3, "f4"))}), "bad-model"),
    "a model of NaN": ("evaluate.models", with_record(job(), "models", {"mlp": npy(np.full(3, np.nan, "f4"))}), "bad-model"),
    "a model of halves": ("evaluate.models", with_record(job(), "models", {"mlp": npy(np.ones(3, "f2"))}), "bad-model"),
    "an unknown model": ("evaluate.models", with_record(job(), "models", {"x@1": npy(np.ones(3, "f4"))}), "unknown-model"),
    "training images": ("evaluate.models", with_record(job(split="train"), "models", {}), "bad-job"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_a_site_answers_a_hostile_server_with_a_code_and_a_sentence(name: str, tmp_path: Path) -> None:
    kind, content, code = MESSAGES[name]
    if "config" in content.get("job", {}) and code != "bad-value" and "configuration" not in name:
        settings = TINY.to_dict() | {"work": str(tmp_path / "work")}
        content["job"]["config"] = json.dumps(settings)
    grid = LocalGrid(client_app, NODES[:1])
    message = Message(content, 100, kind, ttl=60)
    (identity,) = grid.push_messages([message])
    while not (replies := list(grid.pull_messages([identity]))):
        pass
    error = replies[0].content["error"]
    assert (error["code"], error["sentence"][-1]) == (code, ".")
    assert not list(tmp_path.rglob("errors.log"))
