from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.experts import trajectory
from fedistill.experts.train import load_trajectory, train_experts
from fedistill.files import write_tensors
from fedistill.models.loss import class_weights, targets_of
from fedistill.site.describe import task_of

FOREVER = float("inf")


def settings(**more: object) -> Config:
    tiny = {"experts": 2, "expert_steps": 30, "checkpoint_every": 5, "expert_batch": 8, "width": 4, "workers": 1}
    return make_config(tiny | more).resolved()


def train(config: Config, data: Dataset, folder: Path, until: float = FOREVER, checkpoints: int = 0) -> tuple[int, int]:
    checkpoints = checkpoints or config.expert_steps // config.checkpoint_every
    return train_experts(config, task_of(data), data.train, folder, site="north", checkpoints=checkpoints, until=until)


def load(folder: Path, expert: int, checkpoints: int = 6) -> torch.Tensor:
    return load_trajectory(folder, expert, checkpoints)


def test_checkpoints_move_and_begin_at_a_fresh_network(tiny: Dataset, tmp_path: Path) -> None:
    config = settings()
    assert train(config, tiny, tmp_path) == (60, 60)
    one, two = (load(tmp_path, e) for e in range(2))
    assert one.shape == (7, task_of(tiny).network("convnet", config).size)
    assert ((one[1:] - one[:-1]).norm(dim=1) > 0).all()  # stored copies, not views of the live weights
    assert not torch.equal(one[0], two[0])


def test_stopping_and_going_on_changes_no_bit(tiny: Dataset, tmp_path: Path) -> None:
    config = settings()
    train(config, tiny, tmp_path / "whole")
    slices = 0
    while train(config, tiny, tmp_path / "sliced", until=time.monotonic() - 1)[0] < 60:
        slices += 1
    assert slices > 3
    for e in range(2):
        assert torch.equal(load(tmp_path / "whole", e), load(tmp_path / "sliced", e))


def test_parallel_experts_equal_sequential_ones(tiny: Dataset, tmp_path: Path) -> None:
    train(settings(), tiny, tmp_path / "one")
    train(settings(workers=2), tiny, tmp_path / "two")
    for e in range(2):
        assert torch.equal(load(tmp_path / "one", e), load(tmp_path / "two", e))


def test_an_expert_that_is_needed_for_longer_trains_on(tiny: Dataset, tmp_path: Path) -> None:
    """Only as far as a schedule reaches is trained and stored; going on later gives the same bits as going there at once."""
    config = settings()
    assert train(config, tiny, tmp_path / "short", checkpoints=2) == (20, 20)
    short = load(tmp_path / "short", 0, 2)
    assert train(config, tiny, tmp_path / "short") == (60, 60)
    train(config, tiny, tmp_path / "long")
    assert torch.equal(load(tmp_path / "short", 0), load(tmp_path / "long", 0))
    assert torch.equal(load(tmp_path / "short", 0, 2), short)


def test_a_pool_of_architectures_takes_turns(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(model="convnet, mlp")
    train(config, tiny, tmp_path)
    sizes = [load(tmp_path, e).shape[1] for e in range(2)]
    assert sizes == [task_of(tiny).network(name, config).size for name in ("convnet", "mlp")]


def test_experts_learn(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(expert_steps=150, expert_lr=0.05, width=16, expert_batch=32)
    train(config, tiny, tmp_path)
    net = task_of(tiny).network("convnet", config)
    from fedistill.data.public import normalise

    x, path = normalise(tiny.train.images, tiny.modality), load(tmp_path, 0, 30)
    losses = [float(F.cross_entropy(net(path[t], x), tiny.train.labels)) for t in (0, -1)]
    assert losses[1] < 0.9 * losses[0]


def test_a_diverged_expert_is_an_error(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="diverged"):
        train(settings(expert_lr=1e30), tiny, tmp_path)


def test_an_expert_that_does_not_move_is_an_error(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="did not move"):
        train(settings(expert_lr=0.0), tiny, tmp_path)


def test_class_weights_are_clipped_and_ignore_absent_classes() -> None:
    labels = torch.tensor([0] * 96 + [1] * 3 + [3])
    weights = class_weights(targets_of(labels, 5, "multiclass"))
    assert weights[0] == pytest.approx(100 / (3 * 96))
    assert weights[1] == pytest.approx(10.0)  # 100 / 9 = 11.1, clipped
    assert weights[2] == weights[4] == 1
    assert class_weights(targets_of(torch.tensor([0, 1, 0, 1]), 2, "multiclass")).tolist() == [1, 1]


def stored(path: torch.Tensor) -> dict[str, torch.Tensor]:
    return trajectory.extend(trajectory.begin(path[0]), list(path[1:]))


@given(st.integers(0, 1000), st.floats(1e-6, 1.0), st.integers(2, 12), st.integers(1, 11))
def test_stored_checkpoints_are_exact_to_a_thousandth_of_a_step(seed: int, scale: float, length: int, cut: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    steps = scale * torch.randn((length, 300), generator=rng) * torch.rand((length, 1), generator=rng)
    path = torch.cumsum(torch.cat([torch.randn((1, 300), generator=rng), steps]), 0)
    whole = stored(path)
    back = trajectory.decode(whole)
    moved = (path[1:] - path[:-1]).norm(dim=1)
    assert ((back[1:] - path[1:]).norm(dim=1) <= trajectory.TOLERANCE * moved + 1e-5 * path.abs().max()).all()
    assert torch.equal(back[0], path[0])
    in_two = trajectory.extend(stored(path[: cut + 1]), list(path[cut + 1 :]))
    assert all(torch.equal(in_two[name], whole[name]) for name in whole)


def test_half_precision_halves_the_file_and_falls_back_where_it_cannot_hold() -> None:
    path = torch.cumsum(torch.randn((20, 1000)), 0)
    assert stored(path)["steps"].dtype == torch.float16
    spiked = torch.zeros((3, 4000))
    spiked[1, 0] = 1e6  # one huge coordinate, the rest would round away
    spiked[1, 1:] = 1e-3
    spiked[2] = spiked[1] + 1.0
    spiked[2, 0] += 5e4
    assert torch.allclose(trajectory.decode(stored(spiked)), spiked, rtol=1e-3, atol=1e-3)


def test_reading_a_part_of_a_trajectory_gives_its_first_checkpoints(tmp_path: Path) -> None:
    path = torch.cumsum(torch.randn((9, 50)), 0)
    write_tensors(tmp_path / "t.safetensors", stored(path))
    assert torch.equal(trajectory.read(tmp_path / "t.safetensors", 3), trajectory.decode(stored(path))[:4])


def test_another_seed_or_site_gives_another_expert(tiny: Dataset, tmp_path: Path) -> None:
    train(settings(), tiny, tmp_path / "a")
    train(replace(settings(), seed=1), tiny, tmp_path / "b")
    assert not torch.equal(load(tmp_path / "a", 0), load(tmp_path / "b", 0))
