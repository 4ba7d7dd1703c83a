"""CSV manifests: a header, then one line per image.

path      relative to the manifest
label     name of the class; with task=multilabel the findings, separated by semicolons, or nothing
split     optional: train, val or test
site      optional: name of the hospital or device
patient   optional: images of one patient stay in one split; where no cell is empty, it can be the unit of privacy
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from fedistill.data.dataset import Dataset
from fedistill.data.images import Entry, from_entries, known_split
from fedistill.errors import FedistillError

_REQUIRED = ("path", "label")
_OPTIONAL = ("split", "site", "patient")
_BETWEEN = ";"  # findings


def load_manifest(path: Path, image_size: int, task: str = "auto") -> Dataset:
    """The data set that the manifest at `path` describes; `task` is the setting of that name.

    Raises `FedistillError` on a missing column, an empty cell, an image that is listed twice or does not exist, and a
    patient in two splits, with the line. Patients are never quoted: the sentence may be read at another site.
    """
    entries, lines = _entries(path, task)
    _check_repeats(path, entries, lines)
    classes = {name for entry in entries for name in ([entry.label] if isinstance(entry.label, str) else entry.label)}
    if task == "multilabel" and len(classes) < 2:
        raise FedistillError("bad-csv", f"{path} names {len(classes)} findings: task=multilabel needs at least two.")
    return from_entries(path.stem, entries, classes, image_size)


def _entries(path: Path, task: str) -> tuple[list[Entry], list[int]]:
    """The entries and the line in the file where each stands."""
    entries, lines = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            columns = _columns(path, rows.fieldnames or ())
            for row in rows:
                where = f"{path} line {rows.line_num}"
                if None in row or None in row.values():
                    raise FedistillError("bad-csv", f"{where} has not as many cells as the header: quote commas.")
                cells = {key: row[name].strip() for key, name in columns.items()}
                label = _label(cells.pop("label"), task, where)
                empty = [key for key, cell in cells.items() if not cell and key != "patient"]
                if empty:
                    raise FedistillError("bad-csv", f"{where} has an empty {empty[0]}: fill it in.")
                if "split" in cells:
                    cells["split"] = known_split(cells["split"], where)
                image = path.parent / cells.pop("path")
                if not image.is_file():
                    raise FedistillError("missing-file", f"{where}: the image {image} does not exist.")
                entries.append(Entry(image, label, **cells))
                lines.append(rows.line_num)
    except (OSError, UnicodeDecodeError):
        raise FedistillError("bad-csv", f"Cannot read {path} as a UTF-8 text file.") from None
    except csv.Error as error:
        raise FedistillError("bad-csv", f"{path} is not a correct CSV file: {error}.") from None
    return entries, lines


def _label(cell: str, task: str, where: str) -> str | tuple[str, ...]:
    """The class, or with task=multilabel the findings, of one cell."""
    if task == "multilabel":
        return tuple(name.strip() for name in cell.split(_BETWEEN) if name.strip())
    if not cell:
        raise FedistillError("bad-csv", f"{where} has an empty label: fill it in.")
    if _BETWEEN in cell and task == "auto":
        raise FedistillError(
            "bad-csv", f"{where} has '{_BETWEEN}' in its label: set task=multilabel, or multiclass if it is one name."
        )
    return cell


def _columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    """For each column that is used, its name as the header spells it."""
    names = {name.strip().lower(): name for name in header if name}
    for key in _REQUIRED:
        if key not in names:
            raise FedistillError(
                "bad-csv",
                f"{path} has no column '{key}' (its header: {', '.join(names) or 'empty'}): "
                f"the first line must name path and label, separated by commas.",
            )
    for name in names:
        near = difflib.get_close_matches(name, _OPTIONAL, n=1, cutoff=0.75)
        # A column that is nearly ours, such as patient_id, was meant to be used; leaving it out would be silent.
        if near and name not in _OPTIONAL and near[0] not in names:
            raise FedistillError("bad-csv", f"{path}: did you mean '{near[0]}' by the column '{name}'? Rename it.")
    return {key: names[key] for key in (*_REQUIRED, *_OPTIONAL) if key in names}


def _check_repeats(path: Path, entries: list[Entry], lines: list[int]) -> None:
    seen: dict[Path, int] = {}
    home: dict[str, tuple[str, int]] = {}
    for entry, line in zip(entries, lines, strict=True):
        before = seen.setdefault(entry.path.resolve(), line)  # `./a.png`, `x/../a.png` and links are the same image
        if before != line:
            raise FedistillError("bad-csv", f"{path} line {line} lists the same image as line {before}: keep one.")
        split, first = home.setdefault(entry.patient, (entry.split, line))
        if entry.patient and split != entry.split:
            raise FedistillError(
                "patient-in-two-splits",
                f"{path} lines {first} and {line} put one patient into {split} and {entry.split}: keep one split.",
            )
