from __future__ import annotations

import pytest
import torch

from fedistill.data.medmnist_source import MEDMNIST
from fedistill.data.public import AUGMENT, NORMALISATION, augmentations, normalise
from fedistill.errors import FedistillError

OPERATIONS = {"flip", "vflip", "rot90", "rotate", "scale", "crop", "cutout", "brightness", "contrast", "saturation"}


def test_every_modality_has_constants_and_known_operations():
    assert set(NORMALISATION) == set(AUGMENT)
    assert {name for names in AUGMENT.values() for name in names} == OPERATIONS
    assert {about.modality for about in MEDMNIST.values()} <= set(NORMALISATION)


@pytest.mark.parametrize("modality", ["xray", "ct", "generic"])
def test_no_flip_where_sides_matter(modality):
    assert not {"flip", "vflip", "rot90"} & set(AUGMENT[modality])


def test_saturation_needs_colour():
    assert "saturation" in augmentations("pathology", 3)
    assert "saturation" not in augmentations("pathology", 1)


def test_normalise_uses_the_public_constants_and_leaves_its_input():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    out = normalise(images, "generic")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.flatten(), torch.tensor([-2.0, -1.2, 2.0]))
    assert images.flatten().tolist() == [0, 51, 255]


def test_unknown_modality_names_the_nearest():
    with pytest.raises(FedistillError, match="'xray'"):
        normalise(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "x-ray")
