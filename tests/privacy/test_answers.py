"""Noisy counts of answers: their scale, what they cost, and that the same question is paid for once."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ledgers import fails

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.sources import load_data
from fedistill.evaluation.arms import confusion_at
from fedistill.files import write_once
from fedistill.privacy.accounting import epsilon_of
from fedistill.privacy.answers import answers_mechanism, private_answers
from fedistill.privacy.ledger import Cap, Ledger
from fedistill.site.describe import task_of
from fedistill.site.folder import ledger_file


def settings(**more: Any) -> Config:
    plain = {
        "phantom_images": 120, "phantom_classes": 3, "phantom_size": 16, "width": 4, "depth": 2, "privacy": "dp", "epsilon": 3.0,
        "eval_epsilon": 2.0,
    }  # fmt: skip
    return make_config(plain | more)


def models(config: Config, data: Dataset, count: int) -> dict[str, torch.Tensor]:
    net = task_of(data).network("mlp", config)
    return {f"mlp@{i}": net.initial(torch.Generator().manual_seed(i)) for i in range(count)}


def with_patients(data: Dataset, images: int) -> Dataset:
    """So many test images of each patient."""
    return replace(data, test=replace(data.test, patient=torch.arange(len(data.test)) // images))


def test_the_budget_covers_all_models_of_a_question() -> None:
    task = task_of(load_data(settings()))
    one, nine = (answers_mechanism(2.0, 1e-3, task, m) for m in (1, 9))
    assert (one.clip_norm, nine.clip_norm, one.noise_multiplier) == (1.0, 3.0, nine.noise_multiplier)
    assert 1.98 < epsilon_of([nine], 1e-3).epsilon <= 2.0
    several = task_of(load_data(settings(task="multilabel")))
    assert answers_mechanism(2.0, 1e-3, several, 3).clip_norm == pytest.approx(3.0)  # 3 models, 3 findings


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_noise_has_the_scale_that_is_paid_for(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(task=kind)
    data = load_data(config)
    asked = models(config, data, 4)
    monkeypatch.setattr(torch.Tensor, "round", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda self, low: self)
    monkeypatch.setattr(torch.Tensor, "long", lambda self: self)
    exact = {name: confusion_at(config, data, "mlp", theta, "test") for name, theta in asked.items()}
    rests: list[torch.Tensor] = []
    for draw in range(40):  # a folder each: nothing is remembered
        told = private_answers(config, data, "north", tmp_path / str(draw), asked, "test")
        rests += [(torch.tensor(told[n]) - exact[n]).flatten() for n in asked]
    found = torch.cat(rests)
    assert len(found) >= 1400
    spent = Ledger(ledger_file(tmp_path / "0", "north"), create=False).entries()[0].mechanisms[0]
    deviation = spent.noise_multiplier * spent.clip_norm
    assert spent.clip_norm == pytest.approx((4 * (3 if kind == "multilabel" else 1)) ** 0.5)
    assert found.mean().abs() < 5 * deviation / len(found) ** 0.5

    def fits(scale: float) -> bool:
        """Whether the sum of squares is within five deviations of what noise of that scale has."""
        n = len(found)
        return abs(float((found / scale).square().sum()) - n) < 5 * (2 * n) ** 0.5

    assert fits(deviation)
    assert not fits(2 / 3 * deviation)
    assert not fits(3 / 2 * deviation)


def test_the_same_question_has_the_same_answer_and_costs_once(tmp_path: Path) -> None:
    config = settings()
    data = load_data(config)
    two = models(config, data, 2)
    first = private_answers(config, data, "north", tmp_path, two, "test")
    assert private_answers(config, data, "north", tmp_path, dict(reversed(two.items())), "test") == first
    ledger = Ledger(ledger_file(tmp_path, "north"), create=False)
    assert [(e.data, e.unit, e.delta) for e in ledger.entries()] == [("north/test", "image", 1e-2)]
    private_answers(config, data, "north", tmp_path, two, "val")
    private_answers(config, data, "north", tmp_path, models(config, data, 3), "test")
    private_answers(config, replace(data, modality="ct"), "north", tmp_path, two, "test")  # changed data
    assert [e.data for e in ledger.entries()] == ["north/test", "north/val", "north/test", "north/test"]
    counts = torch.tensor([first[name] for name in two])
    assert (counts.dtype, bool((counts >= 0).all())) == (torch.int64, True)


def test_a_refusal_answers_nothing_and_spends_nothing(tmp_path: Path) -> None:
    config = settings()
    data = load_data(config)
    two = models(config, data, 2)
    with fails("over-budget"):
        private_answers(config, data, "north", tmp_path, two, "test", cap=Cap(epsilon=1.5, delta=1e-2))
    with fails("bad-model"):
        private_answers(config, data, "north", tmp_path, {"mlp": two["mlp@0"][:-1]}, "test")
    with fails("no-budget"):
        private_answers(settings(eval_epsilon=0.0), data, "north", tmp_path, two, "test")
    assert Ledger(ledger_file(tmp_path, "north")).entries() == []
    assert all(p.name.endswith(".plan.json") for p in tmp_path.rglob("answers/*.json"))


def test_patients_share_one_count(tmp_path: Path) -> None:
    """A patient's images add up to one, however many there are, and whatever the network says of them."""
    config = settings(unit="patient", eval_epsilon=1e4)
    data = with_patients(load_data(config), 8)
    with fails("no-patients"):
        private_answers(config, data, "north", tmp_path, models(config, data, 1), "val")
    told = private_answers(config, data, "north", tmp_path, models(config, data, 1), "test")
    patients = -(-len(data.test) // 8)
    assert abs(sum(map(sum, told["mlp@0"])) - patients) <= 4  # rounded cells
    entry = Ledger(ledger_file(tmp_path, "north"), create=False).entries()[0]
    assert (entry.unit, entry.delta) == ("patient", 10.0 ** -len(str(patients)))


def test_a_split_without_images_costs_nothing(tmp_path: Path) -> None:
    config = settings()
    data = load_data(config)
    nothing = replace(data, test=data.test.take(torch.empty(0, dtype=torch.int64)))
    told = private_answers(config, nothing, "north", tmp_path, models(config, data, 1), "test")
    assert told == {"mlp@0": [[0] * 3] * 3}
    assert not ledger_file(tmp_path, "north").exists()


def test_of_two_writers_the_first_one_counts(tmp_path: Path) -> None:
    told: list[bytes] = []
    writers = [
        threading.Thread(target=lambda i=i: told.append(write_once(tmp_path / "a" / "file", bytes([i]))))
        for i in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(told) == 8
    assert len(set(told)) == 1
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]
