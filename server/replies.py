"""What comes back from a site, read without trust: every field has the right type and size, or the site has failed.

Sizes are compared with what was asked for before memory is taken. Nothing but a `FedistillError` comes out of these functions.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar
from urllib.parse import quote

import numpy as np
import torch
from flwr.app import RecordDict

from fedistill.errors import FedistillError
from fedistill.models.loss import KINDS
from fedistill.release.text import plain
from fedistill.site.average import Local
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import MAX_TEXT, Arrays, decode, read_arrays, size, strict_json

LONGEST = 500  # characters of a sentence from a site
LONGEST_NAME = 200  # characters of the name of a site's folder
MOST_CLASSES = 1000
MOST_VALUES = 2**24  # of an image: networks are built for it
MOST_POINTS = 10_000  # of a curve, in one reply
MOST_SECONDS = 1e9
MOST_COUNTED = 2**40  # answers in one cell: sums over sites and cells stay exact
PER_IMAGE, PER_ARRAY = 16, 1024  # bytes besides pixels and labels: range and site; a header

_CODE = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def _guarded(read: Callable[P, R]) -> Callable[P, R]:
    """`read`, whose every other error is the site's "bad-reply" too: a reply that breaks its reader must not end the run."""

    @functools.wraps(read)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return read(*args, **kwargs)
        except FedistillError:
            raise
        except Exception:
            log.exception("A reply broke %s, which should have refused it:", read.__name__)
            _nonsense("cannot be read")

    return guarded


@_guarded
def read_reply(content: RecordDict, *, longest: int = MAX_TEXT) -> Any:
    """The JSON value of a reply of at most `longest` characters; what is not finite is None.

    Raises `FedistillError`: the site's own code and sentence if it sent those, "bad-reply" if it sent nonsense.
    """
    records = content.config_records
    if "error" in records:
        code, sentence = (records["error"].get(k) for k in ("code", "sentence"))
        if not isinstance(code, str) or not _CODE.fullmatch(code) or not isinstance(sentence, str):
            _nonsense("is an error without a code and a sentence")
        raise FedistillError(code, plain(sentence[:LONGEST]))
    text = records["reply"].get("json") if "reply" in records else None
    if not isinstance(text, str):
        _nonsense("has no readable answer")
    try:
        return strict_json(text, most=longest, nan_is_none=True)
    except ValueError:
        _nonsense("has no readable answer")


@_guarded
def read_set(
    content: RecordDict, *, max_images: int, geometry: tuple[int, ...], classes: int
) -> tuple[SyntheticSet, int]:
    """The set in a reply and the bytes that it took. Raises `FedistillError` on anything that is not a set."""
    records = content.config_records
    text = records["text"].get("set") if "text" in records else None
    if "set" not in content.array_records or not isinstance(text, str):
        _nonsense("says that it is ready but holds no synthetic set")
    most = max_images * (math.prod(geometry) + 2 * classes + PER_IMAGE) + 4 * PER_ARRAY
    arrays = _arrays(content, "set", most)
    return decode(arrays, text, max_images=max_images, geometry=geometry), size(arrays, text)


