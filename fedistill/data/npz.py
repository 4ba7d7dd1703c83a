"""Data sets in one `.npz` file, in the layout of MedMNIST.

    {train,val,test}_images   (n, H, W) or (n, H, W, 3), volumes (n, D, H, W) or (n, D, H, W, 3); uint8, or floats in 0..1
    {train,val,test}_labels   (n, 1) or (n,) integers from 0; (n, K) of 0 and 1 where an image may have several findings
    {train,val,test}_site     optional, (n, 1) or (n,) integers from 0
    {train,val,test}_patient  optional, one patient per image (numbers or texts, the same at all sites), kept together when
                              splits are cut; can be the unit of privacy
    {train,val,test}_group    optional instead, another group per image that is kept together when splits are cut
    class_names, site_names   optional, one text per class (or finding) or site
    modality                  optional, one text

Only train is required; val and test that are both empty count as left out. Nothing is unpickled.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedistill.data.assemble import SPLITS, Part, assemble
from fedistill.data.dataset import Dataset
from fedistill.data.public import known_modality
from fedistill.errors import FedistillError


def load_npz(
    path: Path,
    *,
    name: str = "",
    modality: str = "generic",
    class_names: tuple[str, ...] = (),
    kind: str = "multiclass",
) -> Dataset:
    """The data set in the file at `path`.

    `name`, `modality`, `class_names` and `kind` stand in for what the file does not say itself: labels of several columns
    are always "multilabel". Raises `FedistillError` when
    the file cannot be read or departs from the layout, with the array that is wrong.
    """
    file = _Archive(path)
    parts = {key: _part(file, key) for key in SPLITS if key == "train" or f"{key}_images" in file.names}
    _check_patients(file, parts)
    if len(parts) == len(SPLITS) and not any(len(parts[key].labels) for key in ("val", "test")):
        parts = {"train": parts["train"]}  # a released set: it has no images to test with
    shapes = {part.images.shape[1:] for part in parts.values()}
    if len(shapes) > 1:
        raise file.error(f"the splits hold images of different shapes ({', '.join(map(str, sorted(shapes)))})")
    names = file.texts("class_names") or class_names
    widths = {part.labels.shape[1:] for part in parts.values()}
    if len(widths) > 1:
        raise file.error("the labels of some splits have several columns and those of others not, or fewer")
    sites = file.texts("site_names")
    if widths != {()}:
        kind, names = "multilabel", _finding_names(file, parts["train"].labels.shape[1], names)
    else:
        names = _check_range(file, parts, "labels", names, "class_names", "class ")
    if any(f"{key}_site" in file.names for key in parts):
        sites = _check_range(file, parts, "site", sites, "site_names", "site-")
    else:
        sites = ("all",)
    said = file.texts("modality")
    return assemble(name or path.stem, known_modality(said[0]) if said else modality, names, sites, parts, kind)


class _Archive:
    """An open `.npz` whose every fault is reported as one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise FedistillError("bad-npz", f"Cannot read {path}: it is not a complete .npz file.") from None
        if not isinstance(self.file, np.lib.npyio.NpzFile):
            raise FedistillError("bad-npz", f"{path} holds a single array, not an .npz archive of named arrays.")
        self.names = frozenset(self.file.files)

    def error(self, what: str) -> FedistillError:
        return FedistillError("bad-npz", f"{self.path}: {what}.")

    def array(self, key: str) -> np.ndarray:
        if key not in self.names:
            held = ", ".join(sorted(self.names)) or "nothing"
            raise self.error(f"the array '{key}' is missing (the file holds {held})")
        try:
            return self.file[key]
        except ValueError:
            raise self.error(f"'{key}' holds Python objects, which are never unpickled: save a plain array") from None
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
            raise self.error(f"'{key}' is damaged: make or download the file again") from None

    def texts(self, key: str) -> tuple[str, ...]:
        """One text or a list of texts; empty when the file does not hold `key`."""
        if key not in self.names:
            return ()
        array = np.atleast_1d(self.array(key))
        if array.ndim != 1 or array.dtype.kind != "U":
            raise self.error(f"'{key}' must be a list of texts, not {_describe(array)}")
        texts = tuple(str(text) for text in array)
        if len(set(texts)) < len(texts):
            raise self.error(f"'{key}' names something twice")
        return texts

    def column(self, key: str, length: int) -> np.ndarray:
        """One value per image; `(n, 1)` becomes `(n,)`."""
        array = self.array(key)
        if array.ndim == 2 and array.shape[1] > 1:
            raise self.error(f"'{key}' has {array.shape[1]} columns: it must have one value per image")
        if array.ndim not in (1, 2):
            raise self.error(f"'{key}' must have the shape (n, 1) or (n,), not {array.shape}")
        if len(array) != length:
            raise self.error(f"'{key}' has {len(array)} entries for {length} images")
        return array.reshape(-1)


def _part(file: _Archive, split: str) -> Part:
    images = _images(file, f"{split}_images")
    n = len(images)
    labels = _labels(file, f"{split}_labels", n)
    site = _integers(file, f"{split}_site", n) if f"{split}_site" in file.names else np.zeros(n, dtype=np.int64)
    return Part(images, labels, site, _numbers(file, f"{split}_group", n), _numbers(file, f"{split}_patient", n))


