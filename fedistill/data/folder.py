"""Image folders: one subfolder per class, or train, val and test with one subfolder per class each."""

from __future__ import annotations

from pathlib import Path

from fedistill.data.dataset import Dataset
from fedistill.data.images import SUFFIXES, Entry, from_entries, split_word
from fedistill.errors import FedistillError

# Companions that data sets are often delivered with; anything else that is not an image is more likely a mistake.
_IGNORED = (".txt", ".md", ".csv", ".json", ".pdf", ".db", ".ini")


def load_folder(root: Path, image_size: int) -> Dataset:
    """The data set in the folder `root`; class names are the names of the subfolders.

    Raises `FedistillError` when the folder is not laid out as described, with the place that departs from it.
    """
    folders = _folders(root)
    splits = {folder: split_word(folder.name) for folder in folders}
    if not any(splits.values()):
        classes, entries = _classes(root, folders, "")
    else:
        classes, entries = set(), []
        for folder, split in splits.items():
            if not split:
                raise _layout(f"{folder} lies beside train, val and test: move it into them, one folder per class")
            if sum(other == split for other in splits.values()) > 1:
                raise _layout(f"{root} has two folders for {split}: keep one")
            found, more = _classes(folder, _folders(folder), split)
            classes |= found
            entries += more
    return from_entries(root.resolve().name, entries, classes, image_size)


def _folders(root: Path) -> list[Path]:
    """The subfolders of `root`, which must hold nothing else that matters."""
    _, folders = _listing(root, images_expected=False)
    if not folders:
        raise _layout(f"{root} has no subfolders: put the images of each class into a folder with its name")
    return folders


def _classes(root: Path, folders: list[Path], split: str) -> tuple[set[str], list[Entry]]:
    entries = []
    for folder in folders:
        images, deeper = _listing(folder, images_expected=True)
        if deeper:
            raise _layout(f"{folder} is a class and must hold only images, but {deeper[0]} is a folder")
        entries += [Entry(path, folder.name, split) for path in images]
    if not entries:
        raise _layout(f"{root} holds no images ({', '.join(SUFFIXES)}): put the images of each class into its folder")
    return {folder.name for folder in folders}, entries


def _listing(folder: Path, images_expected: bool) -> tuple[list[Path], list[Path]]:
    """Images and subfolders of `folder`, sorted by name; hidden files are passed over."""
    images, folders = [], []
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        raise FedistillError("missing-file", f"Cannot read the folder {folder}.") from None
    for path in inside:
        suffix = path.suffix.lower()
        if path.name.startswith(".") or (suffix in _IGNORED and not path.is_dir()):
            continue
        if path.is_dir():
            folders.append(path)
        elif suffix not in SUFFIXES:
            raise _layout(f"{path} is no image of a kind that is read ({', '.join(SUFFIXES)}): convert or remove it")
        elif not images_expected:
            raise _layout(f"{path} lies outside the class folders: move it into the folder of its class")
        else:
            images.append(path)
    return images, folders


def _layout(what: str) -> FedistillError:
    return FedistillError("bad-folder", f"{what}.")
