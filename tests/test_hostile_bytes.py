"""What comes from outside is taken to the bit or refused with a code, and takes no more memory than it brings."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims import private, set_of
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hostile import PRIVATE, TASK, Reader, header, mutated, npy, outcome, readers, set_input
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.config import make_config
from fedistill.deploy import begin_server, make_kit, read_kit
from fedistill.errors import FedistillError
from fedistill.files import read_plain
from fedistill.privacy.accounting import Mechanism
from fedistill.release.claim import check_promise, read_claim
from fedistill.release.seal import broken_files
from fedistill.release.verify import MOST_DIFFERENT, check_accounts
from fedistill.synthetic.check import check_set
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set, save_set
from fedistill.wire import MAX_DEPTH, decode, encode, quantise, read_arrays, read_npy, strict_json
from server import replies

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {"release": 40}  # of the others 150
NAMES = [
    "wire.decode", "reply with a set", "reply: progress", "reply: description", "reply: private description",
    "reply: counts", "reply: averaged models", "job: distil", "job: judge models", "kit", "folder of a set", "release",
]  # fmt: skip


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("hostile"))


def test_every_reader_is_tried(every: dict[str, Reader]) -> None:
    assert list(every) == NAMES
    assert {outcome(reader, seed) for reader in every.values() for seed in reader.seeds} == {"taken"}


@pytest.mark.parametrize("name", NAMES)
def test_spoiled_inputs_are_taken_to_the_bit_or_refused(name: str, every: dict[str, Reader]) -> None:
    reader = every[name]

    @settings(max_examples=EXAMPLES.get(name, 150), deadline=None)
    @given(st.integers(0, 2**64))
    def spoil(seed: int) -> None:
        rng = random.Random(seed)
        outcome(reader, mutated(rng.choice(reader.seeds), rng, reader.seeds))

    spoil()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_no_array(data: bytes) -> None:
    for raw in (data, b"\x93NUMPY" + data, npy(np.zeros(3, np.float32))[:70] + data):
        with suppress(FedistillError):
            assert npy(read_npy(raw)) == raw


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes that `work` held at most; numpy tells tracemalloc what it asks for."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HEADERS = {
    "a terabyte": ("'|u1'", "(1099511627776,)", "False"),
    "more than 64 bits": ("'<f4'", "(4294967296, 4294967296, 4294967296)", "False"),
    "empty, with sides": ("'<f4'", "(0, 9999999999, 9999999999)", "False"),
    "too short": ("'|u1'", "(7,)", "False"),
    "too long": ("'|u1'", "(9,)", "False"),
    "negative": ("'|u1'", "(-8,)", "False"),
    "objects": ("'|O'", "(1,)", "False"),
    "a record": ("[('a', '<f4'), ('b', '<f4')]", "(1,)", "False"),
    "a subarray": ("('<f4', (2,))", "(1,)", "False"),
    "text": ("'<U2'", "(1,)", "False"),
    "no bytes each": ("'|S0'", "(1099511627776,)", "False"),
    "another order": ("'|u1'", "(2, 4)", "True"),
    "another end": ("'>f4'", "(2,)", "False"),
    "wide": ("'<f8'", "(1,)", "False"),
    "a float": ("'|u1'", "(8.0,)", "False"),
    "code": ("__import__('os').getpid()", "(8,)", "False"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_takes_no_memory(name: str) -> None:
    descr, shape, order = HEADERS[name]
    for version in (1, 2, 3):
        raw = header(descr, shape, bytes(8), order=order, version=version)

        def read(raw: bytes = raw) -> None:
            with pytest.raises(FedistillError, check=lambda e: e.code == "bad-array"):
                read_npy(raw)

        assert peak_of(read) < 2**20


def test_a_pickle_is_no_array() -> None:
    raw = b"cos\nsystem\n(S'exit 1'\ntR."
    for data in (raw, header("'|O'", "()", raw)):
        with pytest.raises(FedistillError, check=lambda e: e.code == "bad-array"):
            read_npy(data)


def test_arrays_are_counted_and_weighed() -> None:
    one = npy(np.zeros(4, np.uint8))
    assert read_arrays({"a": one}, most_bytes=len(one))["a"].tolist() == [0] * 4
    for raw, most in (({"a": one}, len(one) - 1), ({str(k): one for k in range(1001)}, 2**30)):
        with pytest.raises(FedistillError, check=lambda e: e.code == "bad-array"):
            read_arrays(raw, most_bytes=most)


def test_few_bytes_do_not_become_many_labels() -> None:
    """One byte per label, and as many classes as a text can name."""
    made = set_of(private(), shape=(1, 1, 1), classes=2, per_class=2000)
    arrays, text = encode(made)
    about = json.loads(text) | {"class_names": [f"{k}" for k in range(300_000)]}
    many = json.dumps(about, sort_keys=True)

    def read() -> None:
        with pytest.raises(FedistillError, match="probabilities are too many"):
            decode(arrays, many)

    assert peak_of(read) < 200 * 2**20  # the text itself, as a list


def reply_with(arrays: dict[str, bytes], text: str) -> RecordDict:
    held = {k: Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=v) for k, v in arrays.items()}
    return RecordDict({"set": ArrayRecord(held), "text": ConfigRecord({"set": text})})


def test_a_reply_is_no_larger_than_what_was_asked_for() -> None:
    made = set_of(private(), per_class=60)
    raw = {k: npy(a) for k, a in encode(made)[0].items()}
    asked = {"geometry": TASK.geometry, "classes": TASK.classes}
    assert len(replies.read_set(reply_with(raw, encode(made)[1]), max_images=120, **asked)[0]) == 120
    with pytest.raises(FedistillError, match="are the most") as caught:
        replies.read_set(reply_with(raw, encode(made)[1]), max_images=12, **asked)
    assert caught.value.code == "bad-reply"


def test_a_reply_that_breaks_its_reader_is_the_sites_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(replies, "strict_json", broken)
    with pytest.raises(FedistillError, match="cannot be read") as caught:
        replies.read_reply(RecordDict({"reply": ConfigRecord({"json": "1"})}))
    assert caught.value.code == "bad-reply"
    assert "secret" not in caught.value.sentence


@pytest.mark.parametrize(
    "record",
    [
        {"code": "x" * 41, "sentence": "a"},
        {"code": "Bad Code\n", "sentence": "a"},
        {"code": 3, "sentence": "a"},
        {"code": "late"},
        {"code": ["late"], "sentence": ["a"]},
    ],
)
def test_an_error_of_a_site_is_a_code_and_a_sentence(record: dict[str, Any]) -> None:
    with pytest.raises(FedistillError, check=lambda e: e.code == "bad-reply"):
        replies.read_reply(RecordDict({"error": ConfigRecord(record)}))
    with pytest.raises(FedistillError, check=lambda e: e.code == "late" and len(e.sentence) == 500):
        replies.read_reply(RecordDict({"error": ConfigRecord({"code": "late", "sentence": "a" * 9000})}))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50 + "]" * 50, '{"a":' * 5000 + "1" + "}" * 5000, '"\\ud800"', '{"\\udfff": 1}', '{"a": 1, "a": 2}', "1e999",
        "9" * 25, "9" * 5000, "-9223372036854775809", "NaN", "[1, -Infinity]", "", "{", "\ufeff1", "[1,]", "'a'",
    ],
)  # fmt: skip
def test_json_from_outside(text: str) -> None:
    with pytest.raises(ValueError):
        strict_json(text)


def test_json_within_its_limits() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(strict_json(deep)) == deep
    assert strict_json("[NaN, 1, 2.5]", nan_is_none=True) == [None, 1, 2.5]
    with pytest.raises(ValueError, match="too long"):
        strict_json("[1, 2]", most=5)


def about(**changes: Any) -> dict[str, Any]:
    return {
        "site": "north", "class_names": ["a", "b"], "train": 30, "counts": [10, 20], "geometry": [1, 28, 28],
        "modality": "xray", "kind": "multiclass", "fingerprint": "f",
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "ä" * 60},  # its folder would have a name that no disk takes
        {"geometry": [1, 2**40, 2**40]},
        {"geometry": [0, 28, 28]},
        {"class_names": ["a", "a"]},
        {"class_names": [f"{k}" for k in range(1001)], "counts": [0] * 1001, "train": 0},
        {"class_names": ["a" * 501, "b"]},
    ],
)
def test_descriptions_have_limits(changes: dict[str, Any]) -> None:
    assert replies.read_description(about())["site"] == "north"
    with pytest.raises(FedistillError, check=lambda e: e.code == "bad-reply"):
        replies.read_description(about(**changes))


def test_progress_has_limits() -> None:
    told = {
        "phase": "distill", "step": 1, "total": 2, "iterations": 1, "skipped": 0, "notes": ["n" * 9000] * 99, "eta": 1e200,
        "seconds": {"experts": -1e300, "distill": 2.0}, "curve": [[k, 0.5] for k in range(20_000)],
    }  # fmt: skip
    found = replies.read_progress(told)
    assert (found["eta"], found["seconds"]) == (None, {"experts": 0.0, "distill": 2.0})
    assert (len(found["notes"]), len(found["notes"][0]), len(found["curve"])) == (50, 500, 10_000)


# ---- a set that lies


def spoiled(**changes: Any) -> SyntheticSet:
    return dataclasses.replace(set_of(private()), **changes)


def judged(made: SyntheticSet) -> None:
    """What the server does with a set, after it is decoded."""
    check_set(made, site="site-0", task=TASK, ipc=6, counts=[60, 60])
    check_promise(made, PRIVATE, records=100)


def promising(**changes: Any) -> SyntheticSet:
    return set_of(private(**changes))


GIGANTIC = [{"name": "m", "sample_rate": 1.0, "noise_multiplier": 1e308, "steps": 10**8, "clip_norm": 1.0}]
LIES = {
    "another site's name": (lambda: spoiled(sites=("site-1",)), "refused-set"),
    "speaks for another site": (lambda: spoiled(manifest=set_of(private()).manifest | {"site-1": {}}), "refused-set"),
    "says nothing of itself": (lambda: spoiled(manifest={}), "refused-set"),
    "another kind": (lambda: spoiled(kind="ordinal"), "refused-set"),
    "other classes": (lambda: spoiled(class_names=("class 1", "class 0")), "refused-set"),
    "another modality": (lambda: spoiled(modality="ct"), "refused-set"),
    "no guarantee": (lambda: set_of({"epsilon": None, "statement": "none"}), "refused-set"),
    "too much epsilon": (lambda: promising(epsilon=4.01), "refused-set"),
    "too much delta": (lambda: promising(delta=1e-3), "refused-set"),
    "delta of one": (lambda: promising(delta=1.0), "bad-privacy"),
    "negative epsilon": (lambda: promising(epsilon=-1.0), "bad-privacy"),
    "epsilon as text": (lambda: promising(epsilon="1"), "bad-privacy"),
    "epsilon of nothing": (lambda: promising(mechanisms=[]), "bad-privacy"),
    "too many steps": (lambda: promising(mechanisms=GIGANTIC), "bad-privacy"),
    "a failed condition": (
        lambda: promising(conditions=[{"number": 1, "name": "x", "status": "failed", "how": ""}]),
        "condition-failed",
    ),
    "a seed": (lambda: set_of(private(), about={"noise_seed": 3}), "seed-in-manifest"),
    "real images": (lambda: set_of(private(), about={"method": "random"}), "real-images"),
    "began as real images": (lambda: set_of(private(), about={"init": "real"}), "condition-failed"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_set_that_lies_is_refused_with_a_code(name: str) -> None:
    judged(set_of(private()))
    make, code = LIES[name]
    with pytest.raises(FedistillError) as caught:
        judged(make())
    assert caught.value.code == code
    assert caught.value.sentence.endswith(".")


def test_a_manifest_may_be_as_deep_as_the_reader_bears() -> None:
    """What was read must be walked, written and merged too, from wherever that is called."""
    made = spoiled(manifest={"site-0": {"deep": json.loads("[" * 30 + "]" * 30)}})
    read_claim(quantise(made))
    arrays, text = encode(spoiled())
    for depth in (MAX_DEPTH, 300, 900):
        with pytest.raises(FedistillError, check=lambda e: e.code == "bad-set"):
            decode(arrays, text.replace('"manifest": {', '"manifest": {"deep": ' + "[" * depth + "]" * depth + ", "))


def test_a_set_has_one_spelling() -> None:
    made = set_of(private(), soft=True)
    arrays, text = encode(made)
    assert set_input(decode(arrays, text)) == set_input(made)
    loose = {
        "range": arrays["range"] * 0 + np.float32([1, 1.0001]),  # so flat an image would be written as one value
        "pixels": np.clip(arrays["pixels"], 1, 254),
        "labels": arrays["labels"] * 0 + np.float16([1, 0]),  # one-hot: classes would be written
    }
    for name, array in loose.items():
        with pytest.raises(FedistillError, check=lambda e: e.code == "bad-set"):
            decode(arrays | {name: array}, text)
    for other in (
        text.replace(", ", ","),
        json.dumps(dict(reversed(json.loads(text).items()))),
        text.replace("0.25", "2.5e-1"),
    ):
        with pytest.raises(FedistillError, match="not written as fedistill writes it"):
            decode(arrays, other)


# ---- files of somebody else


def test_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_plain(tmp_path / "a", 3) == b"abc"
    os.mkfifo(tmp_path / "pipe")
    for path, most in ((tmp_path / "a", 2), (tmp_path / "pipe", 9), (tmp_path, 9), (Path("/dev/zero"), 9)):
        with pytest.raises(OSError):
            read_plain(path, most)


@pytest.mark.parametrize("name", ["set.safetensors", "manifest.json"])
def test_a_folder_may_hold_pipes_devices_and_holes(name: str, tmp_path: Path) -> None:
    for k, change in enumerate(
        (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: os.truncate(_new(path), 2**40), Path.mkdir)
    ):
        folder = tmp_path / str(k)
        save_set(set_of(private()), folder)
        (folder / name).unlink()
        change(folder / name)

        def read(folder: Path = folder) -> None:
            with pytest.raises(FedistillError, check=lambda e: e.code == "bad-set"):
                load_set(folder)

        assert peak_of(read) < 2**20


def _new(path: Path) -> Path:
    path.touch()
    return path


def test_checksums_of_names_that_no_disk_takes(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {'x' * 5000}\n{'0' * 64}  ..\n")
    assert len(broken_files(tmp_path)) == 2


@pytest.mark.parametrize("pack", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_kit_that_chooses_its_memory_is_none(pack: int, tmp_path: Path) -> None:
    good, _ = make_kit(begin_server(tmp_path / "server", "fed.example.org", 8123), "north")
    assert read_kit(good).name == "north"
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(tmp_path / "kit.zip", "w", pack) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))
    with pytest.raises(FedistillError, check=lambda e: e.code == "bad-kit"):
        read_kit(tmp_path / "kit.zip")


def test_mechanisms_without_end_are_not_asked_about() -> None:
    many = tuple(
        Mechanism(name="m", sample_rate=0.1, noise_multiplier=1 + k / 1e3, steps=1) for k in range(MOST_DIFFERENT + 1)
    )
    site = dataclasses.replace(read_claim(set_of(private())).sites[0], mechanisms=many)
    assert "too many to check" in check_accounts(site)[0][0]


@pytest.mark.parametrize("key", ["width", "ipc", "sketch_networks", "expert_batch", "image_size", "seed"])
def test_a_job_cannot_ask_for_numbers_without_end(key: str) -> None:
    for value in (10**12 if key != "seed" else 10**30, "9" * 1000):
        with pytest.raises(FedistillError, check=lambda e: e.code == "bad-value"):
            make_config({key: value})


# ---- what must not creep in

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            if module.split(".")[0] in FORBIDDEN:
                yield node.lineno, module
            if module.split(".")[0] == "joblib" and module not in ("joblib", "joblib.Parallel", "joblib.delayed"):
                yield node.lineno, module
        if not isinstance(node, ast.Call):
            continue
        called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in CALLS or words.get("allow_pickle", "False") != "False":
            yield node.lineno, called
        last = called.rpartition(".")[2]
        if called.startswith(("joblib.", "yaml.", "pickle.")) and last in (
            "load",
            "dump",
            "loads",
            "unsafe_load",
            "full_load",
        ):
            yield node.lineno, called
        if called in ("np.load", "numpy.load") and words.get("allow_pickle") != "False":
            yield node.lineno, called
        if called == "torch.load" and words.get("weights_only") != "True":
            yield node.lineno, called
        if last == "numpy" and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "array":
            yield node.lineno, "Flower's Array.numpy(), which allocates what a header claims"


SOURCES = sorted(path for folder in ("fedistill", "server", "client") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_executes(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "eval('1')", "exec(x)", "np.load(p)",
        "np.load(p, allow_pickle=True)", "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(x)",
        "import shelve", "joblib.load(p)", "from joblib import load", "array.numpy()", "__import__('os')",
    ],
)  # fmt: skip
def test_the_watch_is_awake(text: str) -> None:
    assert list(dangers(ast.parse(text)))