def _numbers(file: _Archive, key: str, length: int) -> np.ndarray | None:
    """The values of a column, numbered from 0; None where the file does not hold it."""
    if key not in file.names:
        return None
    column = file.column(key, length)
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        raise file.error(
            f"'{key}' holds NaN or infinite values"
        )  # NaN equals nothing: each would be a group of its own
    return np.unique(column, return_inverse=True)[1]


def _check_patients(file: _Archive, parts: dict[str, Part]) -> None:
    for key, part in parts.items():
        if part.patient is not None and part.together is not None:
            raise file.error(f"both '{key}_patient' and '{key}_group' are given: keep the patients")
    absent = [key for key, part in parts.items() if part.patient is None]
    if absent and len(absent) < len(parts):
        raise file.error(f"the array '{absent[0]}_patient' is missing: give the patients of all splits or of none")
    known = {
        key: set(file.array(f"{key}_patient").ravel().tolist()) for key, p in parts.items() if p.patient is not None
    }
    for one, other in itertools.combinations(known, 2):
        if known[one] & known[other]:
            raise file.error(f"some patient is in '{one}' and in '{other}': keep one split for each")


def _images(file: _Archive, key: str) -> np.ndarray:
    """`(n, H, W, C)` or, of volumes, `(n, D, H, W, C)` uint8."""
    array = file.array(key)
    shape = f"'{key}' must have the shape (n, H, W) or (n, H, W, 3), volumes one axis more, not {array.shape}"
    if array.ndim not in (3, 4, 5):
        raise file.error(shape)
    # Four axes are a volume, unless one of them can only be channels: no slice is 4 pixels wide.
    if array.ndim == 3 or (array.ndim == 4 and array.shape[3] > 4 and array.shape[1] not in (1, 3)):
        array = array[..., None]
    if array.shape[-1] not in (1, 3):
        raise file.error(shape + (": the channels come last" if array.shape[1] in (1, 3) else ""))
    if 0 in array.shape[1:]:
        raise file.error(f"'{key}' holds images without pixels, shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise file.error(f"'{key}' must be uint8, or floats from 0 to 1, not {array.dtype}")
    if not np.isfinite(array).all():
        raise file.error(f"'{key}' holds NaN or infinite pixels")
    if array.size and (array.min() < 0 or array.max() > 1):
        low, high = float(array.min()), float(array.max())
        raise file.error(f"'{key}' holds floats from {low:g} to {high:g}: scale them to 0..1, or save uint8")
    return np.rint(array * 255).astype(np.uint8)


def _labels(file: _Archive, key: str, length: int) -> np.ndarray:
    """`(n,)` integers from 0, or `(n, K)` of 0 and 1 where there are several columns."""
    array = file.array(key)
    if array.ndim != 2 or array.shape[1] < 2:
        return _integers(file, key, length)
    if len(array) != length:
        raise file.error(f"'{key}' has {len(array)} entries for {length} images")
    if array.dtype.kind not in "iub" or not np.isin(array, (0, 1)).all():
        raise file.error(f"'{key}' has {array.shape[1]} columns, which must hold 0 or 1 for every finding")
    return array.astype(np.int64)


def _integers(file: _Archive, key: str, length: int) -> np.ndarray:
    array = file.column(key, length)
    if array.dtype.kind not in "iu":
        raise file.error(f"'{key}' must be integers from 0, not {array.dtype}")
    if length and array.min() < 0:
        raise file.error(f"'{key}' holds the negative value {int(array.min())}: count from 0")
    return array.astype(np.int64)


def _check_range(
    file: _Archive, parts: dict[str, Part], kind: str, names: tuple[str, ...], source: str, prefix: str
) -> tuple[str, ...]:
    """The names of classes or sites, made up when there are none; every value must have one."""
    columns = {key: part.labels if kind == "labels" else part.site for key, part in parts.items()}
    if kind == "site":
        absent = [key for key in parts if f"{key}_site" not in file.names]
        if absent:
            raise file.error(f"the array '{absent[0]}_site' is missing: give the sites of all splits or of none")
    tops = {key: int(values.max()) for key, values in columns.items() if len(values)}
    if not names:
        highest = max(tops.values(), default=0)
        # Without names any integer would open a class; a stray 10,000 is a mistake, not ten thousand classes.
        if highest >= sum(len(values) for values in columns.values()):
            raise file.error(f"the {kind} go up to {highest}, more than there are images: count from 0")
        return tuple(f"{prefix}{k}" for k in range(highest + 1))
    for key, top in tops.items():
        if top >= len(names):
            raise file.error(f"'{key}_{kind}' holds {top}, but {source} has {len(names)} names (0 to {len(names) - 1})")
    return names


def _finding_names(file: _Archive, findings: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """One name per column of the labels, made up when there are none."""
    if names and len(names) != findings:
        raise file.error(f"the labels have {findings} columns, but class_names has {len(names)} names")
    return names or tuple(f"finding {k}" for k in range(findings))


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"
