from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedistill.errors import FedistillError
from fedistill.models.augment import OPERATIONS, Draw, augment, draw, parse_operations
from fedistill.models.enlarge import enlarge, reduce, shrink
from fedistill.models.flat import Flat, device_of
from fedistill.models.loss import groups_of
from fedistill.models.nets import MODELS, Halve, build
from fedistill.seeding import generator


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 28), (3, 32), (3, 64)])
def test_every_model_takes_every_geometry(name: str, channels: int, size: int) -> None:
    net = Flat(build(name, (channels, size, size), 5, width=8, depth=3))
    theta = net.initial(generator(0))
    x = torch.randn((2, channels, size, size), generator=generator(1))
    assert net(theta, x).shape == (2, 5)
    assert net.features(theta, x).shape[0] == 2


@pytest.mark.parametrize(("size", "depth"), [(28, 4), (64, 4), (112, 5), (128, 3)])
def test_deeper_networks_for_larger_images(size: int, depth: int) -> None:
    net = Flat(build("convnet", (1, size, size), 2, width=4, depth=depth))
    assert net.features(net.initial(generator(0)), torch.zeros((1, 1, size, size))).shape == (
        1,
        4 * (size >> depth) ** 2,
    )


@pytest.mark.parametrize("name", ["convnet", "mlp"])
@pytest.mark.parametrize("geometry", [(1, 12, 16, 16), (3, 9, 9, 9)])
def test_networks_of_volumes(name: str, geometry: tuple[int, ...]) -> None:
    net = Flat(build(name, geometry, 5, width=4, depth=2))
    theta = net.initial(generator(0)).requires_grad_(True)
    x = torch.randn((2, *geometry), generator=generator(1)).requires_grad_(True)
    assert net(theta, x).shape == (2, 5)
    (g,) = torch.autograd.grad(net(theta, x).square().sum(), theta, create_graph=True)
    (d_x,) = torch.autograd.grad(g.square().sum(), x)  # matching differentiates twice
    assert torch.isfinite(d_x).all()
    assert d_x.abs().max() > 0


def test_networks_that_do_not_fit_volumes() -> None:
    with pytest.raises(FedistillError, match="resnet18 takes images and no volumes"):
        build("resnet18", (1, 28, 28, 28), 2)
    with pytest.raises(FedistillError, match="depth=3 halves images of 6 pixels to nothing"):
        build("convnet", (1, 6, 28, 28), 2, depth=3)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 9), (2, 3, 7, 8, 5)])
