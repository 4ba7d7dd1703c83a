"""Canaries: wrong labels, fair and secret coins, and data sets that differ by exactly them."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.privacy.audit.canaries import choose, toss, with_canaries


def test_own_canaries_have_wrong_labels_and_leave_no_class_empty(tiny: Dataset) -> None:
    chosen = choose(tiny, 30, "own", 0)
    assert len(chosen) == len(chosen.taken.unique()) == 30
    assert torch.equal(chosen.images.images, tiny.train.images[chosen.taken])
    assert (chosen.images.labels != tiny.train.labels[chosen.taken]).all()
    assert set(chosen.images.labels.tolist()) == {0, 1, 2}
    rare = replace(
        tiny,
        train=tiny.train.take(torch.cat([(tiny.train.labels == c).nonzero()[: 1 + 60 * (c < 2), 0] for c in range(3)])),
    )
    for seed in range(20):
        nobody = torch.zeros(16, dtype=torch.bool)
        assert 0 not in with_canaries(rare, choose(rare, 16, "own", seed), nobody).train.counts(3)


def test_data_sets_differ_by_the_canaries(tiny: Dataset) -> None:
    chosen = choose(tiny, 10, "own", 0)
    inside = torch.arange(10) < 4
    data = with_canaries(tiny, chosen, inside)
    assert len(data.train) == len(tiny.train) - 10 + 4
    assert torch.equal(data.train.images[-4:], chosen.images.images[:4])
    assert torch.equal(data.train.labels[-4:], chosen.images.labels[:4])
    more = with_canaries(tiny, chosen, torch.arange(10) < 5)
    assert torch.equal(more.train.images[:-1], data.train.images)  # neighbours: one record added
    left = {image.numpy().tobytes() for image in data.train.images}
    assert not left & {image.numpy().tobytes() for image in chosen.images.images[4:]}
    assert data.val is tiny.val


def test_phantom_canaries_take_nobodys_place(tiny: Dataset) -> None:
    chosen = choose(tiny, 12, "phantom", 0)
    assert chosen.images.images.shape == (12, *tiny.geometry)
    assert chosen.images.images.dtype == torch.uint8
    assert len(with_canaries(tiny, chosen, torch.ones(12, dtype=torch.bool)).train) == len(tiny.train) + 12


def test_several_findings_are_turned_round() -> None:
    data = load_data(make_config({"phantom_images": 60, "phantom_size": 16, "task": "multilabel"}))
    chosen = choose(data, 10, "own", 0)
    assert torch.equal(chosen.images.labels, 1 - data.train.labels[chosen.taken])


@pytest.mark.parametrize(
    ("m", "source", "code"),
    [(2, "own", "few-canaries"), (31, "own", "many-canaries"), (10, "moon", "bad-value")],
)
def test_mistakes(tiny: Dataset, m: int, source: str, code: str) -> None:
    with pytest.raises(FedistillError) as raised:
        choose(tiny, m, source, 0)
    assert raised.value.code == code


def test_volumes_have_no_phantoms_to_offer() -> None:
    data = load_data(make_config({"phantom_images": 60, "phantom_size": 16, "phantom_depth": 4}))
    with pytest.raises(FedistillError, match="volumes"):
        choose(data, 10, "phantom", 0)


def test_coins_are_fair_secret_and_kept(tmp_path: Path) -> None:
    coins = toss(tmp_path / "a" / "coins.json", 2000)
    assert 900 < int(coins.sum()) < 1100
    assert stat.S_IMODE((tmp_path / "a" / "coins.json").stat().st_mode) == 0o600
    assert torch.equal(coins, toss(tmp_path / "a" / "coins.json", 2000))
    torch.manual_seed(0)
    assert not torch.equal(coins, toss(tmp_path / "b.json", 2000))  # of no seed
    with pytest.raises(FedistillError, match="2000 canaries"):
        toss(tmp_path / "a" / "coins.json", 5)
    assert json.loads((tmp_path / "a" / "coins.json").read_text())[:3] == coins[:3].int().tolist()


def test_canaries_keep_their_patients_and_phantoms_are_new_ones(tiny: Dataset) -> None:
    patients = torch.arange(len(tiny.train)) // 2
    data = replace(tiny, train=replace(tiny.train, patient=patients))
    own, drawn = choose(data, 12, "own", 0), choose(data, 12, "phantom", 0)
    assert torch.equal(own.images.patient, patients[own.taken])
    assert len(set(drawn.images.patient.tolist()) - set(patients.tolist())) == 12
    inside = torch.arange(12) < 5
    for chosen in (own, drawn):
        train = with_canaries(data, chosen, inside).train
        assert len(train.patient) == len(train)
        assert torch.equal(train.patient[-5:], chosen.images.patient[:5])
    assert with_canaries(tiny, choose(tiny, 12, "own", 0), inside).train.patient is None
