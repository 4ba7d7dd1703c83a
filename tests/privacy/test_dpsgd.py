"""DP-SGD against plain SGD and one-by-one gradients, its noise and its sampling against what the accountant assumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from joblib import Parallel, delayed
from private import gaussian, labelled, norm, settings
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.data.public import normalise
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.experts.train import load_trajectory, steps_done
from fedistill.models.augment import OPERATIONS
from fedistill.models.loss import loss_of, targets_of
from fedistill.privacy import dpsgd, noise
from fedistill.privacy.accounting import Mechanism
from fedistill.privacy.dpsgd import PrivateSGD, per_image_loss, records_by_unit, sample, train_private_experts
from fedistill.privacy.noise import noisy, secret_generator
from fedistill.seeding import generator
from fedistill.site.describe import task_of


def started(
    data: Dataset,
    mechanism: Mechanism,
    config: Config | None = None,
    model: str = "convnet",
    weights: Tensor | None = None,
) -> PrivateSGD:
    config, task = config or settings(), task_of(data)
    theta = task.network(model, config).initial(generator(0, "start"))
    return PrivateSGD(config, task, model, theta, mechanism, data.train, torch.ones(3) if weights is None else weights)


def drawn(monkeypatch: pytest.MonkeyPatch, *batches: list[int]) -> None:
    """The next steps take these images."""
    todo = [torch.tensor(b, dtype=torch.int64) for b in batches]
    monkeypatch.setattr(dpsgd, "sample", lambda *_: todo.pop(0))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "ordinal"])
def test_without_noise_and_clipping_it_is_sgd(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the very batches that were drawn: the sum of the losses over the expected size of a batch."""
    data, config, taken = labelled(kind=kind), settings(), []
    monkeypatch.setattr(dpsgd, "sample", lambda *a: taken.append(sample(*a)) or taken[-1])
    weights = torch.tensor([0.5, 1.0, 3.0])
    sgd = started(data, gaussian(), weights=weights)
    theta, net = sgd.theta(), task_of(data).network("convnet", config)
    for _ in range(4):
        sgd.step()
    targets = targets_of(data.train.labels, 3, kind)
    for index in taken:
        theta.requires_grad_(True)
        logits = net(theta, normalise(data.train.images[index], "generic"))
        (g,) = torch.autograd.grad(per_image_loss(kind, logits, targets[index], weights).sum(), theta)
        theta = theta.detach() - config.dp_lr / (0.5 * 40) * g
    assert len({len(i) for i in taken}) > 1
    assert norm(sgd.theta() - theta) < 1e-3 * norm(theta - started(data, gaussian()).theta())


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_the_loss_of_an_image_is_the_usual_one(kind: str) -> None:
    logits, labels = torch.randn(6, 3), torch.randint(2, (6, 3)) if kind == "multilabel" else torch.randint(3, (6,))
    targets = targets_of(labels, 3, kind)
    each = per_image_loss(kind, logits, targets, torch.ones(3))
    assert float(each.mean()) == pytest.approx(float(loss_of(kind, logits, targets)), rel=1e-5)


@pytest.mark.parametrize("model", ["convnet", "mlp"])
@pytest.mark.parametrize(("channels", "kind"), [(1, "multiclass"), (3, "multiclass"), (3, "multilabel")])
def test_gradients_of_images_are_those_of_images_alone(model: str, channels: int, kind: str) -> None:
    data = labelled(8, kind, channels)
    sgd = started(data, gaussian(rate=1.0), model=model)
    found: list[Tensor] = []

    def take() -> None:
        found.append(torch.cat([p.grad_sample.flatten(1) for p in sgd._net.parameters()], 1))

    sgd._optimizer.step = take
    sgd.step()
    net, targets = task_of(data).network(model, settings()), targets_of(data.train.labels, 3, kind)
    for i in range(8):
        theta = sgd.theta().requires_grad_(True)
        logits = net(theta, normalise(data.train.images[i : i + 1], "generic"))
        (alone,) = torch.autograd.grad(loss_of(kind, logits, targets[i : i + 1]), theta)
        assert norm(found[0][i] - alone) < 1e-4 * norm(alone)


