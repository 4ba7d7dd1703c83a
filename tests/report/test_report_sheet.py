from __future__ import annotations

import pytest
import torch

from fedistill.errors import FedistillError
from fedistill.synthetic.sheet import GAP, MARGIN, PER_ROW, contact_sheet

NAMES = ("cat", "dog")


def test_height_counts_the_wrapped_lines() -> None:
    counts = (PER_ROW + 1, 1)  # two lines and one
    labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
    sheet = contact_sheet(torch.zeros(len(labels), 1, 20, 16), labels, NAMES, scale=2)
    assert sheet.mode == "RGB"
    assert sheet.height == MARGIN + (40 + GAP + 40) + MARGIN + 40 + MARGIN
    assert sheet.width > PER_ROW * (32 + GAP)
    wider = contact_sheet(torch.zeros(len(labels), 1, 20, 16), labels, NAMES, scale=3)
    assert wider.width - sheet.width == PER_ROW * 16


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_keep_their_pixels_and_their_place(channels: int) -> None:
    images = torch.zeros(2, channels, 16, 16)
    images[0] = 1.0
    images[1, 0, 0, 0] = 2.0  # out of range: clamped
    sheet = contact_sheet(images, torch.tensor([1, 0]), NAMES, scale=4)
    left = sheet.width - MARGIN - 64
    corner = (255, 255, 255) if channels == 1 else (255, 0, 0)
    assert [sheet.getpixel((left + d, MARGIN + d)) for d in (0, 3, 4)] == [corner, corner, (0, 0, 0)]
    assert sheet.getpixel((left + 5, 2 * MARGIN + 64 + 5)) == (255, 255, 255)


def test_empty_class_and_long_names_keep_the_sheet_in_bounds() -> None:
    long = contact_sheet(torch.zeros(1, 1, 8, 8), torch.tensor([0]), ("a" * 500, "none here", "b\nc"))
    assert long.width < 300
    assert contact_sheet(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), NAMES).height > 0


@pytest.mark.parametrize(
    ("images", "labels", "scale"),
    [((2, 2, 8, 8), [0, 1], 1), ((2, 8, 8), [0, 1], 1), ((2, 1, 8, 8), [0, 2], 1), ((2, 1, 8, 8), [0, 1], 0)],
)
def test_refuses_what_it_cannot_draw(images: tuple[int, ...], labels: list[int], scale: int) -> None:
    with pytest.raises(FedistillError):
        contact_sheet(torch.zeros(images), torch.tensor(labels), NAMES, scale)
