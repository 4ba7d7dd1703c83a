"""Noisy results that are gone: drawn again for nothing while nobody can have seen them, and paid for again afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from private import settings

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.data.phantoms import phantom_data
from fedistill.errors import FedistillError
from fedistill.experts.train import steps_done
from fedistill.files import read_json, write_json
from fedistill.privacy import answers, learn, once
from fedistill.privacy.answers import private_answers
from fedistill.privacy.ledger import Cap, Ledger
from fedistill.seeding import generator
from fedistill.site import average
from fedistill.site.average import name_of, train_round
from fedistill.site.describe import task_of
from fedistill.site.folder import ledger_file
from fedistill.site.job import advance, released_set
from fedistill.synthetic.set import SyntheticSet

RESULTS = [("sketch", "private-sketch"), ("teach", "private-counts"), ("teach", "expert-000")]


@pytest.fixture
def few() -> Dataset:
    return phantom_data(settings(phantom_images=90, phantom_classes=3, phantom_size=16))


def finish(config: Config, data: Dataset, work: Path, cap: Cap | None = None) -> SyntheticSet:
    for _ in range(50):
        if advance(config, data, "here", work, seconds=1e9, cap=cap).done:
            break
    return released_set(config, data, "here", work)


def spends(work: Path) -> int:
    return len(Ledger(ledger_file(work, "here"), create=False).entries())


def find(work: Path, name: str) -> Path:
    (found,) = work.rglob(name)
    return found


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, place: ModuleType, name: str) -> Iterator[None]:
    """What is done inside ends as by a kill where `place` calls `name`."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("facts", [True, False], ids=["with its facts", "alone"])
@pytest.mark.parametrize(("method", "name"), RESULTS)
def test_what_was_used_and_is_lost_is_paid_for_again(
    method: str, name: str, facts: bool, few: Dataset, tmp_path: Path
) -> None:
    finish(settings(method=method, ipc=2), few, tmp_path)
    plan = find(tmp_path, "plan-*.json")
    old = {p: p.read_bytes() for p in plan.parent.glob("*.safetensors")}
    find(tmp_path, f"{name}.safetensors").unlink()
    if facts:
        find(tmp_path, "facts-*.json").unlink()
    with pytest.raises(FedistillError, match=r"over the lifetime cap of 4: 2\.9"):
        finish(settings(method=method, ipc=1), few, tmp_path, cap=Cap(epsilon=4.0, delta=1e-2))
    assert not list(plan.parent.glob("*.safetensors"))
    assert spends(tmp_path) == 1
    finish(settings(method=method, ipc=1), few, tmp_path)
    assert spends(tmp_path) == 2
    new = {p: p.read_bytes() for p in plan.parent.glob("*.safetensors")}
    assert new.keys() == old.keys()
    assert all(new[p] != old[p] for p in old)  # experts learned with the counts of their own plan
    assert read_json(find(tmp_path, "facts-*.json"))["plan"] == read_json(plan)["nonce"]
    finish(settings(method=method, ipc=3), few, tmp_path)
    assert spends(tmp_path) == 2


@pytest.mark.parametrize("method", ["sketch", "teach"])
def test_a_set_is_made_of_the_noise_of_one_plan(method: str, few: Dataset, tmp_path: Path) -> None:
    """Else a distillation that is half done would go on with a second draw, and claim the epsilon of one."""
    config, a, b = settings(method=method), tmp_path / "a", tmp_path / "b"
    old = finish(config, few, a)
    shutil.rmtree(find(a, "round-1"))
    for file in find(a, "plan-*.json").parent.glob("*.safetensors"):
        file.unlink()
    while advance(config, few, "here", a, seconds=0).phase == "experts":
        pass
    shutil.copytree(a, b)
    find(b, "state.safetensors").unlink()
    one, two = (finish(config, few, work) for work in (a, b))
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, old.images)
    assert spends(a) == 2