@_guarded
def read_local(content: RecordDict, sizes: Mapping[str, int]) -> Local:
    """A site's answer to a round of averaging. Raises `FedistillError` where it has not each network's number of parameters."""
    records = read_reply(content)
    if "models" not in content.array_records:
        _nonsense("holds no parameters")
    arrays = _arrays(content, "models", sum(4 * n + PER_ARRAY for n in sizes.values()))
    if not _is_count(records) or records == 0:
        _nonsense("has no number of records")
    if set(arrays) != set(sizes) or any(a.dtype != np.float32 or a.shape != (sizes[n],) for n, a in arrays.items()):
        _nonsense("has not the parameters of the models that were sent")
    return Local({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, records)


@_guarded
def read_progress(value: Any) -> dict[str, Any]:
    """What a site says about its work, with every field of the right type.

    Returns phase, step, total, loss, eta, seconds, iterations, skipped, notes and curve. Raises `FedistillError`.
    """
    if not isinstance(value, dict) or value.get("phase") not in ("experts", "distill", "waiting", "ready"):
        _nonsense("names no phase")
    counts = {k: value.get(k) for k in ("step", "total", "iterations", "skipped")}
    seconds, notes, curve = (value.get(k) for k in ("seconds", "notes", "curve"))
    if not all(_is_count(v) for v in counts.values()):
        _nonsense("has a count that is none")
    if not isinstance(seconds, dict) or not isinstance(notes, list) or not isinstance(curve, list):
        _nonsense("lacks its figures")
    pairs = [p for p in curve[:MOST_POINTS] if isinstance(p, list) and len(p) == 2 and _is_count(p[0])]
    return {
        **counts,
        "phase": value["phase"],
        "loss": _number(value.get("loss")),
        "eta": _seconds(value.get("eta")),
        "seconds": {k: _seconds(seconds.get(k)) or 0.0 for k in ("experts", "distill")},
        "notes": [plain(str(n)[:LONGEST]) for n in notes[:50]],
        "curve": [[step, loss] for step, raw in pairs if (loss := _number(raw)) is not None],
    }


@_guarded
def read_confusions(value: Any, models: set[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """Counts of each model, nested lists of `shape`. Raises `FedistillError`."""
    if not isinstance(value, dict) or set(value) != models:
        _nonsense("has not the models that were sent")
    if not all(_is_table(table, shape) for table in value.values()):
        _nonsense("holds no table of counts")
    return value


@_guarded
def read_description(value: Any, *, private: bool = False) -> dict[str, Any]:
    """What a site says that it holds; `private`: without the number of images per class. Raises `FedistillError`."""
    if not isinstance(value, dict):
        _nonsense("is no description")
    names, counts, geometry = (value.get(k) for k in ("class_names", "counts", "geometry"))
    if not isinstance(names, list) or not 0 < len(names) <= MOST_CLASSES or not all(map(_is_word, names)):
        _nonsense(f"has no class names, or more than {MOST_CLASSES}")
    if len(set(names)) < len(names):
        _nonsense("names a class twice")
    if private and counts is not None:
        _nonsense("tells private counts")
    if not private and not (isinstance(counts, list) and len(counts) == len(names) and all(map(_is_count, counts))):
        _nonsense("has not one count per class")
    if not isinstance(geometry, list) or len(geometry) not in (3, 4) or not all(_is_count(g) for g in geometry):
        _nonsense("has no geometry")
    if not 0 < math.prod(geometry) <= MOST_VALUES:
        _nonsense(f"has images of no pixels, or of more than {MOST_VALUES} values")
    train, kind = value.get("train"), value.get("kind")
    if kind not in KINDS or not _is_count(train):
        _nonsense("has no kind of task or no number of images")
    if counts is not None and (train < max(counts) or (kind != "multilabel" and train != sum(counts))):
        _nonsense("has counts that do not fit the number of its images")
    words = {k: value.get(k) for k in ("site", "modality", "fingerprint")}
    if not all(map(_is_word, words.values())):
        _nonsense("has no name, no modality or no fingerprint")
    if plain(str(words["site"])) != words["site"]:  # it is shown to operators
        _nonsense("has a name that is not one line of printable characters")
    if len(quote(str(words["site"]), safe="")) > LONGEST_NAME:
        _nonsense(f"has a name that makes a folder of more than {LONGEST_NAME} characters")
    return {**words, "kind": kind, "class_names": names, "train": train, "counts": counts, "geometry": geometry}


def _is_table(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether `value` is nested lists of counts."""
    if not shape:
        return _is_count(value) and value <= MOST_COUNTED
    return isinstance(value, list) and len(value) == shape[0] and all(_is_table(part, shape[1:]) for part in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _arrays(content: RecordDict, record: str, most: int) -> Arrays:
    raw = {str(name): array.data for name, array in content.array_records[record].items()}
    try:
        return read_arrays(raw, most_bytes=most)
    except FedistillError as error:
        raise FedistillError("bad-reply", error.sentence) from None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST


def _seconds(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= MOST_SECONDS else None


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and abs(value) < 1e300 else None


def _nonsense(why: str) -> NoReturn:
    raise FedistillError("bad-reply", f"Its reply {why}: do site and server run the same version of fedistill?")
