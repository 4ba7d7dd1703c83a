"""Files of a site's work that are torn, and then removed as the sentence says: what they held is made anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.site.job import advance, released_set
from fedistill.synthetic.set import SyntheticSet


def settings(**more: object) -> Config:
    tiny = {
        "method": "mtt", "experts": 2, "expert_steps": 20, "checkpoint_every": 5, "expert_batch": 8, "expert_lr": 0.05, "width": 4,
        "workers": 1, "ipc": 2, "iterations": 4, "syn_steps": 3, "segment": 2, "image_lr": 5.0, "skip_above": 1e9,
        "sketch_networks": 2, "sketch_frequencies": 16, "sketch_augmentations": 2,
    }  # fmt: skip
    return make_config(tiny | more).resolved()


def finish(config: Config, data: Dataset, work: Path) -> SyntheticSet:
    for _ in range(50):
        if advance(config, data, "north", work, seconds=1e9).done:
            break
    return released_set(config, data, "north", work)


def same(a: SyntheticSet, b: SyntheticSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("privacy", ["none", "dp"])
@pytest.mark.parametrize(("method", "name"), [("sketch", "*sketch"), ("mtt", "expert-000"), ("mtt", "expert-001")])
def test_the_advice_on_a_torn_file_can_be_followed(
    method: str, name: str, privacy: str, tiny: Dataset, tmp_path: Path
) -> None:
    private = {"privacy": "dp", "epsilon": 3.0, "denoise": "average"} if privacy == "dp" else {}
    finish(settings(method=method, ipc=1, **private), tiny, tmp_path)
    (file,) = tmp_path.glob(f"site-*/*/{name}.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FedistillError, match="remove it, and what it held is made anew") as refused:
        finish(settings(method=method, **private), tiny, tmp_path)
    assert str(file) in refused.value.sentence
    file.unlink()
    made = finish(settings(method=method, **private), tiny, tmp_path)
    assert privacy == "dp" or same(made, finish(settings(method=method), tiny, tmp_path / "whole"))


@pytest.mark.parametrize(
    "name", ["facts-*.json", "seconds-*.json", "progress-1.json", "state.safetensors", "set.safetensors"]
)
def test_what_is_removed_is_made_again_to_the_bit(name: str, tiny: Dataset, tmp_path: Path) -> None:
    made = finish(settings(), tiny, tmp_path)
    files = list(tmp_path.rglob(name))
    assert files
    for file in files:
        file.unlink()
    assert same(finish(settings(), tiny, tmp_path), made)


def test_an_expert_that_was_made_again_for_less_trains_on(tiny: Dataset, tmp_path: Path) -> None:
    """The facts of a method that reads many checkpoints outlive an expert that a method of few makes anew."""
    long, short = settings(method="teach"), settings(method="mtt", segment=1, window=0.1)
    made = finish(long, tiny, tmp_path)
    next(tmp_path.rglob("expert-000.safetensors")).unlink()
    finish(short, tiny, tmp_path)
    for folder in list(tmp_path.rglob("round-1")):
        for file in folder.iterdir():
            file.unlink()
    assert same(finish(long, tiny, tmp_path), made)
