"""A site's rounds of federated averaging: what is trained, what is refused, and what is paid for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.public import normalise
from fedistill.errors import FedistillError
from fedistill.experts.train import sgd
from fedistill.models.loss import targets_of
from fedistill.privacy.accounting import epsilon_of
from fedistill.privacy.dpsgd import per_image_loss
from fedistill.privacy.ledger import Cap, Ledger
from fedistill.privacy.plan import Plan, plan_of_steps
from fedistill.seeding import generator
from fedistill.site import average
from fedistill.site.average import Local, name_of, train_round
from fedistill.site.describe import task_of
from fedistill.site.job import ledger_file

NAME = name_of("mlp", 0.1, 0)


def settings(**more: Any) -> Config:
    tiny = {"width": 4, "expert_batch": 16, "eval_models": "mlp", "fl_rounds": 2, "fl_steps": 3, "workers": 1}
    return make_config(tiny | more).resolved()


def private(**more: Any) -> Config:
    return settings(**{"privacy": "dp", "epsilon": 5.0, "method": "sketch"} | more)


def start(config: Config, data: Dataset) -> torch.Tensor:
    return task_of(data).network("mlp", config).initial(generator(0, "test"))


def one(config: Config, data: Dataset, work: Path, round: int = 1, name: str = NAME, **more: Any) -> Local:
    thetas = more.pop("thetas", {name: start(config, data)})
    return train_round(config, data, "north", work, round=round, thetas=thetas, **more)


def entries(work: Path) -> list[Any]:
    path = ledger_file(work, "north")
    return Ledger(path).entries() if path.exists() else []


def test_the_proximal_term_pulls_towards_the_global_parameters(tiny: Dataset, tmp_path: Path) -> None:
    """Beside plain SGD on loss + mu/2 |theta - theta_global|^2, differentiated by autograd, over the same batches."""
    config, mu, rate = settings(fl_steps=3), 0.7, 0.1
    task, begin = task_of(tiny), start(config, tiny)
    got = one(config, tiny, tmp_path, mu=mu).thetas[NAME]
    net, theta = task.network("mlp", config), begin
    plain = sgd(config, task, net, tiny.train, rate, generator(0, "average", "north", NAME, 1))
    for _ in range(3):
        leaf = theta.clone().requires_grad_(True)
        (pull,) = torch.autograd.grad(mu / 2 * (leaf - begin).square().sum(), leaf)
        theta = plain(theta) - rate * pull
    torch.testing.assert_close(got, theta)
    assert (got - begin).norm() < (one(config, tiny, tmp_path).thetas[NAME] - begin).norm()


def test_every_network_is_trained_at_its_rate_and_anew_in_each_round(tiny: Dataset, tmp_path: Path) -> None:
    config = settings()
    theta = start(config, tiny)
    names = [name_of("mlp", rate, 0) for rate in (0.1, 1e-6)]
    both = one(config, tiny, tmp_path, thetas=dict.fromkeys(names, theta))
    fast, slow = ((both.thetas[name] - theta).norm() for name in names)
    assert fast > 1000 * slow > 0
    assert both.records == len(tiny.train)
    assert torch.equal(one(config, tiny, tmp_path).thetas[NAME], both.thetas[NAME])
    assert not torch.equal(one(config, tiny, tmp_path, round=2).thetas[NAME], both.thetas[NAME])


@pytest.mark.parametrize("config", [settings(), private()], ids=["plain", "private"])
def test_what_does_not_fit_is_refused_before_anything_is_spent(config: Config, tiny: Dataset, tmp_path: Path) -> None:
    theta = start(config, tiny)
    for thetas in (
        {NAME: theta[1:]},
        {NAME: theta / 0},
        {NAME: theta.double()},
        {"mlp@0.1": theta},
        {"mlp@nan@0": theta},
    ):
        with pytest.raises(FedistillError, check=lambda e: e.code == "bad-model"):
            one(config, tiny, tmp_path, thetas=thetas)
    for round in (0, 3):
        with pytest.raises(FedistillError, match=f"no round {round}: fl_rounds=2"):
            one(config, tiny, tmp_path, round=round)
    assert entries(tmp_path) == []


def test_all_rounds_are_paid_once_and_ahead(tiny: Dataset, tmp_path: Path) -> None:
    config = private()
    first, again = one(config, tiny, tmp_path), one(config, tiny, tmp_path)
    assert torch.equal(first.thetas[NAME], again.thetas[NAME])
    assert first.records == len(tiny.train)
    one(config, tiny, tmp_path, round=2)
    (entry,) = entries(tmp_path)
    steps = {m.name: (m.steps, m.sample_rate) for m in entry.mechanisms}
    assert steps == {"counts": (1, 1.0), "dp-sgd": (2 * 3, config.sample_rate)}
    plan = plan_of_steps(config, len(tiny.train), 2 * 3)
    spent = epsilon_of(entry.mechanisms, entry.delta)
    assert spent == plan.first
    assert 0.9 * config.epsilon < spent.epsilon <= config.epsilon
    one(config, tiny, tmp_path, run="another federation")
    assert len(entries(tmp_path)) == 2


def test_a_round_is_not_answered_for_other_parameters(tiny: Dataset, tmp_path: Path) -> None:
    config = private()
    one(config, tiny, tmp_path)
    for thetas in ({NAME: start(config, tiny) + 1}, {name_of("mlp", 0.2, 0): start(config, tiny)}):
        with pytest.raises(FedistillError, match="Round 1 was answered before, for other parameters"):
            one(config, tiny, tmp_path, thetas=thetas)
    with pytest.raises(FedistillError, match="pays for one network, and the server sent 2"):
        one(config, tiny, tmp_path, round=2, thetas=dict.fromkeys([NAME, name_of("mlp", 0.1, 1)], start(config, tiny)))


def test_two_that_ask_at_once_get_one_answer(tiny: Dataset, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: one(private(), tiny, tmp_path).thetas[NAME], range(2))
    assert torch.equal(first, second)


def test_a_cap_holds(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, check=lambda e: e.code == "over-budget"):
        one(private(), tiny, tmp_path, cap=Cap(epsilon=1.0, delta=1e-3))
    assert not list(tmp_path.rglob("*.safetensors"))


def unprotected(config: Config, records: int, steps: int) -> Plan:
    """A plan with next to no noise and a clip that never bites."""
    plan = plan_of_steps(config, records, steps)
    counts, sgd = plan.mechanisms
    quiet = replace(counts, noise_multiplier=1e-9), replace(sgd, noise_multiplier=1e-15, clip_norm=1e6)
    return replace(plan, mechanisms=quiet)


def test_without_noise_and_clip_a_private_round_is_gradient_descent(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average, "plan_of_steps", unprotected)
    config = private(sample_rate=1.0, augment="none", class_weights=False)
    theta, task = start(config, tiny), task_of(tiny)
    net = task.network("mlp", config)
    x, y = normalise(tiny.train.images, tiny.modality), targets_of(tiny.train.labels, tiny.classes, tiny.kind)
    want = theta
    for _ in range(config.fl_steps):
        want = want.detach().requires_grad_(True)
        loss = per_image_loss(tiny.kind, net(want, x), y, torch.ones(tiny.classes)).mean()
        want = want - 0.1 * torch.autograd.grad(loss, want)[0]
    found = one(config, tiny, tmp_path).thetas[NAME]
    assert (found - want).norm() < 1e-4 * (want - theta).norm()


def test_parameters_that_overflow_on_a_record_reveal_nothing_by_it(tiny: Dataset, tmp_path: Path) -> None:
    """A server could send them on purpose: an answer that is not finite would say who was drawn."""
    config = private()
    thetas = {NAME: torch.full_like(start(config, tiny), 1e38)}
    assert torch.isfinite(one(config, tiny, tmp_path, thetas=thetas).thetas[NAME]).all()
