"""What somebody who means harm could send: readers of bytes from outside, valid inputs for them, and ways to spoil those.

An input is a record of bytes. Keys say what they are: "npy:..." a `.npy` file, "json:..." a JSON text, "job:..." the JSON of one
value of a message, "file:..." a file.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import CARD, private, set_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from client import app as client
from fedistill.config import Config
from fedistill.data.sources import load_data
from fedistill.deploy import begin_server, make_kit, read_kit
from fedistill.errors import FedistillError
from fedistill.experts.train import Task
from fedistill.release import verify as verifying
from fedistill.release.claim import check_promise, read_claim
from fedistill.release.make import make_release
from fedistill.release.seal import keygen, load_private
from fedistill.release.show import screen_of
from fedistill.site.describe import describe, task_of
from fedistill.site.job import Progress
from fedistill.site.policy import Policy
from fedistill.synthetic.check import check_set
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set
from fedistill.wire import DTYPES, decode, encode, read_arrays, read_npy
from server import replies

Input = dict[str, bytes]

SET = {"bad-set", "bad-array"}
PROMISE = {"bad-privacy", "seed-in-manifest", "real-images", "condition-failed", "refused-set"}
SETTINGS = {"bad-job", "bad-value", "unknown-...", "policy", "real-images", "no-budget"}
CLIENT = SETTINGS | {"bad-array", "bad-context", "bad-model"}


@dataclass(frozen=True)
class Reader:
    """read: the outcome in a word for an input that is taken; raises `FedistillError` with one of `codes` on others."""

    seeds: list[Input]
    read: Callable[[Input], str]
    codes: set[str]


class Broken(Exception):
    """A reader that took what it should not have taken."""


# ---- valid inputs


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def set_input(made: SyntheticSet) -> Input:
    arrays, text = encode(made)
    return {f"npy:{name}": npy(array) for name, array in arrays.items()} | {"json:set": text.encode()}


def job_input(config: Config, **values: Any) -> Input:
    told = {f"job:{key}": json.dumps(value).encode() for key, value in values.items()}
    return {"json:config": json.dumps(config.to_dict()).encode()} | told


# ---- readers


def _arrays(given: Input) -> dict[str, bytes]:
    return {key[4:]: data for key, data in given.items() if key.startswith("npy:")}


def _text(given: Input, key: str) -> str:
    data = given.get(f"json:{key}", b"")
    try:
        return data.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _record(given: Input) -> ArrayRecord:
    """As Flower hands it over: the words beside the bytes are the sender's, and nobody reads them."""
    arrays = {k: Array(dtype="x", shape=(2**40,), stype="numpy.ndarray", data=v) for k, v in _arrays(given).items()}
    return ArrayRecord(arrays)


def _same(made: SyntheticSet, given: Input) -> None:
    """Whatever is taken is what `encode` writes, to the bit."""
    if set_input(made) != {k: v for k, v in given.items() if k.startswith(("npy:", "json:set"))}:
        raise Broken("a set that was taken encodes to other bytes")
    if not (torch.isfinite(made.images).all() and torch.isfinite(made.labels).all()):
        raise Broken("a set that was taken has values that are not finite")


def _wire(given: Input) -> str:
    made = decode(read_arrays(_arrays(given)), _text(given, "set"))
    _same(made, given)
    return "taken"


def _reply_with_set(given: Input) -> str:
    content = RecordDict({"set": _record(given), "text": ConfigRecord({"set": _text(given, "set")})})
    read = replies.read_set.__wrapped__  # type: ignore[attr-defined]  # without the net under it
    made, _ = read(content, max_images=12, geometry=TASK.geometry, classes=TASK.classes)
    check_set(made, site="site-0", task=TASK, ipc=6, counts=[60, 60])
    check_promise(made, PRIVATE, records=100)
    _same(made, given)
    promise = read_claim(made).sites[0]
    if made.sites != ("site-0",) or promise.epsilon is None or promise.epsilon > PRIVATE.epsilon:
        raise Broken("a set that lies about its site or its epsilon was taken")
    return "taken"


def _reply(given: Input) -> Any:
    content = RecordDict({"reply": ConfigRecord({"json": _text(given, "reply")})})
    return replies.read_reply.__wrapped__(content)  # type: ignore[attr-defined]


