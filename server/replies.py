"""What comes back from a site, read without trust: every field has the right type and size, or the site has failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import RecordDict

from fedistill.errors import FedistillError
from fedistill.models.loss import KINDS
from fedistill.site.average import Local
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import decode, size

LONGEST = 500  # characters of a sentence from a site


def read_reply(content: RecordDict) -> Any:
    """The JSON value of a reply.

    Raises `FedistillError`: the site's own code and sentence if it sent those, "bad-reply" if it sent nonsense.
    """
    records = content.config_records
    if "error" in records:
        code, sentence = (str(records["error"].get(k, "?"))[:LONGEST] for k in ("code", "sentence"))
        raise FedistillError(code, sentence)
    try:
        return json.loads(str(records["reply"]["json"]), parse_constant=lambda _: None)
    except (KeyError, ValueError, RecursionError):
        _nonsense("has no readable answer")


def read_set(content: RecordDict, *, max_images: int, geometry: tuple[int, ...]) -> tuple[SyntheticSet, int]:
    """The set in a reply and the bytes that it took. Raises `FedistillError` on anything that is not a set."""
    try:
        record, text = content.array_records["set"], str(content.config_records["text"]["set"])
        arrays = {str(k): array.numpy() for k, array in record.items()}
    except Exception:  # numpy reads what the site wrote: any exception is the site's
        _nonsense("says that it is ready but holds no synthetic set")
    return decode(arrays, text, max_images=max_images, geometry=geometry), size(arrays, text)


def read_local(content: RecordDict, sizes: Mapping[str, int]) -> Local:
    """A site's answer to a round of averaging. Raises `FedistillError` where it has not each network's number of parameters."""
    records = read_reply(content)
    try:
        arrays = {str(k): array.numpy() for k, array in content.array_records["models"].items()}
    except Exception:  # numpy reads what the site wrote: any exception is the site's
        _nonsense("holds no parameters")
    if not _is_count(records) or records == 0:
        _nonsense("has no number of records")
    if set(arrays) != set(sizes) or any(a.dtype != np.float32 or a.shape != (sizes[n],) for n, a in arrays.items()):
        _nonsense("has not the parameters of the models that were sent")
    return Local({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, records)


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
    pairs = [p for p in curve if isinstance(p, list) and len(p) == 2 and _is_count(p[0])]
    return {
        **counts,
        "phase": value["phase"],
        "loss": _number(value.get("loss")),
        "eta": _number(value.get("eta")),
        "seconds": {k: _number(seconds.get(k)) or 0.0 for k in ("experts", "distill")},
        "notes": [str(n)[:LONGEST] for n in notes[:50]],
        "curve": [[step, loss] for step, raw in pairs if (loss := _number(raw)) is not None],
    }


def read_confusions(value: Any, models: set[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """Counts of each model, nested lists of `shape`. Raises `FedistillError`."""
    if not isinstance(value, dict) or set(value) != models:
        _nonsense("has not the models that were sent")
    if not all(_is_table(table, shape) for table in value.values()):
        _nonsense("holds no table of counts")
    return value


def read_description(value: Any, *, private: bool = False) -> dict[str, Any]:
    """What a site says that it holds; `private`: without the number of images per class. Raises `FedistillError`."""
    if not isinstance(value, dict):
        _nonsense("is no description")
    names, counts, geometry = (value.get(k) for k in ("class_names", "counts", "geometry"))
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        _nonsense("has no class names")
    if private and counts is not None:
        _nonsense("tells private counts")
    if not private and not (isinstance(counts, list) and len(counts) == len(names) and all(map(_is_count, counts))):
        _nonsense("has not one count per class")
    if not isinstance(geometry, list) or len(geometry) not in (3, 4) or not all(_is_count(g) for g in geometry):
        _nonsense("has no geometry")
    train, kind = value.get("train"), value.get("kind")
    if kind not in KINDS or not _is_count(train):
        _nonsense("has no kind of task or no number of images")
    if counts is not None and (train < max(counts) or (kind != "multilabel" and train != sum(counts))):
        _nonsense("has counts that do not fit the number of its images")
    words = {k: value.get(k) for k in ("site", "modality", "fingerprint")}
    if not all(isinstance(w, str) and 0 < len(w) <= LONGEST for w in words.values()):
        _nonsense("has no name, no modality or no fingerprint")
    return {**words, "kind": kind, "class_names": names, "train": train, "counts": counts, "geometry": geometry}


def _is_table(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether `value` is nested lists of counts."""
    if not shape:
        return _is_count(value)
    return isinstance(value, list) and len(value) == shape[0] and all(_is_table(part, shape[1:]) for part in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and abs(value) < 1e300 else None


def _nonsense(why: str) -> NoReturn:
    raise FedistillError("bad-reply", f"Its reply {why}: do site and server run the same version of fedistill?")
