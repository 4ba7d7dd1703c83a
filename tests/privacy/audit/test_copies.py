"""Copy metrics: they see copies, and see none where there are none."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedistill.config import make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.sources import load_data
from fedistill.experts.train import Task
from fedistill.privacy.audit.copies import copies, dissimilarity, rmse
from fedistill.site.describe import task_of
from fedistill.synthetic.set import SyntheticSet, one_hot
from fedistill.wire import quantise

CONFIG = make_config({"width": 8})
METRICS = ("pixel", "ssim", "feature")


@pytest.fixture(scope="module")
def phantoms() -> Dataset:
    return load_data(make_config({"phantom_images": 400, "phantom_classes": 2, "phantom_size": 16}))


def released(data: Dataset, pixels: Tensor) -> SyntheticSet:
    """Pixels `(m, ...)` on a 0..1 scale as a set, exactly as it travels."""
    made = SyntheticSet(
        images=(pixels - 0.4) / 0.25,
        labels=one_hot(torch.arange(len(pixels)) % data.classes, data.classes),
        site=torch.zeros(len(pixels), dtype=torch.int64),
        sites=("a",),
        class_names=data.class_names,
        mean=0.4,
        std=0.25,
        modality="phantom",
        step_size=(0.1,),
        manifest={"a": {}},
    )
    return quantise(made)


def look(data: Dataset, pixels: Tensor, train: Split, unseen: Split, folder: Path | None = None) -> dict:
    return copies(CONFIG, task_of(data), released(data, pixels), train, unseen, folder=folder)


def test_exact_copies_are_counted(phantoms: Dataset) -> None:
    fresh = phantoms.test.images[:10].float() / 255
    found = look(phantoms, torch.cat([phantoms.train.images[:7].float() / 255, fresh]), phantoms.train, phantoms.val)
    assert (found["exact"], found["images"], found["red_flag"]) == (7, 17, True)


def test_noisy_copies_are_noticed_by_every_metric(phantoms: Dataset) -> None:
    real = phantoms.train.images[:30].float() / 255
    found = look(
        phantoms,
        (real + 0.04 * torch.randn(real.shape)).clamp(0, 1),
        phantoms.train.take(torch.arange(200)),
        phantoms.test,
    )
    assert found["exact"] == 0
    assert found["red_flag"]
    for name in METRICS:
        assert found[name]["closer_to_training"] > 0.8, name
        assert found[name]["neighbours"]["low"] > 0.5, name


def test_independent_images_are_as_near_to_either_side(phantoms: Dataset) -> None:
    one, other, rest = (phantoms.train.take(torch.arange(i, 400, 4)) for i in (0, 1, 2))
    found = look(phantoms, rest.images.float() / 255, one, other)
    assert found["exact"] == 0
    assert not found["red_flag"]
    for name in METRICS:
        assert 0.3 < found[name]["closer_to_training"] < 0.7, name
        assert found[name]["neighbours"]["low"] < 0.5 < found[name]["neighbours"]["high"], name


def test_one_image_that_is_nearest_to_all_is_one_observation(phantoms: Dataset) -> None:
    grey = Split(
        torch.full((1, 1, 16, 16), 128, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
    )
    train = phantoms.train.take(torch.arange(20))
    with_grey = Split(
        torch.cat([train.images, grey.images]),
        torch.cat([train.labels, grey.labels]),
        torch.cat([train.site, grey.site]),
    )
    found = look(phantoms, 0.5 + 0.02 * torch.randn(25, 1, 16, 16), with_grey, phantoms.test)
    assert found["pixel"]["closer_to_training"] == 1
    assert found["pixel"]["neighbours"]["distinct"] == 1
    assert not found["red_flag"]


def test_as_many_of_each_class_are_compared(phantoms: Dataset) -> None:
    few = phantoms.val.take((phantoms.val.labels == 1).nonzero().flatten()[:9])
    assert look(phantoms, torch.rand(4, 1, 16, 16), phantoms.train, few)["compared"] == 9


def test_the_larger_side_is_not_the_nearer_one(phantoms: Dataset) -> None:
    few, many, rest = (phantoms.train.take(torch.arange(*span)) for span in ((0, 50), (50, 320), (320, 400)))
    for train, unseen in ((few, many), (many, few)):
        found = look(phantoms, rest.images.float() / 255, train, unseen)
        assert 0.3 < found["pixel"]["closer_to_training"] < 0.7
        assert found["pixel"]["neighbours"]["low"] < 0.5 < found["pixel"]["neighbours"]["high"]


def test_without_unseen_images_only_copies_are_counted(phantoms: Dataset) -> None:
    found = look(phantoms, phantoms.train.images[:3].float() / 255, phantoms.train, phantoms.val.take(torch.arange(0)))
    assert found["exact"] == 3
    assert "pixel" not in found


def test_the_picture_is_for_its_owner_only_and_not_in_the_result(phantoms: Dataset, tmp_path: Path) -> None:
    found = look(phantoms, torch.rand(12, 1, 16, 16), phantoms.train, phantoms.val, tmp_path / "site")
    file = tmp_path / "site" / found["picture"]
    assert file.name == "copies.png"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(json.dumps(found)) < 2000


def test_ssim_is_the_formula() -> None:
    x, y = torch.rand(2, 3, 14, 14, dtype=torch.float64), torch.rand(3, 3, 14, 14, dtype=torch.float64)
    line = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / 4.5)
    window = torch.outer(line, line) / line.sum().square()

    def slow(a: Tensor, b: Tensor) -> float:
        values = []
        for c in range(3):
            for i in range(4):
                for j in range(4):
                    p, q = a[c, i : i + 11, j : j + 11], b[c, i : i + 11, j : j + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp).square()).sum(), (window * (q - mq).square()).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        return float(torch.stack(values).mean())

    expected = torch.tensor([[1 - slow(a, b) for b in y] for a in x])
    assert torch.allclose(dissimilarity(x, y).float(), expected, atol=1e-6)


@pytest.mark.parametrize("measure", [rmse, dissimilarity])
def test_an_image_is_nearest_to_itself(measure) -> None:
    x = torch.rand(5, 1, 3, 12, 12)  # volumes
    found = measure(x, x)
    assert found.diagonal().abs().max() < 1e-5
    assert (found + torch.eye(5) > 0.1).all()
    assert torch.allclose(measure(x, x + 0.1)[0, 0], torch.tensor(0.1), atol=0.1)


def test_colour_and_volumes() -> None:
    for shape in ((3, 16, 16), (1, 4, 16, 16)):
        split = Split(
            torch.randint(0, 256, (40, *shape), dtype=torch.uint8),
            torch.arange(40) % 2,
            torch.zeros(40, dtype=torch.int64),
        )
        data = Dataset("x", "phantom", ("a", "b"), ("s",), split, split, split)
        task = Task(data.geometry, data.class_names, "phantom")
        config = make_config({"width": 4, "depth": 2})
        found = copies(
            config,
            task,
            released(data, torch.rand(4, *shape)),
            split.take(torch.arange(20)),
            split.take(torch.arange(20, 40)),
            folder=None,
        )
        assert found["compared"] == 20
