"""Schedules, masks, the objective, overlap: the parts that methods are made of."""

from __future__ import annotations

import pytest
import torch

from fedistill.config import make_config
from fedistill.errors import FedistillError
from fedistill.matching.objective import MASKS, keep_easy, mismatch, shape_difference
from fedistill.matching.overlap import mitigate, overlap_limit, similarity
from fedistill.matching.schedule import Reach
from fedistill.matching.trajectory import looks_at_overlap, on_line
from fedistill.methods.registry import METHODS, method_of
from fedistill.models.flat import Flat
from fedistill.models.nets import build
from fedistill.seeding import generator


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.schedule])
def test_every_schedule_stays_within_reach_and_uses_it(name: str) -> None:
    reach, rng, total = Reach(length=3, end=10), generator(1), 400
    segments = [METHODS[name].schedule(k, total, reach, rng) for k in range(total)]
    assert all(0 <= s.start < s.stop <= reach.end + reach.length for s in segments)
    assert max(s.stop for s in segments) > reach.end + reach.length - 0.5
    assert min(s.start for s in segments) < 0.5


def test_progressive_matching_keeps_its_start_and_extends_its_end() -> None:
    segments = [METHODS["ptm"].schedule(k, 100, Reach(2, 20), generator(0)) for k in range(100)]
    assert {s.start for s in segments} == {0}
    stops = [s.stop for s in segments]
    assert stops == sorted(stops)
    assert stops[0] == 2
    assert stops[-1] == 22


def test_growing_window_opens_with_time() -> None:
    rng, reach = generator(0), Reach(2, 20)
    early = [METHODS["datm"].schedule(0, 1000, reach, rng).start for _ in range(200)]
    late = [METHODS["datm"].schedule(900, 1000, reach, rng).start for _ in range(200)]
    assert max(early) <= 6
    assert max(late) == 20


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(FedistillError, match="did you mean 'datm'"):
        method_of(make_config({"method": "datn"}))


def test_settings_override_the_method() -> None:
    method = method_of(make_config({"method": "mtt", "labels": "soft", "mask": "prune", "overlap": "on"}))
    assert (method.soft_labels, method.mask, method.overlap) == (True, "prune", True)


def test_mismatch_is_one_at_the_start_and_zero_at_the_target() -> None:
    start, target = torch.randn(50), torch.randn(50)
    every = torch.ones(50)
    assert float(mismatch(start, start, target, every)) == pytest.approx(1)
    assert float(mismatch(target, start, target, every)) == 0


def test_a_segment_without_length_is_an_error() -> None:
    theta = torch.randn(50)
    with pytest.raises(FedistillError, match="has no length"):
        mismatch(theta + 1, theta, theta, torch.ones(50))


def test_pruning_keeps_the_parameters_that_match_best() -> None:
    start, target = torch.ones(100), torch.zeros(100)
    theta = torch.arange(100.0)
    assert keep_easy(theta, start, target, keep=0.3, progress=0.0).nonzero().flatten().tolist() == list(range(30))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_never_empty(name: str) -> None:
    mask = MASKS[name](*torch.randn(3, 500), keep=0.0001, progress=0.0)
    assert mask.sum() >= 5


def _net() -> tuple[Flat, list[torch.Tensor]]:
    net = Flat(build("convnet", (1, 16, 16), 2, width=8, depth=2))
    return net, [net.initial(generator(e)) for e in range(3)]


def test_overlapping_images_are_replaced_and_different_ones_are_not() -> None:
    net, thetas = _net()
    rng = generator(0, "overlap")
    images = torch.randn((8, 1, 16, 16), generator=rng)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    limit = float(similarity(net, thetas, images).max()) + 1e-4
    images[1] = images[0]  # the same lesson twice
    strength = torch.tensor([1.0, 0.5, 1, 1, 1, 1, 1, 1])

    def fresh(n: int, c: int) -> torch.Tensor:
        return torch.randn((n, 1, 16, 16), generator=rng)

    replaced = mitigate(net, thetas, images, labels, strength, [limit, limit], fresh)
    assert [i for i, _ in replaced] == [1]  # of the pair, the one with the weaker gradient
    images[1] = replaced[0][1]
    assert mitigate(net, thetas, images, labels, strength, [limit, limit], fresh) == []


def test_overlap_has_nothing_to_do_with_one_image_per_class() -> None:
    net, thetas = _net()
    images = torch.zeros((2, 1, 16, 16))
    assert mitigate(net, thetas, images, torch.tensor([0, 1]), torch.ones(2), [-1.0, -1.0], lambda n, c: images) == []


def test_overlap_limit_of_real_images() -> None:
    net, thetas = _net()
    images = torch.randn((20, 1, 16, 16), generator=generator(3))
    assert -1 < overlap_limit(net, thetas, images) <= 1.0
    assert overlap_limit(net, thetas, images[:2]) == 2.0  # too few to compare: never replace


def test_a_growing_mask_ends_with_every_parameter_and_latches_none() -> None:
    start, target = torch.zeros(100), torch.zeros(100)
    theta = torch.arange(1, 101.0)
    kept = [int(MASKS["grow"](theta, start, target, keep=0.2, progress=p).sum()) for p in (0.0, 0.25, 0.5, 1.0)]
    assert kept == [20, 60, 100, 100]
    flipped = MASKS["grow"](theta.flip(0), start, target, keep=0.2, progress=0.0)
    assert flipped.nonzero().flatten().tolist() == list(range(80, 100))


def test_dropping_the_easy_keeps_the_largest_errors() -> None:
    mask = MASKS["drop-easy"](torch.arange(10.0), torch.zeros(10), torch.zeros(10), keep=0.3, progress=0.0)
    assert mask.nonzero().flatten().tolist() == [7, 8, 9]


def test_the_shape_of_a_path_has_no_place_size_or_direction() -> None:
    path = tuple(torch.randn((3, 40)).double())
    moved = tuple(3.0 * p.flip(0) + 1.0 for p in path)
    assert float(shape_difference(path, moved)) == pytest.approx(0, abs=1e-12)
    bent = (path[0], path[1] + torch.randn(40), path[2])
    assert float(shape_difference(path, bent)) > 1e-3


def test_a_line_runs_from_first_to_last_at_the_pace_of_each_layer() -> None:
    path = torch.zeros((3, 4))
    path[1], path[2] = torch.tensor([1.0, 0, 3, 4]), torch.tensor([2.0, 0, 3, 4])
    assert torch.equal(on_line(path, 0, [2, 2]), path[0])
    assert torch.equal(on_line(path, 2, [2, 2]), path[2])
    # at t = 1 the first layer has gone half of its way, the second all of it
    assert torch.allclose(on_line(path, 1, [2, 2]), torch.tensor([1.0, 0, 3, 4]))
    assert torch.allclose(on_line(path, 0.5, [2, 2]), torch.tensor([0.5, 0, 1.5, 2]))


def test_overlap_is_looked_at_evenly_and_leaves_new_images_time() -> None:
    assert [k for k in range(250) if looks_at_overlap(k, 250)] == [25, 50, 75, 100, 125, 150, 175, 200]
    assert [k for k in range(5) if looks_at_overlap(k, 5)] == [1, 2, 3, 4]