def _taken(read: Callable[..., Any], *rest: Any, **more: Any) -> Callable[[Input], str]:
    def taken(given: Input) -> str:
        found = read.__wrapped__(_reply(given), *rest, **more)  # type: ignore[attr-defined]
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()  # what the run folder takes
        return "taken"

    return taken


def _averaged(given: Input) -> str:
    content = RecordDict({"models": _record(given), "reply": ConfigRecord({"json": _text(given, "reply")})})
    replies.read_local.__wrapped__(content, {"mlp@0.1@0": 7, "convnet@0.1@0": 5})  # type: ignore[attr-defined]
    return "taken"


def _client_reader(work: Callable[..., Any], data: Any, record: str) -> Callable[[Input], str]:
    """A handler of the client app, at a real site with a policy, whose work is done by nobody."""
    policy = Policy(name="site-0", data="phantom", work=Path("/nonexistent"), jobs={})
    policy = dataclasses.replace(policy, jobs={"width": _Only(8), "depth": _Only(2)})
    kept: list[str] = []
    ready = Progress("distill", 1, 2, seconds={})
    replaced = {
        "policy_of": lambda node: policy,
        "find_site": lambda config, node, policy: policy.check_job(config) or client.Site("site-0", data, policy.work, policy),
        "_keep": lambda text, folder: kept.append(text),
        "advance": lambda *args, **more: ready,
    }  # fmt: skip

    def read(given: Input) -> str:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        values = {k[4:]: _scalar(v) for k, v in given.items() if k.startswith("job:")}
        values["config"] = _text(given, "config")
        if "json:set" in given:
            values["context"] = _text(given, "set")
        content = RecordDict({"job": ConfigRecord({k: v for k, v in values.items() if v is not None})})
        if any(key.startswith("npy:") for key in given):
            content[record] = _record(given)
        message = Message(content, 1, "query.x", ttl=60)
        message.metadata.__dict__["_message_id"] = "1"
        context = Context(run_id=1, node_id=1, node_config={"site-config": "/x"}, state=RecordDict(), run_config={})
        kept.clear()
        before = {name: getattr(client, name) for name in replaced}
        try:
            for name, value in replaced.items():
                setattr(client, name, value)
            answer = work(message, context).content
        finally:
            for name, value in before.items():
                setattr(client, name, value)
        if "error" not in answer:
            return "taken"
        code, sentence = (str(answer["error"][k]) for k in ("code", "sentence"))
        if code == "internal" or "Traceback" in sentence or 'File "' in sentence:
            raise Broken("\n".join(kept) or sentence)
        raise FedistillError(code, sentence)

    return read


