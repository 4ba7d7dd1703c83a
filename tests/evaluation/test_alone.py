"""One-shot arms: what the server makes of one network per site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedistill.api import distill_site
from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.alone import evaluate_alone
from fedistill.evaluation.comparators import COMPARATORS, arm_of, comparators
from fedistill.evaluation.distilled import distil_centrally, distil_path
from fedistill.evaluation.fit import fit, of_split, predict
from fedistill.evaluation.metrics import score
from fedistill.experts.train import sgd
from fedistill.models.loss import loss_of
from fedistill.seeding import generator
from fedistill.site.average import Local, train_alone
from fedistill.site.describe import task_of
from fedistill.site.job import Progress
from fedistill.synthetic.merge import merge

ARMS = ["ensemble", "one-shot", "ensemble-distilled"]


def settings(**more: Any) -> Config:
    tiny = {
        "partition": "iid", "sites": 2, "width": 4, "eval_models": "mlp", "workers": 1, "eval_nets": 1, "eval_steps": 20,
        "iterations": 10,
    }  # fmt: skip
    return make_config(tiny | more).resolved()


def sites_of(config: Config, data: Dataset) -> list[Dataset]:
    parts = partition(data, config)
    return [parts.at(data, place) for place in range(len(parts))]


def test_the_arms_are_the_networks_that_the_sites_train_by_themselves(tiny: Dataset, tmp_path: Path) -> None:
    config, asked = settings(), []
    sites, task = sites_of(config, tiny), task_of(tiny)

    def ask(names: list[str]) -> dict[str, Local]:
        asked.append(names)
        return {s.name: train_alone(config, s, s.name, tmp_path, names=names) for s in reversed(sites)}

    figures = evaluate_alone(config, tiny, "mlp", ask, tmp_path / "a", ARMS)
    assert set(figures) == set(ARMS)
    net = task.network("mlp", config)
    assert {f["upload_bytes"] for f in figures.values()} == {2 * 4 * net.size}
    assert len(asked) == 1  # every arm is made of the same networks
    rate = figures["ensemble"]["learning_rate"][0]
    trained = [fit(config, task, "mlp", of_split(s.train, task), lr=rate, seed=0) for s in sites]
    answers = sum(predict(net, theta, tiny.test.images, task) for theta in trained) / 2
    assert figures["ensemble"]["auc"]["mean"] == pytest.approx(score(answers, tiny.test.labels)["auc"])
    rate = figures["one-shot"]["learning_rate"][0]
    trained = [fit(config, task, "mlp", of_split(s.train, task), lr=rate, seed=0) for s in sites]
    mean = sum(len(s.train) * theta for s, theta in zip(sites, trained, strict=True)) / len(tiny.train)
    want = score(predict(net, mean, tiny.test.images, task), tiny.test.labels)
    assert figures["one-shot"]["balanced_accuracy"]["mean"] == pytest.approx(want["balanced_accuracy"])
    again = evaluate_alone(config, tiny, "mlp", ask, tmp_path / "a", ["ensemble"])
    assert again["ensemble"]["auc"] == figures["ensemble"]["auc"]
    assert len(asked) == 1


def test_a_private_network_alone_is_paid_for_once(tiny: Dataset, tmp_path: Path) -> None:
    config = settings(privacy="dp", epsilon=8.0, method="sketch", expert_steps=3)
    (site, _) = sites_of(config, tiny)
    first = train_alone(config, site, site.name, tmp_path, names=["mlp@0.5@0"], run="x")
    again = train_alone(config, site, site.name, tmp_path, names=["mlp@0.5@0"], run="x")
    assert torch.equal(first.thetas["mlp@0.5@0"], again.thetas["mlp@0.5@0"])
    assert len(list(tmp_path.rglob("plan.json"))) == 1
    with pytest.raises(FedistillError, match="pays for one network"):
        train_alone(config, site, site.name, tmp_path, names=["mlp@0.5@0", "mlp@0.5@1"], run="x")


def test_a_set_along_a_path_leads_a_network_along_it(tiny: Dataset) -> None:
    """Plain training on the set comes nearer to the end of the path than on noise of its size."""
    config = settings(iterations=60, syn_steps=5, segment=2, ipc=2)
    task = task_of(tiny)
    net, rng, theta = task.network("mlp", config), generator(0, "path"), None
    path = [net.initial(generator(0, "global", "mlp"))]
    train = sgd(config, task, net, tiny.train, 0.05, rng)
    for _ in range(4):
        theta = path[-1]
        for _ in range(10):
            theta = train(theta)
        path.append(theta)
    made = distil_path(config, task, "mlp", torch.stack(path), 2)
    assert made.images.shape == (6, 1, 16, 16)
    assert made.labels.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]

    def nearest(images: torch.Tensor) -> float:
        """The least distance to the end of the path, as a share of its length, that any of a few step sizes gets to."""
        distances = []
        for step in (0.003, 0.01, 0.03, 0.1, 0.3):
            theta = path[0]
            for _ in range(10):
                theta = theta.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(loss_of("multiclass", net(theta, images), made.labels), theta)
                theta = theta.detach() - step * gradient
                distances.append(float((theta - path[-1]).norm() / (path[0] - path[-1]).norm()))
        return min(distances)

    noise = 0.3 * torch.randn(made.images.shape, generator=generator(0, "noise"))
    assert nearest(made.images) < nearest(noise) - 0.05


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_a_path_is_distilled_for_every_kind_of_task(task: str) -> None:
    config = settings(task=task, phantom_images=60, phantom_size=16, segment=1, syn_steps=1, iterations=2)
    data = load_data(config)
    net = task_of(data).network("mlp", config)
    path = torch.stack([net.initial(generator(0, "a")), net.initial(generator(1, "a"))])
    made = distil_path(config, task_of(data), "mlp", path, 2)
    assert len(made.images) == len(made.labels) == 2 * data.classes
    assert torch.isfinite(made.images).all()


@pytest.mark.parametrize(("method", "times"), [("dm", 1), ("mtt", 2)])
def test_distilling_centrally_is_as_much_work_as_at_the_sites(
    tiny: Dataset, tmp_path: Path, method: str, times: int
) -> None:
    """Iterations of all rounds; of a method whose iterations see a batch of the set, as many as at both sites."""
    config = settings(method=method, ipc=1, iterations=3, rounds=2, experts=1, expert_steps=20, segment=1, syn_steps=1)
    merged = merge([distill_site(replace(config, rounds=1), s, s.name, tmp_path) for s in sites_of(config, tiny)])
    seen: list[Progress] = []
    slow = replace(config, slice_seconds=0.0)
    made = distil_centrally(slow, tiny, merged, tmp_path / "central", seen.append)
    assert len(made) == len(merged) == 6
    assert made.manifest["all sites"]["iterations"] == 3 * 2 * times
    assert {p.total for p in seen if p.phase == "distill"} == {3 * 2 * times}


def test_comparators_are_checked_and_all_means_all_that_can_be() -> None:
    assert comparators(settings(compare="all", fl_rounds=5)) == list(COMPARATORS)
    assert comparators(settings(compare="all")) == ["ensemble", "one-shot", "ensemble-distilled", "central-distilled"]
    assert comparators(settings(compare=" ensemble,ensemble ")) == ["ensemble"]
    assert comparators(settings(compare="ensemble,all")) == comparators(settings(compare="all"))
    private = settings(compare="all", fl_rounds=5, privacy="dp", epsilon=1.0, method="sketch")
    assert "fedprox" not in comparators(private)
    assert arm_of(private, "ensemble") == "dp-ensemble"
    for compare, rounds, words in (
        ("ensembl", 0, "ensemble"),
        ("fedprox", 0, "set fl_rounds"),
        ("fedavg-distilled", 2, "at least segment=4 rounds"),
        ("all,ensembl", 0, "ensemble"),
    ):
        with pytest.raises(FedistillError, match=words):
            comparators(settings(compare=compare, fl_rounds=rounds))
