"""Images of a page: for every class the synthetic ones of each site under each other, as small PNG inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from fedistill.data.dataset import Split
from fedistill.synthetic.set import SyntheticSet

TILE_PIXELS = 48  # small images are magnified to about this height
PER_ROW = 5  # images beside each other
SHOWN = 20  # images of a site and class that are shown; the contact sheet in the run folder has all
GAP = 1  # pixels between images, before they are magnified

Json = dict[str, Any]


def by_class(
    sets: Mapping[str, SyntheticSet], phantoms: Split | None, class_names: list[str], multilabel: bool
) -> list[Json]:
    """Class by class the strips of `phantoms` and of each site. phantoms: real images that show nobody."""
    sources = {} if phantoms is None else {"": (phantoms.images.float() / 255, phantoms.groups)}
    sources |= {name: (made.pixels, made.groups) for name, made in sets.items() if len(made)}
    found = []
    for k, name in enumerate([*class_names, "no finding"] if multilabel else class_names):
        strips = []
        for source, (pixels, groups) in sources.items():
            mine = pixels[groups == k]
            if len(mine) or name != "no finding":
                strips.append({"source": source, "count": len(mine)} | _strip(mine[:SHOWN]))
        if strips:
            found.append({"name": name, "strips": strips})
    return found


def _strip(pixels: Tensor) -> Json:
    """The images `(m, C, H, W)` in 0..1, of volumes `(m, C, D, H, W)` the middle slice, as a `data:` address with its size."""
    if not len(pixels):
        return {"shown": 0}
    if pixels.dim() == 5:
        pixels = pixels[:, :, pixels.shape[2] // 2]
    tiles = pixels.nan_to_num(0.0).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    count, height, width, channels = tiles.shape
    columns = min(PER_ROW, count)
    rows = -(-count // columns)
    strip = Image.new(
        "LA" if channels == 1 else "RGBA",
        (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP),  # transparent, so that the page shows in the gaps
    )
    for k, tile in enumerate(tiles):
        image = Image.fromarray(tile[:, :, 0] if channels == 1 else tile)
        strip.paste(image.convert(strip.mode), (k % columns * (width + GAP), k // columns * (height + GAP)))
    file = io.BytesIO()
    strip.save(file, "PNG")
    scale = max(1, round(TILE_PIXELS / height))
    text = base64.b64encode(file.getvalue()).decode()
    return {
        "src": f"data:image/png;base64,{text}",
        "width": strip.width * scale,
        "height": strip.height * scale,
        "shown": count,
    }