@pytest.mark.parametrize(("method", "name"), RESULTS)
def test_nothing_is_paid_twice_before_it_is_used(
    method: str, name: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was killed at the last moment before, with its result on the disk or without it."""

    with killed_at(monkeypatch, learn, "use"):
        finish(settings(method=method), few, tmp_path)
    assert not list(tmp_path.rglob("facts-*.json"))
    find(tmp_path, f"{name}.safetensors").unlink()
    finish(settings(method=method), few, tmp_path)
    assert spends(tmp_path) == 1


def test_experts_that_are_half_done_are_not_mixed_with_other_counts(few: Dataset, tmp_path: Path) -> None:
    config = settings(method="teach", experts=2)
    advance(config, few, "here", tmp_path, seconds=0)
    folder = find(tmp_path, "plan-experts.json").parent
    before = [steps_done(folder, e) for e in range(2)]
    assert before == [5, 5]
    (folder / "expert-001.safetensors").unlink()
    advance(config, few, "here", tmp_path, seconds=0)
    assert [steps_done(folder, e) for e in range(2)] == [10, 5]  # the other one goes on
    (folder / "private-counts.safetensors").unlink()
    advance(config, few, "here", tmp_path, seconds=0)
    assert [steps_done(folder, e) for e in range(2)] == [5, 5]
    finish(config, few, tmp_path)
    assert spends(tmp_path) == 1


def test_a_kill_while_a_plan_is_dropped_saves_nothing(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that are left without their plan would pass for the progress of the next one."""
    config = settings(method="teach", experts=2)
    finish(config, few, tmp_path)
    folder = find(tmp_path, "plan-experts.json").parent
    (folder / "expert-001.safetensors").unlink()
    real = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "expert-000.safetensors":
            raise KeyboardInterrupt
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(settings(method="teach", experts=2, ipc=1), few, tmp_path)
    left = (folder / "expert-000.safetensors").read_bytes()
    assert finish(settings(method="teach", experts=2, ipc=1), few, tmp_path)
    assert (folder / "expert-000.safetensors").read_bytes() != left
    assert spends(tmp_path) == 2


def test_a_plan_without_notes_is_taken_for_used(few: Dataset, tmp_path: Path) -> None:
    """An older fedistill took none."""
    finish(settings(method="sketch"), few, tmp_path)
    plan = find(tmp_path, "plan-sketch.json")
    stored = read_json(plan)
    write_json(plan, {k: v for k, v in stored.items() if k != "used"})
    finish(settings(method="sketch", ipc=1), few, tmp_path)
    assert spends(tmp_path) == 1
    write_json(plan, {k: v for k, v in stored.items() if k != "used"})
    find(tmp_path, "private-sketch.safetensors").unlink()
    finish(settings(method="sketch", ipc=3), few, tmp_path)
    assert spends(tmp_path) == 2


# --- answers ----------------------------------------------------------------------------------------------------------


def ask(data: Dataset, work: Path, **more: Any) -> dict[str, Any]:
    config = settings(eval_epsilon=2.0)
    theta = task_of(data).network("mlp", config).initial(generator(0, "asked"))
    return private_answers(config, data, "here", work, {"mlp": theta}, "test", **more)


@pytest.mark.parametrize("what", ["folder", "answer"])
def test_an_answer_that_is_gone_is_paid_for_again(what: str, few: Dataset, tmp_path: Path) -> None:
    """Six answers to one question, averaged, have less noise than one."""
    told = []
    for k in range(6):
        told.append(ask(few, tmp_path))
        assert told[-1] == ask(few, tmp_path)
        assert spends(tmp_path) == k + 1
        folder = find(tmp_path, "answers")
        if what == "folder":
            shutil.rmtree(folder)
        else:
            next(p for p in folder.glob("*.json") if "plan" not in p.name).unlink()
    assert len({str(answer) for answer in told}) > 1
    with pytest.raises(FedistillError, match="over the lifetime cap of 3"):
        ask(few, tmp_path, cap=Cap(epsilon=3.0, delta=1e-2))


@pytest.mark.parametrize("name", ["write_once", "use"])
def test_an_answer_that_nobody_had_is_not_paid_for_twice(
    name: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(monkeypatch, answers, name):
        ask(few, tmp_path)
    for file in find(tmp_path, "answers").glob("*.json"):
        if "plan" not in file.name:
            file.unlink()
    told = ask(few, tmp_path)
    assert spends(tmp_path) == 1
    assert ask(few, tmp_path) == told


def test_a_torn_answer_is_named(few: Dataset, tmp_path: Path) -> None:
    ask(few, tmp_path)
    file = next(p for p in find(tmp_path, "answers").glob("*.json") if "plan" not in p.name)
    file.write_text(file.read_text()[:5])
    with pytest.raises(FedistillError, match="remove it, and what it held is made anew"):
        ask(few, tmp_path)


# --- rounds of averaging ----------------------------------------------------------------------------------------------


def answered(data: Dataset, work: Path, round: int) -> torch.Tensor:
    config = settings(method="sketch", fl_rounds=3, fl_steps=2, eval_models="mlp")
    name = name_of("mlp", 0.1, 0)
    theta = task_of(data).network("mlp", config).initial(generator(0, "start"))
    return train_round(config, data, "here", work, round=round, thetas={name: theta}).thetas[name]


def test_a_round_that_is_gone_is_paid_for_again(few: Dataset, tmp_path: Path) -> None:
    first = answered(few, tmp_path, 1)
    answered(few, tmp_path, 2)
    find(tmp_path, "round-1.safetensors").unlink()
    answered(few, tmp_path, 3)  # which takes nothing of round 1
    assert spends(tmp_path) == 1
    assert not torch.equal(answered(few, tmp_path, 1), first)
    assert spends(tmp_path) == 2
    for round in (2, 3):  # of the new plan, once
        answered(few, tmp_path, round)
    assert spends(tmp_path) == 2


def test_counts_that_rounds_learned_with_are_not_drawn_again_for_nothing(few: Dataset, tmp_path: Path) -> None:
    answered(few, tmp_path, 1)
    find(tmp_path, "private-counts.safetensors").unlink()
    answered(few, tmp_path, 1)
    assert spends(tmp_path) == 1
    answered(few, tmp_path, 2)
    assert spends(tmp_path) == 2


def test_a_round_that_nobody_had_is_not_paid_for_twice(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_at(monkeypatch, average, "use"):
        answered(few, tmp_path, 1)
    find(tmp_path, "round-1.safetensors").unlink()
    answered(few, tmp_path, 1)
    assert spends(tmp_path) == 1


def test_the_note_is_on_the_disk_before_a_result_is_used(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of a folder are synchronised after the note, and before the plan of what is lost goes."""
    order: list[str] = []
    real, write = once.sync_folder, once.write_json
    monkeypatch.setattr(once, "sync_folder", lambda folder: order.append("sync") or real(folder))
    monkeypatch.setattr(once, "write_json", lambda *a: order.append(f"used {len(a[1]['used'])}") or write(*a))
    ask(few, tmp_path)
    assert order == ["used 0", "sync", "used 1", "sync"]
