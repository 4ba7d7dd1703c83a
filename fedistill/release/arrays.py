"""The set as one `.npz` file in the layout of MedMNIST, which its classes, and our own `--data`, can load."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedistill.synthetic.set import SyntheticSet


def arrays_of(made: SyntheticSet) -> dict[str, NDArray[Any]]:
    """The arrays of the file: every image is one of train, val and test are empty.

    {train,val,test}_images: uint8 `(m, H, W)` or `(m, H, W, 3)`, volumes with a depth before H. What lies outside 0..255 under the
    public normalisation is clipped.
    {train,val,test}_labels: uint8 (uint16 above 256 classes) `(m, 1)`, the most likely class, or `(m, K)` with 1 for findings of
    at least one half.
    {train,val,test}_site, site_names, class_names, modality: as our own reader of such files knows them.
    """
    pixels = made.in_bytes.movedim(1, -1).contiguous().numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    small = np.uint8 if made.kind == "multilabel" or len(made.class_names) <= 256 else np.uint16
    labels = made.labels_of_data.reshape(len(made), -1).numpy().astype(small)
    site = made.site.numpy().astype(np.uint16)[:, None]
    arrays: dict[str, NDArray[Any]] = {}
    for split, kept in (("train", slice(None)), ("val", slice(0)), ("test", slice(0))):
        arrays |= {f"{split}_images": pixels[kept], f"{split}_labels": labels[kept], f"{split}_site": site[kept]}
    return arrays | {
        "site_names": np.array(made.sites),
        "class_names": np.array(made.class_names),
        "modality": np.array(made.modality),
    }


def npz_bytes(arrays: dict[str, NDArray[Any]]) -> bytes:
    """The file; the same arrays give the same bytes, since members of the archive bear no date."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def clipped_share(made: SyntheticSet) -> float:
    """The share of pixel values that 8 bits could not show: below 0 or above 255 under the public normalisation."""
    values = made.images * made.std + made.mean
    return float(((values < 0) | (values > 1)).float().mean())