class _Only:
    """What a policy allows: one value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __contains__(self, value: object) -> bool:
        return value == self.value

    def __str__(self) -> str:
        return str(self.value)


def _scalar(raw: bytes) -> Any:
    """A value that a message can hold: 64 bits, and no text that UTF-8 cannot hold."""
    try:
        value = json.loads(raw)
        if isinstance(value, str):
            value.encode()
    except (ValueError, RecursionError):
        return raw.decode(errors="replace")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return value if isinstance(value, bool | int | float | str) else str(value)


def _kit(file: Path) -> Callable[[Input], str]:
    def read(given: Input) -> str:
        file.write_bytes(given.get("file:kit.zip", b""))
        kit = read_kit(file)
        if not kit.name.isascii() or "/" in kit.name or len(kit.name) > 32 or '"' in kit.address:
            raise Broken(f"a kit of {kit.name!r} at {kit.address!r} was taken")
        return "taken"

    return read


def _folder_writer(folder: Path, given: Input) -> None:
    """The files of a folder; only those that changed since the last time are written."""
    last: Input = _WRITTEN.setdefault(folder, {})
    folder.mkdir(exist_ok=True)
    for key in set(last) | set(given):
        if key not in given:
            (folder / key[5:]).unlink()
        elif last.get(key) != given[key]:
            (folder / key[5:]).write_bytes(given[key])
    _WRITTEN[folder] = dict(given)


_WRITTEN: dict[Path, Input] = {}


def _folder(folder: Path) -> Callable[[Input], str]:
    def read(given: Input) -> str:
        _folder_writer(folder, given)
        made = load_set(folder)
        if encode(made)[1].encode() != given["file:manifest.json"]:
            raise Broken("a folder that was taken encodes to other bytes")
        read_claim(made)
        return "taken"

    return read


def _release(folder: Path) -> Callable[[Input], str]:
    """`release verify` and `release show`, without the accountants, which take seconds where the noise is new to them."""

    def read(given: Input) -> str:
        _folder_writer(folder, given)
        before = verifying.check_accounts
        verifying.check_accounts = lambda site: ([], [])
        try:
            found = verifying.verify(folder)
        finally:
            verifying.check_accounts = before
        json.dumps(dataclasses.asdict(found)).encode()
        document, claim = verifying.read_document(folder), read_claim(load_set(folder))
        screen_of(document, claim, {"signature": "", "files": 1, "bytes": 1, "problems": []})
        return "wrong" if found.problems else "taken"

    return read


TASK = Task((1, 28, 28), ("class 0", "class 1"), "xray")
PRIVATE = dataclasses.replace(Config(), privacy="dp", epsilon=4.0, delta=1e-4)
SMALL = Config(phantom_images=60, phantom_classes=2, phantom_size=16, width=8, depth=2, rounds=3, ipc=1, method="ptm")


def readers(place: Path) -> dict[str, Reader]:
    """Everything that reads bytes from outside, by name. place: an empty folder for what has to be a file."""
    rng = torch.Generator().manual_seed(0)
    hard, soft = set_of(private()), set_of(private(), soft=True)
    findings = set_of(private(), private(), kind="multilabel", per_class=3)
    sets = [set_input(made) for made in (hard, soft, findings)]
    volumes = set_input(set_of(private(), shape=(1, 4, 6, 6)))
    data = load_data(SMALL)
    context = set_of(private(), shape=(1, 16, 16))
    context = dataclasses.replace(context, class_names=data.class_names, modality=data.modality, kind=data.kind)
    job = job_input(SMALL, round=2, run="a1b2c3d4", seconds=1.5)
    sizes = {name: task_of(data).network(name, SMALL).size for name in ("convnet", "mlp")}
    thetas = {f"npy:{n}@0.01": npy(torch.randn(size, generator=rng).numpy()) for n, size in sizes.items()}
    progress = {
        "phase": "ready", "step": 3, "total": 3, "loss": 0.5, "eta": 0.0, "seconds": {"experts": 1.0, "distill": 2.0},
        "iterations": 3, "skipped": 0, "notes": ["a note"], "curve": [[10, 0.5], [20, 0.4]], "done": True,
    }  # fmt: skip
    about = describe(data, "north")
    told = [{"json:reply": json.dumps(value).encode()} for value in (progress, about, about | {"counts": None})]
    tables = {"json:reply": json.dumps({"mlp": [[3, 1], [0, 4]], "convnet": [[4, 0], [1, 3]]}).encode()}
    local = {
        "json:reply": b"30",
        "npy:mlp@0.1@0": npy(np.ones(7, np.float32)),
        "npy:convnet@0.1@0": npy(np.zeros(5, "<f4")),
    }
    server = begin_server(place / "server", "fed.example.org", 8123)
    kit = {"file:kit.zip": make_kit(server, "north")[0].read_bytes()}
    keygen(place / "key")
    make_release(soft, place / "made", CARD, key=load_private(place / "key"))
    release = {f"file:{path.name}": path.read_bytes() for path in (place / "made").iterdir()}
    shutil.rmtree(place / "made")
    folder = {key: release[key] for key in ("file:set.safetensors", "file:manifest.json")}
    nonsense = {"bad-reply"}
    return {
        "wire.decode": Reader([*sets, volumes], _wire, SET),
        "reply with a set": Reader(sets[:2], _reply_with_set, nonsense | SET | PROMISE),
        "reply: progress": Reader(told[:1], _taken(replies.read_progress), nonsense),
        "reply: description": Reader(told[1:2], _taken(replies.read_description), nonsense),
        "reply: private description": Reader(told[2:], _taken(replies.read_description, private=True), nonsense),
        "reply: counts": Reader([tables], _taken(replies.read_confusions, {"mlp", "convnet"}, (2, 2)), nonsense),
        "reply: averaged models": Reader([local], _averaged, nonsense),
        "job: distil": Reader([job | set_input(context), job], _client_reader(client.distill, data, "context"), CLIENT),
        "job: judge models": Reader(
            [job_input(SMALL, split="test") | thetas], _client_reader(client.evaluate, data, "models"), CLIENT
        ),
        "kit": Reader([kit], _kit(place / "kit.zip"), {"bad-kit"}),
        "folder of a set": Reader([folder], _folder(place / "set"), SET | {"no-set"} | PROMISE),
        "release": Reader(
            [release], _release(place / "release"), SET | PROMISE | {"no-release", "no-set", "bad-release", "bad-audit"}
        ),
    }  # fmt: skip


def outcome(reader: Reader, given: Input) -> str:
    """The code of a refusal, or what became of an input that was taken. Any other exception is a fault of ours."""
    try:
        return reader.read(given)
    except FedistillError as error:
        code = "unknown-..." if error.code.startswith("unknown-") else error.code
        if code not in reader.codes or not error.sentence:
            raise Broken(f"refused with an unexpected code: {error.code}: {error.sentence}") from error
        return code


# ---- ways to spoil an input

WORDS = ("", "x" * 5000, "\ud800", "../../etc/passwd", "\x1b[2J", "site-1", "seed", "NaN", "real", "patient", "random")
NUMBERS = (0, 1, -1, 2**31, 2**53, 2**63, 10**400, 0.0, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"))
LITERALS = {"@deep": "[" * 500 + "]" * 500, "@deeper": '{"a":' * 60_000 + "1" + "}" * 60_000, "@long": "9" * 5000}
HEADERS = ("|u1", "<u2", "<f2", "<f4", "<f8", ">f4", "|O", "<U9", "|V8", "<M8[s]", "|S0", "<i8", "|b1")


def mutated(given: Input, rng: random.Random, others: list[Input]) -> Input:
    """`given` after one to three changes; parts of `others` may take the place of its own."""
    spoiled = dict(given)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice(sorted(spoiled)) if spoiled else "json:set"
        what = rng.random()
        if what < 0.04:
            spoiled.pop(key, None)
        elif what < 0.10:
            other = rng.choice(sorted(rng.choice(others)))
            spoiled[key if rng.random() < 0.5 else other] = rng.choice(others).get(other, b"")
        elif what < 0.13 and len(spoiled) > 1:
            key, other = rng.sample(sorted(spoiled), 2)
            spoiled[key], spoiled[other] = spoiled[other], spoiled[key]
        elif what < 0.15 and key.startswith("npy:"):
            spoiled[f"npy:{rng.choice(('more', 'a@b', 'x' * 300, 'mlp', ''))}"] = spoiled[key]
        else:
            spoiled[key] = _spoil(key, spoiled.get(key, b""), rng)
    return spoiled


def _spoil(key: str, data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return _bytes(data, rng)
    if key.startswith("npy:"):
        return _array(data, rng)
    if key.startswith(("json:", "job:")) or key.endswith(".json"):
        return _json(data, rng)
    if key.endswith((".zip", ".npz")):
        return _zip(data, rng)
    if key.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header = _json(data[8 : 8 + size], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled, filled or random bytes."""
    raw, way = bytearray(data), rng.randrange(6)
    if way == 0 or not raw:
        return rng.randbytes(rng.choice((0, 1, 9, 200)))
    at = rng.randrange(len(raw))
    if way == 1:
        return bytes(raw[:at])
    if way == 2:
        return bytes(raw[:at] + raw[rng.randrange(at, len(raw)) :])
    if way == 3:
        return bytes(raw[:at] + raw[at : at + rng.choice((1, 8, 64))] + raw[at:])
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.choice((rng.randrange(len(raw)), min(rng.randrange(160), len(raw) - 1)))
        raw[place] = raw[place] ^ (1 << rng.randrange(8)) if way == 4 else rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(raw)