@pytest.mark.parametrize("weight", [1.0, 1e6])
def test_one_record_moves_a_step_by_at_most_its_share(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data, clip = labelled(), 0.01
    drawn(monkeypatch, [0, 1, 2, 3], [0, 1, 2])
    one, other = (started(data, gaussian(clip=clip), weights=weight * torch.ones(3)) for _ in range(2))
    one.step()
    other.step()
    most = settings().dp_lr * clip / (0.5 * 40)
    assert 0.99 * most < norm(one.theta() - other.theta()) < 1.001 * most


def test_a_step_without_anybody_is_noise_of_the_right_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """2/3 or 3/2 of it would be found; so would a distribution that is not Gaussian."""
    drawn(monkeypatch, [], [])
    sgd = started(labelled(), gaussian(noise=1.7, clip=0.3), settings(width=8))
    before = sgd.theta()
    sgd.step()
    moved = (sgd.theta() - before) / (0.5 * 1.7 * 0.3 / (0.5 * 40))
    assert len(moved) > 1000
    assert float(moved.std()) == pytest.approx(1, abs=0.15)
    assert float(moved.mean()) == pytest.approx(0, abs=0.2)
    assert float(moved.pow(4).mean() / moved.square().mean() ** 2) == pytest.approx(3, abs=0.7)
    sgd.step()
    second = sgd.theta() - before - moved * (0.5 * 1.7 * 0.3 / 20)
    assert float(torch.corrcoef(torch.stack([moved, second]))[0, 1].abs()) < 0.2


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "none"])
def test_a_step_without_anybody_augments_nobody(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a site of 18 images one step in fifty draws nobody, and some operations cannot be done on no image."""
    drawn(monkeypatch, [])
    sgd = started(labelled(), gaussian(noise=1.0), settings(augment=operation))
    before = sgd.theta()
    sgd.step()
    assert norm(sgd.theta() - before) > 0


def test_noise_is_added_once_however_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "CHUNK", 2)
    drawn(monkeypatch, list(range(40)), list(range(40)))
    a, b = (started(labelled(), gaussian(noise=1.0, clip=10.0)) for _ in range(2))
    a.step()
    b.step()
    assert float((a.theta() - b.theta()).std() / (0.5 * 10 / 20)) == pytest.approx(2**0.5, rel=0.3)


def test_chunks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1, 7, 64):
        monkeypatch.setattr(dpsgd, "CHUNK", chunk)
        drawn(monkeypatch, list(range(20)), [], [3])
        sgd = started(labelled(), gaussian(clip=0.05))
        for _ in range(3):
            sgd.step()
        found.append(sgd.theta())
    start = started(labelled(), gaussian()).theta()
    assert norm(found[0] - start) > 0
    assert norm(found[0] - found[2]) < 1e-4 * norm(found[2] - start)
    assert norm(found[1] - found[2]) < 1e-4 * norm(found[2] - start)


def test_sampling_is_poisson() -> None:
    n, rate, draws = 50, 0.2, 4000
    secret, seen = secret_generator(), torch.zeros(4000, 50)
    for k in range(draws):
        seen[k, sample(Records.of_images(n), rate, secret)] = 1
    error = (rate * (1 - rate) / draws) ** 0.5
    assert (seen.mean(0) - rate).abs().max() < 5 * error
    assert torch.cov(seen.T).fill_diagonal_(0).abs().max() < 6 * error * (rate * (1 - rate)) ** 0.5
    size = seen.sum(1)
    assert float(size.var()) == pytest.approx(n * rate * (1 - rate), rel=0.15)  # a fixed size would have none
    assert (seen[1:] * seen[:-1]).mean() == pytest.approx(rate**2, abs=0.005)  # steps do not know of each other
    assert len(sample(Records.of_images(n), 1.0, secret)) == n


def test_a_patient_takes_part_with_one_image_however_many_there_are() -> None:
    data = labelled(60).train
    patient = torch.cat([torch.zeros(50), torch.arange(1, 11)]).long()
    records = records_by_unit(type(data)(data.images, data.labels, data.site, patient), "patient")
    assert len(records) == 11
    secret, many, seen = secret_generator(), 0, torch.zeros(60)
    for _ in range(3000):
        index = sample(records, 0.3, secret)
        assert len(patient[index].unique()) == len(index)
        many += int((index < 50).sum())
        seen[index] += 1
    assert many / 3000 == pytest.approx(0.3, abs=0.045)
    assert (seen[50:] / 3000 - 0.3).abs().max() < 0.045
    assert (seen[:50] > 0).all()
    assert seen[:50].max() < 3 * seen[:50].mean()


def test_patients_who_are_not_named_are_asked_for() -> None:
    with pytest.raises(FedistillError, match="manifest with a patient column"):
        records_by_unit(labelled().train, "patient")


def test_records_share_their_weight_and_are_found_fast() -> None:
    patient = torch.randint(30_000, (100_000,))
    records = Records.of_patients(patient)
    share = torch.zeros(len(records), dtype=torch.float64).index_add_(0, records.of_image, records.share)
    assert torch.allclose(share, torch.ones_like(share))
    everyone = torch.arange(len(records))
    for u in (0.0, 1 - 2**-53):
        chosen = records.one_each(everyone, torch.full((len(records),), u, dtype=torch.float64))
        assert torch.equal(records.of_image[chosen], everyone)


def train(config: Config, folder: Path, until: float = float("inf"), steps: int = 40, data: Dataset | None = None):
    data = data or labelled()
    mechanism = gaussian(noise=1.0, clip=1.0, rate=0.2, steps=steps)
    return train_private_experts(
        config, task_of(data), data.train, folder, mechanism=mechanism, weights=torch.ones(3), until=until
    )


def test_experts_share_their_start_and_nothing_else(tmp_path: Path) -> None:
    config = settings(experts=2)
    assert train(config, tmp_path) == (40, 40)
    one, two = (load_trajectory(tmp_path, e, 4) for e in range(2))
    public = task_of(labelled()).network("convnet", config).initial(generator(0, "private-start", "convnet"))
    assert torch.equal(one[0], public)
    assert torch.equal(two[0], public)
    ways = torch.stack([one[1:] - one[:-1], two[1:] - two[:-1]]).flatten(0, 1)
    assert (ways.norm(dim=1) > 0).all()
    assert (torch.corrcoef(ways) - torch.eye(8)).abs().max() < 0.3  # mostly noise, and never the same


def test_slices_end_after_the_same_number_of_steps(tmp_path: Path) -> None:
    done = [train(settings(experts=2), tmp_path, until=0.0) for _ in range(4)]
    assert done == [(10, 40), (20, 40), (30, 40), (40, 40)]
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert train(settings(experts=2), tmp_path, until=0.0) == (40, 40)
    assert files == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_training_stops_where_the_plan_ends(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="allows 39 steps and 40 are asked for"):
        train(settings(experts=2), tmp_path, steps=39)
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_leaves_no_noisy_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings(), tmp_path, until=0.0)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = PrivateSGD.step, []

    def step(self: PrivateSGD) -> None:
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(PrivateSGD, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(settings(), tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert steps_done(tmp_path, 0) == 5


def test_what_is_secret_is_not_the_seed(tmp_path: Path) -> None:
    for name in "ab":
        train(settings(), tmp_path / name)
    a, b = (load_trajectory(tmp_path / name, 0, 4) for name in "ab")
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


def test_nobody_knows_who_takes_part_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accountant counts on it: with coins that are known, each step costs what it costs without sampling."""
    taken: list[list[int]] = []
    monkeypatch.setattr(dpsgd, "sample", lambda *a: taken.append(sample(*a).tolist()) or torch.tensor(taken[-1]))
    for _ in range(2):
        torch.manual_seed(0)  # the global generator, which others may set, decides nothing
        sgd = started(labelled(), gaussian())
        for _ in range(4):
            sgd.step()
    assert len({tuple(index) for index in taken}) == 8  # of 2**40, each as likely as the other


def test_the_noise_of_a_step_is_half_the_sum_of_four_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus' secure mode: one draw that is thrown away, then four, whose gaps between floating-point numbers do not line up."""
    drawn(monkeypatch, [])
    sgd = started(labelled(), gaussian(noise=1.7, clip=0.3))
    before, real, draws = sgd.theta(), torch.normal, []
    monkeypatch.setattr(torch, "normal", lambda *a, **k: draws.append(real(*a, **k)) or draws[-1])
    sgd.step()
    shapes = [p.shape for p in sgd._net.parameters()]
    assert [d.shape for d in draws] == [shape for own in shapes for shape in ((1, 1), own, own, own, own)]
    noise = torch.cat([sum(draws[k + 1 : k + 5]).flatten() / 2 for k in range(0, len(draws), 5)])
    torch.testing.assert_close(sgd.theta() - before, -settings().dp_lr / (0.5 * 40) * noise, rtol=1e-3, atol=1e-6)


def test_a_generator_holds_more_than_a_seed_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own `manual_seed` on the CPU keeps 32 bits: whoever tries them all can subtract the noise."""
    words = iter(range(10_000, 11_000))
    monkeypatch.setattr(noise.secrets, "randbits", lambda bits: next(words))
    a = secret_generator()
    assert a.get_state()[24 : 24 + 8 * 624].view(torch.int64).tolist() == list(range(10_000, 10_624))
    b = torch.Generator()
    state = a.get_state()
    state[24 + 8 * 300] ^= 1
    b.set_state(state)
    assert not torch.equal(torch.randn(2000, generator=a), torch.randn(2000, generator=b))


def _a_few() -> list[float]:
    return torch.randn(4, generator=secret_generator()).tolist()


def test_processes_have_secrets_of_their_own() -> None:
    found = Parallel(n_jobs=2, backend="loky")(delayed(_a_few)() for _ in range(4))
    assert len({x for few in found for x in few}) == 16


def test_noise_of_sums_has_the_right_size() -> None:
    mechanism = Mechanism(name="sketch", sample_rate=1.0, noise_multiplier=2.0, steps=1, clip_norm=0.7)
    sums = torch.arange(40_000.0).view(100, 400)
    a, b = (noisy(sums, mechanism) - sums for _ in range(2))
    for x in (a, b):
        assert float(x.std() / 1.4) == pytest.approx(1, abs=0.03)
        assert float(x.pow(4).mean() / x.square().mean() ** 2) == pytest.approx(3, abs=0.2)
    assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs()) < 0.03
