"""The wire format: small error, bit-equal copies, and no input that breaks the receiver."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill import wire
from fedistill.errors import FedistillError
from fedistill.models.enlarge import enlarge
from fedistill.models.loss import KINDS, answers_of, targets_of
from fedistill.synthetic.set import SyntheticSet, one_hot
from fedistill.wire import MAX_TEXT, Arrays, decode, encode, quantise, size


def make_set(
    m: int = 6,
    classes: int = 3,
    *,
    soft: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    kind: str = "multiclass",
    size: tuple[int, ...] = (5, 4),
    enlarged: int = 1,
) -> SyntheticSet:
    rng = torch.Generator().manual_seed(seed)
    labels = targets_of(torch.randint(classes, (m,), generator=rng), classes, kind)
    if kind == "multilabel":
        labels = torch.randint(2, (m, classes), generator=rng).float()
    if soft:
        labels = answers_of(kind, torch.randn(m, classes, generator=rng))
    return SyntheticSet(
        images=enlarge(torch.randn(m, 1, *size, generator=rng) * scale, enlarged),
        labels=labels,
        site=torch.arange(m) % 2,
        sites=("north", "south"),
        class_names=tuple(f"c{i}" for i in range(classes)),
        mean=0.5,
        std=0.25,
        modality="xray",
        step_size=(0.01, 1 / 3),
        manifest={"method": "datm", "list": [1, 2.5, None, {"ä": True}]},
        kind=kind,
        scale=enlarged,
    )


def assert_equal(a: SyntheticSet, b: SyntheticSet) -> None:
    for field in dataclasses.fields(SyntheticSet):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert x.numpy().tobytes() == y.numpy().tobytes(), field.name
        else:
            assert x == y, field.name


@pytest.mark.parametrize("soft", [False, True])
def test_types_and_metadata_survive(soft: bool) -> None:
    original = make_set(soft=soft)
    arrays, text = encode(original)
    assert {k: a.dtype.name for k, a in arrays.items()} == {
        "pixels": "uint8", "range": "float32", "labels": "float16" if soft else "uint8", "site": "uint16",
    }  # fmt: skip
    copy = decode(arrays, text)
    assert (copy.sites, copy.class_names, copy.manifest) == (original.sites, original.class_names, original.manifest)
    assert copy.step_size == original.step_size
    assert torch.equal(copy.site, original.site)
    assert torch.allclose(copy.labels, original.labels, atol=5e-4)
    assert size(arrays, text) < 6 * 20 + 6 * 8 + 6 * 6 + 6 * 2 + len(text) + 1


values = st.floats(-1e6, 1e6, width=32) | st.floats(-3, 3, width=32)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=4))
def test_error_is_below_one_level_and_copies_are_equal(rows: list[list[float]]) -> None:
    images = torch.tensor(rows).reshape(len(rows), 1, 2, 2)
    original = dataclasses.replace(make_set(len(rows)), images=images)
    once = quantise(original)
    assert_equal(quantise(once), once)
    flat = images.flatten(1)
    span = (flat.amax(1) - flat.amin(1)).double()
    span = span.clamp_min(flat.abs().amax(1).double() * 2**-4)  # flat images: rounding of the values themselves
    error = (once.images - images).double().abs().flatten(1).amax(1)
    assert (error <= span / 255 + 1e-37).all()  # below that float32 has no levels left


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
def test_copies_of_copies_are_equal(seed: int, soft: bool, scale: float) -> None:
    once = quantise(make_set(soft=soft, seed=seed, scale=scale))
    assert_equal(quantise(once), once)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(2, 5),
    st.booleans(),
    st.sampled_from(KINDS),
    st.sampled_from([(5, 4), (3, 5, 4)]),
)
def test_every_kind_and_volumes_survive(
    seed: int, m: int, classes: int, soft: bool, kind: str, size: tuple[int, ...]
) -> None:
    original = make_set(m, classes, soft=soft, seed=seed, kind=kind, size=size)
    arrays, text = encode(original)
    once = decode(arrays, text, geometry=(1, *size))
    assert (once.kind, once.geometry) == (kind, (1, *size))
    assert torch.allclose(once.labels, original.labels, atol=1e-3)
    assert torch.equal(once.hard_labels, original.hard_labels) or soft
    assert (once.images - original.images).abs().max() < (original.images.max() - original.images.min()) / 255
    assert_equal(quantise(once), once)
    if kind == "multilabel":
        assert arrays["labels"].dtype == np.float16
        assert soft or torch.equal(once.labels, original.labels)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([(5, 4), (3, 2, 4)]), st.sampled_from([1e-30, 1.0, 1e3])
)
def test_enlarged_sets_travel_as_small_as_they_are_kept(
    seed: int, enlarged: int, size: tuple[int, ...], scale: float
) -> None:
    original = make_set(seed=seed, size=size, scale=scale, enlarged=enlarged)
    arrays, text = encode(original)
    assert arrays["pixels"].shape == (6, 1, *size)
    once = decode(arrays, text, geometry=(1, *(side * enlarged for side in size)))
    assert torch.equal(enlarge(once.stored, enlarged), once.images)
    small = make_set(seed=seed, size=size, scale=scale)
    assert torch.equal(once.stored, quantise(small).images)
    assert_equal(quantise(once), once)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"scale": 1}, "its scale is not 2 to 8"), ({"scale": 9}, "its scale is not 2 to 8"), ({"scale": True}, "its scale is not"),
        ({"scale": 2.0}, "of another type"), ({"format": "fedistill-set/2"}, "lacks a field"),
        ({"scale": 4}, "its images are 1x20x16, not 1x10x8"),
    ],
)  # fmt: skip
def test_a_scale_that_fits_nothing_is_refused(changes: dict[str, Any], why: str) -> None:
    arrays, text = encode(make_set(enlarged=2))
    with pytest.raises(FedistillError, match=why):
        decode(arrays, json.dumps(json.loads(text) | changes, sort_keys=True), geometry=(1, 10, 8))


def test_a_small_file_takes_no_large_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_VALUES", 6 * 10 * 8)
    quantise(make_set(enlarged=2))
    monkeypatch.setattr(wire, "MAX_VALUES", 6 * 10 * 8 - 1)
    with pytest.raises(FedistillError, match="1 to"):
        quantise(make_set(enlarged=2))


def test_labels_that_do_not_fit_the_kind_are_refused() -> None:
    findings, classes = make_set(kind="multilabel"), make_set()
    many = dataclasses.replace(findings, labels=torch.ones(6, 3))
    assert torch.equal(quantise(many).labels, many.labels)
    with pytest.raises(FedistillError, match="not a distribution"):
        quantise(dataclasses.replace(many, kind="multiclass"))
    for bad in (1.01, -0.01):
        with pytest.raises(FedistillError, match="not between 0 and 1"):
            quantise(dataclasses.replace(findings, labels=findings.labels * 0 + bad))
    with pytest.raises(FedistillError, match="neither class indices"):
        decode(encode(classes)[0], encode(findings)[1])


def test_a_set_of_an_older_format_is_refused() -> None:
    arrays, text = encode(make_set())
    old = {k: v for k, v in json.loads(text).items() if k != "kind"} | {"format": "fedistill-set/1"}
    with pytest.raises(FedistillError, match="must run the same version of fedistill"):
        decode(arrays, json.dumps(old))


def test_sharp_distributions_become_hard_for_good() -> None:
    labels = torch.tensor([[1 - 1e-9, 1e-9, -0.0]] * 6)
    once = quantise(dataclasses.replace(make_set(), labels=labels))
    assert torch.equal(once.labels, one_hot([0] * 6, 3))
    assert_equal(quantise(once), once)


def test_not_finite_is_not_encoded() -> None:
    bad = make_set()
    bad.images[0, 0, 0, 0] = float("nan")
    with pytest.raises(FedistillError, match="finite"):
        encode(bad)
    with pytest.raises(FedistillError, match="manifest"):
        encode(dataclasses.replace(make_set(), manifest={"x": float("nan")}))


def test_limits() -> None:
    arrays, text = encode(make_set())
    with pytest.raises(FedistillError, match="1 to 5 images"):
        decode(arrays, text, max_images=5)
    with pytest.raises(FedistillError, match="1x5x4, not 1x28x28"):
        decode(arrays, text, geometry=(1, 28, 28))
    with pytest.raises(FedistillError, match="too long"):
        decode(arrays, text + " " * MAX_TEXT)


def _edit(**changes: Any) -> str:
    return json.dumps(json.loads(encode(make_set())[1]) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", "[" * 100_000, '{"format": "fedistill-set/2"}', "1" * 10_000,
        _edit(format="fedistill-set/3"), _edit(kind="other"), _edit(kind=None), _edit(kind="multilabel"), _edit(extra=1),
        _edit(mean="0"), _edit(mean=True), _edit(std=0), _edit(std=-1), _edit(step_size=[0.1]),
        _edit(step_size=[0.1, "a"]), _edit(sites=["a", "a"]), _edit(sites=["a"]), _edit(sites=[1, 2]), _edit(sites=[]),
        _edit(class_names=["a"]), _edit(manifest=[]), _edit(modality=None), _edit(mean=10**40),
        _edit(modality="\ud800"), _edit(manifest={"a": float("nan")}), encode(make_set())[1].replace("0.25", "1e999"),
    ],
)  # fmt: skip
def test_bad_descriptions(text: str) -> None:
    with pytest.raises(FedistillError) as caught:
        decode(encode(make_set())[0], text)
    assert caught.value.code == "bad-set"


def _bad_arrays() -> list[Arrays]:
    good = encode(make_set())[0]
    soft = encode(make_set(soft=True))[0]["labels"]
    changes: list[dict[str, Any]] = [
        {"pixels": good["pixels"].astype(np.float32)}, {"pixels": good["pixels"][:0]}, {"pixels": good["pixels"][0]},
        {"pixels": np.uint8(3)}, {"pixels": good["pixels"][:, :, :0]}, {"pixels": np.array(["a"], object)},
        {"pixels": np.broadcast_to(np.uint8(1), (6, 3, 30_000, 30_000))}, {"range": good["range"][:, ::-1].copy()},
        {"range": good["range"] * np.float32("nan")}, {"range": good["range"].astype(np.float64)},
        {"range": good["range"][:3]}, {"labels": good["labels"] + np.uint8(3)},
        {"labels": good["labels"].astype(np.int64)},
        {"labels": soft * np.float16(2)}, {"labels": soft * np.float16("nan")}, {"labels": soft - np.float16(1)},
        {"labels": soft[:, :2]}, {"site": good["site"] + np.uint16(1)}, {"site": good["site"].astype(np.int64)},
        {"site": good["site"][:2]}, {"more": good["site"]},
    ]  # fmt: skip
    bad = [good | change for change in changes]
    return [*bad, {k: v for k, v in good.items() if k != "site"}, {}]


@pytest.mark.parametrize("arrays", _bad_arrays())
def test_bad_arrays(arrays: Arrays) -> None:
    with pytest.raises(FedistillError) as caught:
        decode(arrays, encode(make_set())[1])
    assert caught.value.code == "bad-set"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_decode_or_are_refused(data: st.DataObject) -> None:
    """Whatever changes on the way: a set comes out, or a `FedistillError`, and never another exception."""
    soft, kind, enlarged = (data.draw(st.sampled_from(choices)) for choices in ((False, True), KINDS, (1, 2)))
    arrays, text = encode(make_set(soft=soft, kind=kind, enlarged=enlarged))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(text)))
        text = text[:start] + data.draw(st.text(max_size=3)) + text[start + data.draw(st.integers(0, 5)) :]
    else:
        name = data.draw(st.sampled_from(sorted(arrays)))
        raw = bytearray(arrays[name].tobytes())
        for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=8)):
            raw[at] = data.draw(st.integers(0, 255))
        dtype = data.draw(st.sampled_from([arrays[name].dtype, *map(np.dtype, ("u1", "<f2", "<u2", ">f4", "<i8"))]))
        usable = len(raw) - len(raw) % dtype.itemsize
        changed = np.frombuffer(bytes(raw[:usable]), dtype)
        arrays[name] = changed.reshape(arrays[name].shape) if changed.size == arrays[name].size else changed
    try:
        again = decode(arrays, text)
    except FedistillError:
        return
    assert torch.isfinite(again.images).all()
