"""What is to be done: cells, their keys, their order, and the data that they are about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tinysuite import write_suite

from fedistill.bench.plan import Cell, Choice, cells_of, load_subset
from fedistill.bench.suite import load_suite
from fedistill.config import make_config
from fedistill.errors import FedistillError


def planned(folder: Path, **choice: object) -> list[Cell]:
    return cells_of(load_suite(str(folder)), Choice(**choice))  # type: ignore[arg-type]


def keys(folder: Path, **choice: object) -> dict[str, str]:
    return {cell.name: cell.key for cell in planned(folder, **choice)}


def test_every_combination_and_one_reference_per_seed(tmp_path: Path) -> None:
    cells = planned(write_suite(tmp_path))
    assert len(cells) == 2 + 2 * 2 * 2
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.method for cell in cells[:2]] == ["whole", "whole"]  # the cheapest
    assert [cell.cost for cell in cells] == sorted(cell.cost for cell in cells)
    assert all(cell.config.workers == 1 and cell.config.partition == "iid" and cell.config.sites == 1 for cell in cells)


def test_a_choice_of_the_suite(tmp_path: Path) -> None:
    names = keys(write_suite(tmp_path), methods=["ptm"], ipc=[3], seeds=1)
    assert list(names) == ["phantom, whole, seed 0", "phantom, ptm, IPC 3, seed 0"]
    assert list(keys(tmp_path, methods=["ptm"], ipc=[3], seeds=1, settings={"seed": "7"})) == [
        "phantom, whole, seed 7",
        "phantom, ptm, IPC 3, seed 7",
    ]


def test_keys_follow_the_settings_that_matter(tmp_path: Path) -> None:
    before = keys(write_suite(tmp_path))
    for settings in ({"slice_seconds": "1"}, {"workers": "7"}, {"width": "4"}):
        assert keys(tmp_path, settings=settings) == before
    assert keys(tmp_path, seeds=1).items() < before.items()

    def changed(**settings: str) -> set[str]:
        now = keys(tmp_path, settings=settings)
        return {name.split(", ")[1] for name in now if now[name] != before[name]}

    assert changed(iterations="3") == changed(expert_steps="30") == {"mtt", "ptm"}
    assert changed(eval_steps="3") == changed(width="8") == changed(phantom_images="80") == {"mtt", "ptm", "whole"}
    write_suite(tmp_path, methods_ptm='overlap = "off"')
    assert changed() == {"ptm"}


def test_the_same_images_elsewhere_have_the_same_keys(tmp_path: Path, shared_data: Path) -> None:
    name = "wbc_sites.npz"
    write_suite(tmp_path, data_phantom=f'data = "{name}"\ntrain_images = 50')
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / name).symlink_to(shared_data / name)
    assert keys(tmp_path, data_root=shared_data) == keys(tmp_path, data_root=tmp_path / "root")


def test_a_name_of_data_stays_one_beside_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "root" / "phantom").mkdir(parents=True)
    cells = planned(write_suite(tmp_path / "suite"), data_root=tmp_path / "root")
    assert {cell.config.data for cell in cells} == {"phantom"}


def test_cells_that_differ_after_the_experts_share_them(tmp_path: Path) -> None:
    cells = [cell for cell in planned(write_suite(tmp_path)) if cell.method != "whole"]
    assert len({cell.experts for cell in cells}) == 2  # one per seed
    write_suite(tmp_path, methods_ptm="experts = 2")
    cells = [cell for cell in planned(tmp_path) if cell.method != "whole"]
    assert len({cell.experts for cell in cells}) == 4


def test_a_federated_data_set(tmp_path: Path) -> None:
    write_suite(tmp_path, data_phantom='data = "phantom"\npartition = "site"')
    assert {(c.config.partition, c.config.sites) for c in planned(tmp_path)} == {("site", 0)}


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"methods": ["mt"]}, "Unknown method 'mt': did you mean 'mtt'"),
        ({"data": ["fantom"]}, "Unknown data set 'fantom': did you mean 'phantom'"),
        ({"ipc": [0]}, "ipc=0 is too small"),
        ({"settings": {"ipc": "3"}}, "--set ipc does not work here: use --ipc"),
        ({"settings": {"iteration": "3"}}, "did you mean 'iterations'"),
        ({"settings": {"eval_models": "mpl"}}, "did you mean 'mlp'"),
        ({"settings": {"width": "wide"}}, "width=wide is not a whole number"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path: Path, choice: dict[str, object], sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        planned(write_suite(tmp_path), **choice)


def test_methods_that_do_not_exist_or_are_the_same(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="Unknown method 'mtx': did you mean 'mtt'"):
        planned(write_suite(tmp_path, methods_mine='method = "mtx"'))
    assert planned(tmp_path, methods=["ptm"])  # only what is asked for must exist
    with pytest.raises(
        FedistillError, match="'phantom, mine, IPC 1, seed 0' and 'phantom, mtt, IPC 1, seed 0' have the"
    ):
        planned(write_suite(tmp_path, methods_mine='method = "mtt"'))


def test_missing_data_are_an_error_only_where_there_are_no_others(tmp_path: Path) -> None:
    write_suite(tmp_path, data_lost='data = "lost.npz"')
    cells = planned(tmp_path, data_root=tmp_path)
    assert {cell.fingerprint == "" for cell in cells if cell.data == "lost"} == {True}
    with pytest.raises(FedistillError, match=f"there is no file or folder {tmp_path / 'lost.npz'}"):
        planned(tmp_path, data=["lost"], data_root=tmp_path)


def test_a_subset_keeps_the_shares_of_the_classes() -> None:
    config = make_config({"phantom_images": 120, "phantom_classes": 3, "phantom_size": 16})
    everything, subset = load_subset(config, "p", 0), load_subset(config, "p", 50)
    assert len(subset.train) == 50
    for n, of in zip(subset.train.counts(3), everything.train.counts(3), strict=True):
        assert abs(n - of * 50 / 120) < 1
    assert torch.equal(subset.test.images, everything.test.images)
    assert subset.fingerprint == load_subset(config, "p", 50).fingerprint != everything.fingerprint
    assert load_subset(config, "p", 5000).fingerprint == everything.fingerprint
    real = {image.numpy().tobytes() for image in everything.train.images}
    assert len({i.numpy().tobytes() for i in subset.train.images} & real) == 50
