"""A contact sheet: every image of a set, sorted by class, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fedistill.errors import FedistillError
from fedistill.synthetic.set import SyntheticSet

PER_ROW = 10  # tiles beside each other before a class goes on in the next line
GAP = 4  # pixels between tiles
MARGIN = 8  # pixels around the sheet and between its columns
FONT_SIZE = 13
CAPTION_WIDTH = 420  # pixels that a sheet with a caption has at least
NAME_WIDTH = 150  # pixels; longer class names are cut with an ellipsis


def sheet_of(made: SyntheticSet, scale: int = 2) -> Image.Image:
    """The contact sheet of a set; images of several findings stand by the most likely, those without any have a band."""
    names = [*made.class_names, "no finding"] if made.kind == "multilabel" else made.class_names
    return contact_sheet(made.pixels, made.groups, names, scale)


def captioned(sheet: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The sheet under a caption, broken into as many lines as its width takes."""
    font = ImageFont.load_default(size=FONT_SIZE)
    width, rows = max(sheet.width, CAPTION_WIDTH), list[str]()
    for line in lines:
        row = ""
        for word in line.split():
            if row and font.getlength(f"{row} {word}") > width - 2 * MARGIN:
                rows, row = [*rows, row], word
            else:
                row = f"{row} {word}".strip()
        rows.append(row)
    top = MARGIN + len(rows) * (FONT_SIZE + 5)
    whole = Image.new("RGB", (width, top + sheet.height), "white")
    draw = ImageDraw.Draw(whole)
    for k, row in enumerate(rows):
        draw.text((MARGIN, MARGIN + k * (FONT_SIZE + 5)), row, fill="black", font=font)
    whole.paste(sheet, (0, top))
    return whole


def contact_sheet(images: Tensor, labels: Tensor, class_names: Sequence[str], scale: int = 2) -> Image.Image:
    """The images as tiles on white, one band per class with its name at the left.

    images: `(m, C, H, W)` with pixels in 0..1 (clamped), `C` 1 (grey) or 3 (RGB); of volumes `(m, C, D, H, W)` the middle
    slice is shown. labels: `(m,)` class indices.
    scale: whole-number magnification without smoothing, so that the pixels of small images can be seen.

    Returns an RGB image. A class without images keeps its band, with the word "none".
    Raises `FedistillError` on other shapes, or on a label without a name.
    """
    if images.dim() == 5:
        images = images[:, :, images.shape[2] // 2]
    if images.dim() != 4 or images.shape[1] not in (1, 3) or labels.shape != images.shape[:1]:
        raise FedistillError(
            "bad-shape",
            f"A contact sheet needs images (m, 1 or 3, [D,] H, W) and labels (m,), not {tuple(images.shape)}.",
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise FedistillError("bad-label", f"A label is outside the {len(class_names)} classes.")
    if scale < 1:
        raise FedistillError("bad-value", f"scale={scale} is too small: it must be at least 1.")

    font = ImageFont.load_default(size=FONT_SIZE)
    names = [_shorten(name, font) for name in class_names]
    members = [(labels == k).nonzero().flatten().tolist() for k in range(len(class_names))]
    height, width = images.shape[2] * scale, images.shape[3] * scale
    columns = max(1, min(PER_ROW, max(map(len, members), default=0)))
    left = 2 * MARGIN + round(max((font.getlength(name) for name in names), default=0))
    bands = [max(_lines(found) * (height + GAP) - GAP, FONT_SIZE + 5) for found in members]

    size = (left + columns * (width + GAP) - GAP + MARGIN, MARGIN + sum(band + MARGIN for band in bands))
    sheet = Image.new("RGB", (max(size[0], left + 4 * FONT_SIZE), size[1]), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = images.detach().cpu().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    top = MARGIN
    for name, found, band in zip(names, members, bands, strict=True):
        draw.text((MARGIN, top + min(band, height) / 2), name, fill="black", font=font, anchor="lm")
        if not found:
            draw.text((left, top + min(band, height) / 2), "none", fill="#595959", font=font, anchor="lm")
        for place, index in enumerate(found):
            corner = (left + place % columns * (width + GAP), top + place // columns * (height + GAP))
            sheet.paste(_tile(pixels[index], width, height), corner)
        top += band + MARGIN
    return sheet


def _lines(found: Sequence[int]) -> int:
    return max(1, -(-len(found) // PER_ROW))


def _tile(pixels: np.ndarray, width: int, height: int) -> Image.Image:
    grey = pixels.shape[2] == 1
    return Image.fromarray(pixels[:, :, 0] if grey else pixels).resize((width, height), Image.Resampling.NEAREST)


def _shorten(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    clean = "".join(c if c.isprintable() else " " for c in name)
    if font.getlength(clean) <= NAME_WIDTH:
        return clean
    while clean and font.getlength(clean + "…") > NAME_WIDTH:
        clean = clean[:-1]
    return clean + "…"
