"""A synthetic set as plain arrays and one JSON text: what travels between a site and the server, and lies on disk.

    pixels  (m, C, H, W) uint8      x̂ = low + (high - low) q / 255, per image; volumes (m, C, D, H, W); with a scale the small
                                    images that `models.enlarge` makes those of the set of
    range   (m, 2)       float32    low and high of each image
    labels  (m,)         uint8      class index where every label is one-hot and K <= 256, else
            (m, K)       float16    the distributions; for multilabel always this, a probability per finding
    site    (m,)         uint16     position in `sites`

Each image keeps its extremes exactly (q = 0 and q = 255 are attained), so a decoded set encodes to the same numbers
again: a site evaluates and releases `quantise(set)`, and every later copy is bit-equal to it. Nothing here can
execute: the arrays are numbers and the text is JSON. What comes from outside is read by `read_arrays`, `strict_json` and
`decode`, which take no memory for what a header only claims; `decode` takes nothing but what `encode` writes, to the bit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from fedistill.errors import FedistillError
from fedistill.models.enlarge import enlarge
from fedistill.models.loss import KINDS
from fedistill.synthetic.set import SyntheticSet

FORMAT = "fedistill-set/2"
SCALED = "fedistill-set/3"  # with `scale`, above 1
MAX_IMAGES = 1_000_000
MAX_VALUES = 2**28  # decoded pixels of one set: 1 GiB of float32
MAX_LABELS = 2**26  # probabilities of one set: 256 MiB of float32
MAX_TEXT = 2**22
MAX_SCALE = 8
MAX_DEPTH = 40  # lists and records in each other
MAX_ARRAYS = 1000  # of one message
MAX_BYTES = 2**31  # of the arrays of one message
DTYPES = ("|u1", "<u2", "<f2", "<f4")  # of arrays that travel
FLAT = 2.0**-12  # a range below this share of the largest value is rounding: the image is stored as one value

Arrays = dict[str, NDArray[Any]]

# The header that `numpy.save` writes of a plain array in C order: no objects, no records, no other spelling of the same.
_SIDE = rb"(?:0|[1-9][0-9]{0,9})"
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)\{'descr': '(?P<descr>[|<][a-zA-Z][0-9]{1,6})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>|%b,|%b(?:, %b){1,7})\), \} *\n" % (_SIDE, _SIDE, _SIDE),
    re.DOTALL,
)

_META: dict[str, type | tuple[type, ...]] = {
    "format": str,
    "sites": list,
    "class_names": list,
    "mean": float,
    "std": float,
    "modality": str,
    "kind": str,
    "step_size": list,
    "manifest": dict,
}


def encode(synthetic: SyntheticSet) -> tuple[Arrays, str]:
    """The arrays and the JSON text of a set.

    Raises `FedistillError` ("bad-set") on pixels or labels that are not finite, and on a manifest that is not JSON.
    """
    images = synthetic.stored.detach().cpu().numpy().astype(np.float32)
    labels = synthetic.labels.detach().cpu().numpy().astype(np.float32)
    if len(images) == 0 or not (np.isfinite(images).all() and np.isfinite(labels).all()):
        _refuse("it has no images, or values that are not finite")
    low, high = _extremes(images)
    span = np.where(high > low, high.astype(np.float64) - low, 1.0)
    shape = (-1, *[1] * (images.ndim - 1))
    scaled = (images - low.astype(np.float64).reshape(shape)) / span.reshape(shape)
    pixels = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    pixels[high <= low] = 0  # what is left of a flat image is rounding
    arrays: Arrays = {
        "pixels": pixels,
        "range": np.stack([low, high], 1),
        "labels": _encode_labels(labels, synthetic.kind),
        "site": synthetic.site.cpu().numpy().astype(np.uint16),
    }
    meta = {
        "format": FORMAT if synthetic.scale == 1 else SCALED,
        "sites": list(synthetic.sites),
        "class_names": list(synthetic.class_names),
        "mean": float(synthetic.mean),
        "std": float(synthetic.std),
        "modality": synthetic.modality,
        "kind": synthetic.kind,
        "step_size": [float(s) for s in synthetic.step_size],
        "manifest": synthetic.manifest,
    }
    if synthetic.scale > 1:
        meta["scale"] = synthetic.scale
    try:
        return arrays, json.dumps(meta, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        _refuse("its manifest is not plain JSON")


def decode(
    arrays: Mapping[str, NDArray[Any]],
    text: str,
    *,
    max_images: int = MAX_IMAGES,
    geometry: tuple[int, ...] | None = None,
) -> SyntheticSet:
    """The set that `encode` packed; everything is checked before memory is taken for it.

    geometry: (channels, height, width), or (channels, depth, height, width), that the images must have; None: any of at
        most `MAX_VALUES` values in all.
    Raises `FedistillError` ("bad-set") on input that `encode` cannot have written.
    """
    meta = _meta(text)
    classes, sites = len(meta["class_names"]), len(meta["sites"])
    if set(arrays) != {"pixels", "range", "labels", "site"}:
        _refuse("its arrays are not pixels, range, labels and site")
    pixels, span, labels, site = (np.asarray(arrays[k]) for k in ("pixels", "range", "labels", "site"))
    m, scale = len(pixels) if pixels.ndim in (4, 5) else 0, meta.get("scale", 1)
    shape = (*pixels.shape[1:2], *(side * scale for side in pixels.shape[2:]))
    if pixels.dtype != np.uint8 or not 0 < m <= max_images or 0 in pixels.shape or m * math.prod(shape) > MAX_VALUES:
        _refuse(f"its pixels are not 1 to {max_images} images of 8 bits")
    if geometry is not None and shape != tuple(geometry):
        _refuse(f"its images are {'x'.join(map(str, shape))}, not {'x'.join(map(str, geometry))}")
    if m * classes > MAX_LABELS:
        _refuse(f"it has {m} images of {classes} classes, and more than {MAX_LABELS} probabilities are too many")
    if span.dtype != np.float32 or span.shape != (m, 2) or not np.isfinite(span).all():
        _refuse("the ranges of its pixels are not two finite numbers per image")
    if (span[:, 0] > span[:, 1]).any():
        _refuse("an image's lowest value is above its highest")
    if not _is_tight(pixels, span):
        _refuse("an image does not use the range that it gives")
    if site.dtype != np.uint16 or site.shape != (m,) or int(site.max()) >= sites:
        _refuse("an image belongs to a site that is not listed")
    decoded = _decode_labels(labels, m, classes, meta["kind"])
    step_size = tuple(float(s) for s in meta["step_size"])
    return SyntheticSet(
        images=enlarge(torch.from_numpy(_decode_pixels(pixels, span)), scale),
        labels=torch.from_numpy(decoded),
        site=torch.from_numpy(site.astype(np.int64)),
        sites=tuple(meta["sites"]),
        class_names=tuple(meta["class_names"]),
        mean=float(meta["mean"]),
        std=float(meta["std"]),
        modality=meta["modality"],
        step_size=step_size,
        manifest=meta["manifest"],
        kind=meta["kind"],
        scale=scale,
    )


def quantise(synthetic: SyntheticSet) -> SyntheticSet:
    """The set as its receiver will see it: applying this twice changes nothing more."""
    arrays, text = encode(synthetic)
    return decode(arrays, text)


def size(arrays: Mapping[str, NDArray[Any]], text: str) -> int:
    """Bytes that travel."""
    return sum(a.nbytes for a in arrays.values()) + len(text.encode())


def strict_json(text: str, *, most: int = MAX_TEXT, nan_is_none: bool = False) -> Any:
    """JSON from outside: finite floats, integers of 64 bits, text that UTF-8 can hold, no key twice, `MAX_DEPTH` levels.

    most: characters. nan_is_none: whether NaN and infinity are read as None. Raises `ValueError` on anything else.
    """
    if len(text) > most:
        raise ValueError("too long")
    constant = (lambda _: None) if nan_is_none else _not_json
    try:
        value = json.loads(
            text, parse_constant=constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_unrepeated
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def read_arrays(raw: Mapping[str, bytes], *, most_bytes: int = MAX_BYTES) -> Arrays:
    """The arrays of a message, each in the bytes of a `.npy` file; read-only, and not copied.

    Raises `FedistillError` ("bad-array") on more than `MAX_ARRAYS` or `most_bytes`, and on what `read_npy` refuses.
    """
    if len(raw) > MAX_ARRAYS or sum(map(len, raw.values())) > most_bytes:
        _bad_array(f"there are {len(raw)} of {sum(map(len, raw.values()))} bytes, and {most_bytes} bytes are the most")
    return {name: read_npy(data) for name, data in raw.items()}


def read_npy(data: bytes, dtypes: Collection[str] = DTYPES) -> NDArray[Any]:
    """The array in the bytes of a `.npy` file, as `numpy.save` writes one of these `dtypes` in C order; read-only, not copied.

    The header is compared with the bytes that are there, so that a claimed shape takes no memory, and nothing is unpickled.
    Raises `FedistillError` ("bad-array") on anything else.
    """
    found = _NPY.match(data[:512])
    if found is None or found.end() != 10 + int.from_bytes(found["length"], "little") or found.end() % 64:
        _bad_array("its header is none of a plain array")
    descr = found["descr"].decode()
    if descr not in dtypes:
        _bad_array(f"its numbers are {descr}, not {' or '.join(sorted(dtypes))}")
    shape, dtype = tuple(int(side) for side in found["shape"].split(b",") if side), np.dtype(descr)
    if math.prod(shape) * dtype.itemsize != len(data) - found.end():
        _bad_array(f"its header promises {shape}, and {len(data) - found.end()} bytes follow")
    if math.prod(side or 1 for side in shape) > MAX_BYTES:  # an empty array can have sides that numpy cannot multiply
        _bad_array(f"its shape {shape} is none")
    return np.frombuffer(data, np.uint8, offset=found.end()).view(dtype).reshape(shape)


def _extremes(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest value of each image, without signed zeros; equal where the image is flat but for rounding."""
    axes = tuple(range(1, images.ndim))
    low = images.min(axis=axes) + np.float32(0)
    high = images.max(axis=axes) + np.float32(0)
    magnitude = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    flat = high.astype(np.float64) - low <= np.maximum(FLAT * magnitude, np.finfo(np.float32).tiny)
    return low, np.where(flat, low, high)


