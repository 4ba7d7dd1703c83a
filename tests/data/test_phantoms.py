from __future__ import annotations

import time

import pytest
import torch

from fedistill.config import Config
from fedistill.data.phantoms import CLASSES, phantom_data, phantom_images
from fedistill.errors import FedistillError


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks and pictures: more threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_same_seed_same_bits_whatever_the_threads():
    one = phantom_data(Config(phantom_images=100, seed=3)).fingerprint
    torch.set_num_threads(2)
    two = phantom_data(Config(phantom_images=100, seed=3)).fingerprint
    assert one == two
    assert one != phantom_data(Config(phantom_images=100, seed=4)).fingerprint


@pytest.mark.parametrize(("classes", "channels", "size"), [(2, 1, 16), (4, 3, 28), (6, 1, 33), (6, 3, 64)])
def test_sizes_classes_and_scanners(classes, channels, size):
    config = Config(phantom_images=100, phantom_classes=classes, phantom_channels=channels, phantom_size=size)
    data = phantom_data(config)
    assert data.geometry == (channels, size, size)
    assert data.class_names == CLASSES[:classes]
    assert [len(split) for split in data.splits.values()] == [100, 25, 50]
    for split in data.splits.values():
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == split.site.dtype == torch.int64
        assert split.labels.unique().tolist() == list(range(classes))
        assert split.site.unique().tolist() == [0, 1, 2]
    assert data.train.images.float().flatten(1).std(1).min() > 8  # no blank picture


def test_class_mix_differs_mildly_between_scanners():
    data = phantom_data(Config(phantom_images=900))
    for site in range(3):
        share = (
            torch.bincount(data.train.labels[data.train.site == site], minlength=4) / (data.train.site == site).sum()
        )
        assert 0.1 < share.min() < 0.2
        assert 0.3 < share.max() < 0.4


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    phantom_data(Config(phantom_images=40))
    assert torch.equal(state, torch.get_rng_state())


def test_two_thousand_images_take_less_than_two_seconds():
    start = time.perf_counter()
    phantom_images(2000, 1, 28, torch.Generator().manual_seed(0), 4)
    assert time.perf_counter() - start < 2


def test_public_phantoms_are_balanced_floats():
    images, labels = phantom_images(50, 3, 32, torch.Generator().manual_seed(0), 5)
    assert images.shape == (50, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert torch.bincount(labels).tolist() == [10] * 5


def test_phantoms_with_several_lesions():
    config = Config(phantom_images=400, task="multilabel", seed=1)
    data = phantom_data(config)
    assert (data.kind, data.class_names, data.geometry) == ("multilabel", CLASSES[:4], (1, 28, 28))
    assert data.fingerprint == phantom_data(config).fingerprint
    shown = torch.bincount(data.train.labels.sum(1))
    assert len(shown) == 4  # 0 to 3
    assert shown.min() > 30
    assert 80 < min(data.train.counts(4)) <= max(data.train.counts(4)) < 200
    two = phantom_data(Config(phantom_images=100, phantom_classes=2, task="multilabel"))
    assert two.train.labels.sum(1).max() == 2


def test_every_lesion_leaves_its_mark():
    """Images with more lesions depart further from tissue: the labels are what was drawn."""
    data = phantom_data(Config(phantom_images=600, task="multilabel"))
    middle = data.train.images[:, 0, 7:21, 7:21].float()
    spread = middle.flatten(1).std(1)
    by_count = [spread[data.train.labels.sum(1) == k].mean() for k in range(4)]
    assert by_count == sorted(by_count)


def test_grades_are_sizes():
    data = phantom_data(Config(phantom_images=400, phantom_classes=5, task="ordinal"))
    assert (data.kind, data.class_names[4], data.train.labels.shape) == ("ordinal", "grade 4", (400,))
    middle = data.train.images[:, 0, 7:21, 7:21].float()
    away = (middle - middle.median(2, keepdim=True).values.median(1, keepdim=True).values).abs().flatten(1).mean(1)
    by_grade = [away[data.train.labels == k].mean() for k in range(5)]
    assert by_grade == sorted(by_grade)


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "ordinal"])
def test_volumes(task):
    config = Config(phantom_images=40, phantom_depth=12, phantom_size=16, phantom_channels=3, task=task)
    data = phantom_data(config)
    assert data.geometry == (3, 12, 16, 16)
    assert data.fingerprint == phantom_data(config).fingerprint
    slices = data.train.images.float().mean((0, 1, 3, 4))
    assert slices[5] > slices[0] + 20  # the body ends within the volume
    assert data.train.images.float().flatten(1).std(1).min() > 8


def test_no_phantoms_give_an_empty_batch():
    images, labels = phantom_images(0, 1, 28, torch.Generator(), 2)
    assert images.shape == (0, 1, 28, 28)
    assert len(labels) == 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"phantom_classes": 7}, "choose 2 to 6"),
        ({"phantom_channels": 2}, "1 \\(grey\\) or 3"),
        ({"phantom_images": 31}, "at least 32"),
    ],
)
def test_impossible_phantoms(values, text):
    with pytest.raises(FedistillError, match=text):
        phantom_data(Config(**values))


def _accuracy(model, data, steps, rate, momentum):
    from fedistill.data.public import normalise

    x, y = normalise(data.train.images, "phantom"), data.train.labels
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
    with torch.no_grad():
        return (model(normalise(data.test.images, "phantom")).argmax(1) == data.test.labels).float().mean().item()


def test_a_small_convnet_learns_what_a_linear_model_cannot():
    data = phantom_data(Config(phantom_images=600))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks, channels = [], 1
        for _ in range(3):
            blocks += [torch.nn.Conv2d(channels, 32, 3, padding=1), torch.nn.GroupNorm(32, 32)]
            blocks += [torch.nn.ReLU(), torch.nn.AvgPool2d(2)]
            channels = 32
        convnet = torch.nn.Sequential(*blocks, torch.nn.Flatten(), torch.nn.Linear(32 * 9, 4))
        linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 4))
        assert 0.7 < _accuracy(convnet, data, 200, 0.03, 0.9) < 0.97
        assert _accuracy(linear, data, 300, 0.003, 0.9) < 0.5


def test_more_than_fits_into_memory_is_refused_before_it_is_taken():
    config = Config(phantom_images=500_000, phantom_size=1024, phantom_depth=64)
    with pytest.raises(FedistillError, match=r"phantom_images=500000 of this size .* make them fewer or smaller"):
        phantom_data(config)