def test_pooling_is_that_of_torch_to_the_second_derivative(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    theirs = F.avg_pool2d if len(shape) == 4 else F.avg_pool3d
    torch.testing.assert_close(Halve()(x), theirs(x, 2))
    curved = [
        torch.autograd.grad(pool(x).pow(3).sum(), x, create_graph=True)[0] for pool in (Halve(), lambda x: theirs(x, 2))
    ]
    torch.testing.assert_close(*curved)
    torch.testing.assert_close(*(torch.autograd.grad(first.pow(2).sum(), x)[0] for first in curved))


def test_unknown_model() -> None:
    with pytest.raises(FedistillError, match="did you mean 'convnet'"):
        build("convnets", (1, 28, 28), 2)


def test_flat_network_equals_its_module() -> None:
    module = build("convnet", (3, 28, 28), 4, width=8)
    theta = torch.cat([p.detach().flatten() for p in module.parameters()])
    x = torch.randn((3, 3, 28, 28))
    assert torch.equal(Flat(module)(theta, x), module(x))


def test_initial_parameters_have_pytorch_ranges_and_follow_the_generator() -> None:
    module = build("convnet", (3, 28, 28), 4, width=16)
    net = Flat(module)
    theta = net.initial(generator(0, "init"))
    assert torch.equal(theta, net.initial(generator(0, "init")))
    assert not torch.equal(theta, net.initial(generator(1, "init")))
    offset, bound = 0, 0.0
    for name, p in module.named_parameters():
        mine, theirs = theta[offset : offset + p.numel()], p.detach().flatten()
        offset += p.numel()
        if theirs.std() == 0:  # a normalisation layer
            assert torch.equal(mine, theirs), name
            continue
        if p.ndim > 1:  # a bias follows its weight and has the same range
            bound = p[0].numel() ** -0.5
        assert theirs.abs().max() <= bound, name
        assert mine.abs().max() <= bound, name
        if p.numel() > 100:
            assert mine.abs().max() > 0.9 * bound, name
            assert float(mine.std()) == pytest.approx(bound / 3**0.5, rel=0.1), name


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentations_are_siamese_differentiable_and_keep_the_shape(name: str, channels: int) -> None:
    x = torch.randn((2, channels, 6, 6), generator=generator(0), dtype=torch.float64).requires_grad_(True)
    for u in ((0.1, 0.9), (0.7, 0.3), (0.999, 0.0)):
        op = Draw(name, u if name != "none" else ())
        y = augment(x, op)
        assert y.shape == x.shape
        for i in range(2):  # the same parameters for every image of the batch
            assert torch.allclose(y[i : i + 1], augment(x[i : i + 1], op))
        assert torch.autograd.gradcheck(lambda t, op=op: augment(t, op), (x,))


@pytest.mark.parametrize("name", OPERATIONS)
def test_augmentations_of_volumes(name: str) -> None:
    x = torch.randn((2, 1, 4, 6, 6), generator=generator(0), dtype=torch.float64).requires_grad_(True)
    for u in ((0.1, 0.9), (0.7, 0.4)):
        op = Draw(name, u if name != "none" else ())
        y = augment(x, op)
        assert y.shape == x.shape
        assert torch.allclose(y[1:], augment(x[1:], op))
        assert torch.autograd.gradcheck(lambda t, op=op: augment(t, op), (x,))


@pytest.mark.parametrize("name", ["flip", "vflip", "rot90", "rotate", "brightness"])
def test_what_turns_a_slice_turns_every_slice_of_a_volume_alike(name: str) -> None:
    slices = torch.randn((1, 1, 3, 6, 6), generator=generator(0))
    whole = augment(slices, Draw(name, (0.3, 0.6)))
    for k in range(3):
        assert torch.allclose(whole[:, :, k], augment(slices[:, :, k], Draw(name, (0.3, 0.6))), atol=1e-5)


def test_crop_and_cutout_reach_the_depth() -> None:
    ramp = torch.arange(8.0)[:, None, None].expand(1, 1, 8, 8, 8) + 1
    assert float(augment(ramp, Draw("cutout", (0.0, 0.0)))[0, 0, :4, :4, :4].abs().sum()) == 0
    assert int((augment(ramp, Draw("cutout", (0.4, 0.9))) == 0).sum()) == 4**3
    moved = augment(ramp, Draw("crop", (0.5, 0.2)))[0, 0, :, 4, 4]  # a third of 0.7: one slice further
    assert moved.tolist() == [2, 3, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 3, 4, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_enlarged_images_hold_the_small_ones_and_straight_lines_between(shape: tuple[int, ...], scale: int) -> None:
    small = torch.randn(shape, generator=generator(0)).double()
    large = enlarge(small, scale)
    assert large.shape[2:] == tuple(side * scale for side in shape[2:])
    assert torch.equal(reduce(large, scale), small)
    want = small.numpy()
    for axis in range(2, len(shape)):  # numpy's interpolation holds the last value on, too
        at = np.arange(shape[axis] * scale) / scale
        want = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, want)
    assert np.allclose(large.numpy(), want)
    assert torch.autograd.gradcheck(lambda x: enlarge(x, scale), small.requires_grad_(True))


def test_enlarging_meets_no_overflow() -> None:
    assert torch.isfinite(enlarge(torch.tensor([[[[3e38, -3e38]]]]), 2)).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 4, 2, 6)])
def test_shrunk_images_are_means_of_blocks(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=generator(0))
    first = images[(0, 0, *[slice(0, 2)] * (len(shape) - 2))]
    assert shrink(images, 2).shape[2:] == tuple(side // 2 for side in shape[2:])
    assert float(shrink(images, 2).flatten()[0]) == pytest.approx(float(first.mean()))
    assert shrink(images, 1) is images


def test_groups() -> None:
    labels = torch.tensor([[0.2, 0.9, 0.8], [0.1, 0.4, 0.2], [1, 0, 1]])
    assert groups_of(labels, "multilabel").tolist() == [1, 3, 0]
    assert groups_of(labels, "ordinal").tolist() == [1, 1, 0]


def test_draws_follow_the_generator_and_the_whitelist() -> None:
    names = ("scale", "crop", "brightness")
    one, two = ([draw(names, rng) for _ in range(50)] for rng in (generator(0), generator(0)))
    assert one == two
    assert {op.name for op in one} == set(names)
    assert draw((), generator(0)) == Draw("none")


def test_operations_of_a_list() -> None:
    assert parse_operations("crop, flip") == ("crop", "flip")
    assert parse_operations("none") == ()
    with pytest.raises(FedistillError, match="did you mean 'rotate'"):
        parse_operations("rotat")


def test_missing_device_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(FedistillError, match="device=cuda is not available"):
        device_of("cuda")