def _decode_pixels(pixels: NDArray[np.uint8], span: NDArray[np.float32]) -> NDArray[np.float32]:
    images = np.empty(pixels.shape, np.float32)
    levels = np.arange(256) / 255
    for image, q, (low, high) in zip(images, pixels, span.astype(np.float64), strict=True):
        # 256 values per image: the ends are exact, and memory for float64 is never taken
        table = np.clip(low * (1 - levels) + high * levels, low, high).astype(np.float32) + np.float32(0)
        image[...] = table[q]
    return images


def _is_tight(pixels: NDArray[np.uint8], span: NDArray[np.float32]) -> bool:
    """Whether every image attains 0 and 255, or is flat, and no number is a zero with a sign: as `encode` writes them."""
    low, high = span.astype(np.float64).T
    flat = high - low <= np.maximum(FLAT * np.abs(span).max(1).astype(np.float64), np.finfo(np.float32).tiny)
    rows = pixels.reshape(len(pixels), -1)
    least, most = rows.min(1), rows.max(1)
    right = np.where(flat, (low == high) & (most == 0), (least == 0) & (most == 255))
    return bool(right.all()) and not (np.signbit(span) & (span == 0)).any()


def _encode_labels(labels: NDArray[np.float32], kind: str) -> NDArray[Any]:
    half = labels.astype(np.float16) + np.float16(0)
    if kind == "multilabel":
        return half
    one_hot = (half.max(1) == 1) & (np.count_nonzero(half, axis=1) == 1)
    if labels.shape[1] <= 256 and one_hot.all():
        return half.argmax(1).astype(np.uint8)
    return half