def header(descr: str, shape: str, data: bytes, *, order: str = "False", version: int = 1) -> bytes:
    """A `.npy` file that says of itself whatever it likes."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    wide = 2 if version == 1 else 4
    text += b" " * (-(len(text) + 9 + wide) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(wide, "little") + text + data


def _array(data: bytes, rng: random.Random) -> bytes:
    try:
        array = read_npy(data)
    except FedistillError:  # it was spoiled before
        return _bytes(data, rng)
    way = rng.randrange(7)
    if way == 0:
        bombs = ("(1099511627776,)", "(2, 4611686018427387904)", "(0, 9999999999, 9999999999, 9999999999)")
        odd = ("()", "(-1,)", "(1e9,)", "(True,)")
        shape = rng.choice((*bombs, *odd, f"({array.size},)", f"(1, {array.size})", str(array.shape[::-1])))
        return header(f"'{array.dtype.str}'", shape, array.tobytes(), order=rng.choice(("False", "False", "True")))
    if way == 1:
        descr = rng.choice([f"'{h}'" for h in HEADERS] + ["('<f4', (9999999,))", "[('a', '<f4')]", "[('a', '|O')]"])
        return header(descr, str(array.shape), array.tobytes(), version=rng.choice((1, 1, 2, 3)))
    if way == 2 and array.ndim:
        order = np.array(rng.sample(range(len(array)), len(array)), np.int64)
        return npy(array[order])
    if way == 3 and array.ndim:
        return npy(array[: rng.randrange(len(array) + 1)] if rng.random() < 0.5 else np.concatenate([array, array]))
    if way == 4:
        with np.errstate(all="ignore"):
            return npy(array.astype(rng.choice([*DTYPES, "<i8", "<f8"])))
    flat = array.copy().reshape(-1)
    if flat.size:
        floats = (np.nan, np.inf, -np.inf, -0.0, 1e30, -1.0, 2.0, 1e-40, 6e4)
        worst = np.array(rng.choice((0, 1, 255, 65535) if array.dtype.kind == "u" else floats))
        with np.errstate(all="ignore"):
            flat[rng.randrange(flat.size) :][: rng.choice((1, 1, 9, flat.size))] = worst.astype(array.dtype)
    return npy(flat.reshape(array.shape))


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data.decode(errors="surrogatepass"))
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    holder = {"": value}
    parent, key = _somewhere(holder, "", rng)
    way, new = rng.randrange(7), rng.choice((*WORDS, *NUMBERS, *LITERALS, None, True, [], {}, ["a"] * 2000, [0] * 9))
    if way == 0 and parent is not holder:
        del parent[key]
    elif way == 1 and isinstance(parent, dict) and parent is not holder:
        parent[rng.choice((*WORDS, "epsilon", "site-0", "init"))] = parent.pop(key)
    elif way == 2:
        other, place = _somewhere(holder, "", rng)
        parent[key] = json.loads(json.dumps(other[place]))
    elif way == 3 and isinstance(parent[key], int | float) and abs(parent[key]) < 2**63:
        parent[key] = parent[key] * rng.choice((0.5, 2, 10, -1)) if rng.random() < 0.7 else str(parent[key])
    else:
        parent[key] = new
    text = json.dumps(holder[""], sort_keys=rng.random() < 0.95)  # a text in another order is refused for that alone
    for word, literal in LITERALS.items():
        text = text.replace(f'"{word}"', literal)
    if rng.random() < 0.03 and text.startswith("{") and ":" in text:
        text = "{" + text[1:].split(",")[0].rstrip("}") + "," + text[1:]
    return text.encode(errors="surrogatepass")


def _somewhere(parent: Any, key: Any, rng: random.Random) -> tuple[Any, Any]:
    """A place in a JSON value: what holds it, and under which key."""
    while True:
        value = parent[key]
        if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
            return parent, key
        parent, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))


def _zip(data: bytes, rng: random.Random) -> bytes:
    """The archive once more, with something wrong in it, in its order, or in how it is packed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # it was spoiled before
        return _bytes(data, rng)
    if not parts:
        return _bytes(data, rng)
    k, way = rng.randrange(len(parts)), rng.randrange(6)
    name, content = parts[k]
    if way == 0:
        parts[k] = (rng.choice(("../../x", "north/extra", "x" * 300, name.upper(), "ä")), content)
    elif way == 1:
        parts.append(parts[k])
    elif way == 2:
        parts[k] = (name, bytes(rng.choice((200_000, 3_000_000))))
    elif way == 3:
        rng.shuffle(parts)
    else:
        kinds = {"json": _json, "npy": _array}
        parts[k] = (name, kinds.get(name.rpartition(".")[2], _bytes)(content, rng))
    file = io.BytesIO()
    pack = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    with zipfile.ZipFile(file, "w", pack) as archive:
        for part in parts:
            archive.writestr(zipfile.ZipInfo(part[0]), part[1], pack)
    return file.getvalue()


def saved(given: Input) -> str:
    """An input as text, and back by `loaded`."""
    return json.dumps({key: data.hex() for key, data in given.items()})


def loaded(text: str) -> Input:
    return {key: bytes.fromhex(data) for key, data in json.loads(text).items()}