def _decode_labels(labels: NDArray[Any], m: int, classes: int, kind: str) -> NDArray[np.float32]:
    hard_ones = kind != "multilabel" and labels.dtype == np.uint8 and labels.shape == (m,) and classes <= 256
    if hard_ones and int(labels.max()) < classes:
        hard = np.zeros((m, classes), np.float32)
        hard[np.arange(m), labels] = 1
        return hard
    if labels.dtype != np.float16 or labels.shape != (m, classes):
        _refuse("its labels are neither class indices nor one distribution per image")
    soft = labels.astype(np.float32)
    if not np.isfinite(soft).all() or (soft < 0).any() or (soft > 1).any():
        _refuse("a label has a probability that is not between 0 and 1")
    if kind != "multilabel" and (np.abs(soft.sum(1) - 1) > 0.01).any():
        _refuse("a label is not a distribution over the classes")
    if np.signbit(labels).any() or (kind != "multilabel" and _encode_labels(labels, kind).ndim == 1):
        _refuse("a label is not written as fedistill writes it")
    return soft


def _meta(text: str) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        _refuse("its description is missing or too long")
    try:
        meta = strict_json(text)
    except ValueError:
        _refuse("its description is not JSON")
    if not isinstance(meta, dict) or meta.get("format") not in (FORMAT, SCALED):
        _refuse(
            f"its format is neither {FORMAT} nor {SCALED}: the site and the server must run the same version of fedistill"
        )
    scaled = meta["format"] == SCALED
    wanted = _META | ({"scale": int} if scaled else {})
    if set(meta) != set(wanted) or not all(isinstance(meta[k], kind) for k, kind in wanted.items()):
        _refuse("its description lacks a field, or has one of another type")
    if scaled and (type(meta["scale"]) is not int or not 1 < meta["scale"] <= MAX_SCALE):
        _refuse(f"its scale is not 2 to {MAX_SCALE}")
    if meta["kind"] not in KINDS:
        _refuse(f"its kind of task is none of {', '.join(KINDS)}")
    for name in ("sites", "class_names"):
        if not meta[name] or not all(isinstance(x, str) for x in meta[name]) or len(set(meta[name])) < len(meta[name]):
            _refuse(f"its {name.replace('_', ' ')} are not different words")
    numbers = [meta["mean"], meta["std"], *meta["step_size"]]
    if not all(isinstance(x, float) and abs(x) < 1e30 for x in numbers):
        _refuse("its mean, std or step sizes are not numbers")
    if meta["std"] <= 0 or len(meta["step_size"]) != len(meta["sites"]):
        _refuse("its std is not positive, or there is not one step size per site")
    if json.dumps(meta, sort_keys=True) != text:  # one set has one text, which is what its hash is of
        _refuse("its description is not written as fedistill writes it")
    return meta


def _parts(value: Any) -> Iterable[Any]:
    """What a JSON value holds. Raises `ValueError` on text with a lone surrogate, which no file could hold."""
    if isinstance(value, str):
        value.encode()
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one record")
    return found


def _whole(literal: str) -> int:
    number = int(literal[:24])
    if abs(number) >= 2**63:
        raise ValueError(literal[:24])
    return number


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(literal)
    return number


def _not_json(literal: str) -> NoReturn:
    raise ValueError(literal)


def _refuse(why: str) -> NoReturn:
    raise FedistillError("bad-set", f"The synthetic set cannot be read: {why}.")


def _bad_array(why: str) -> NoReturn:
    raise FedistillError("bad-array", f"An array of the message cannot be read: {why}.")
