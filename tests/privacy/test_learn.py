"""The private part of a site's work: paid for first, done once, and all that distillation ever sees."""

from __future__ import annotations

import copy
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from private import labelled, norm, settings
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.phantoms import phantom_data
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.experts.train import load_trajectory
from fedistill.files import read_json, read_tensors
from fedistill.matching.problem import Bundle
from fedistill.methods import sketch
from fedistill.models.loss import targets_of
from fedistill.privacy import dpsgd
from fedistill.privacy import learn as module
from fedistill.privacy.accounting import Mechanism, epsilon_of
from fedistill.privacy.learn import denoised, learn, private_counts, private_sketch, read_plan, weights_of
from fedistill.privacy.ledger import Cap, Ledger
from fedistill.privacy.noise import noisy
from fedistill.site import job
from fedistill.site.describe import keyed_fingerprint, task_of
from fedistill.site.folder import ledger_file
from fedistill.site.job import advance, load_bundle, released_set
from fedistill.synthetic.set import SyntheticSet

METHODS = ["sketch", "ptm", "line", "teach"]


@pytest.fixture
def few() -> Dataset:
    """90 phantoms: every class is larger than the noise of its count."""
    return phantom_data(settings(phantom_images=90, phantom_classes=3, phantom_size=16))


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans whose noise is next to nothing, with which everything private shows."""
    real = module.plan_of

    def plan_of(config: Config, records: int):
        plan = real(config, records)
        none = tuple(Mechanism(**(m.to_dict() | {"noise_multiplier": 1e-9})) for m in plan.mechanisms)
        return type(plan)(**(vars(plan) | {"mechanisms": none}))

    monkeypatch.setattr(module, "plan_of", plan_of)


def work(config: Config, data: Dataset, folder: Path, **more: object) -> tuple[int, int]:
    return learn(
        config, task_of(data), data.train, folder / "experts", site="here", ledger=folder / "ledger.db",
        **({"cap": None, "until": float("inf")} | more),
    )  # fmt: skip


def finish(config: Config, data: Dataset, folder: Path) -> SyntheticSet:
    for _ in range(50):
        if advance(config, data, "here", folder, seconds=1e9).done:
            break
    return released_set(config, data, "here", folder)


def experts(config: Config, folder: Path) -> list[Tensor]:
    last = config.expert_steps // config.checkpoint_every
    return [load_trajectory(folder / "experts", e, last) for e in range(config.experts)]


def prepared(config: Config, data: Dataset, folder: Path) -> None:
    while not list(folder.rglob("facts-*.json")):
        advance(config, data, "here", folder, seconds=0)


@pytest.mark.parametrize("change", ["zeros", "shuffled", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_after_learning_depends_on_the_records(method: str, change: str, few: Dataset, tmp_path: Path) -> None:
    """To the last bit, whatever became of images, labels and their number: post-processing, and nothing else."""
    config = settings(method=method, denoise="average")
    prepared(config, few, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = copy.deepcopy(few)
    assert other.fingerprint == few.fingerprint  # cached: the folder is found by it
    train = other.train
    if change == "zeros":
        train.images.zero_()
        train.labels.zero_()
    elif change == "shuffled":
        train.labels.copy_(train.labels[torch.randperm(90)])
    else:
        train.images.random_()
        object.__setattr__(other, "train", Split(train.images[:30], train.labels[:30], train.site[:30]))
    a, b = finish(config, few, tmp_path / "a"), finish(config, other, tmp_path / "b")
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert a.step_size == b.step_size
    assert a.manifest == b.manifest


@pytest.mark.parametrize("method", ["sketch", "teach"])
def test_without_noise_one_record_would_show(
    method: str, few: Dataset, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: what it compares holds the records."""
    config = settings(method=method, sample_rate=1.0)
    other = copy.deepcopy(few)
    other.train.images[0].fill_(255)
    results = []
    for name, data in (("a", few), ("again", few), ("b", other)):
        work(config, data, tmp_path / name)
        folder = tmp_path / name / "experts"
        results.append(private_sketch(folder) if method == "sketch" else load_trajectory(folder, 0, 4)[-1])
    assert norm(results[0] - results[1]) < 0.02 * norm(results[0] - results[2])


def test_the_ledger_is_written_before_a_record_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A training set that cannot be read: the spend is on the ledger all the same."""

    class Unreadable(Split):
        @property
        def images(self) -> Tensor:  # type: ignore[override]
            raise PermissionError("images")

        @property
        def labels(self) -> Tensor:  # type: ignore[override]
            raise PermissionError("labels")

        def __len__(self) -> int:
            return 90

    for method in ("sketch", "ptm"):
        train = object.__new__(Unreadable)
        config, folder = settings(method=method), tmp_path / method
        with pytest.raises(PermissionError):
            learn(
                config, task_of(labelled()), train, folder / "experts", site="here", ledger=folder / "ledger.db",
                cap=None, until=float("inf"),
            )  # fmt: skip
        (entry,) = Ledger(folder / "ledger.db", create=False).entries()
        assert entry.mechanisms == read_plan(config, folder / "experts").mechanisms
        assert entry.data == "here"


def test_other_patients_are_other_work(tmp_path: Path) -> None:
    """A corrected column of patients: what was made for the wrong ones protects them, and not the right ones."""
    config = settings(unit="patient", method="sketch", iterations=2)
    data = labelled(90, patients=30)
    assert data.train.patient is not None
    right = replace(data, train=replace(data.train, patient=data.train.patient // 2))
    assert right.fingerprint == data.fingerprint
    sets = []
    for one in (data, right, right):
        while not advance(config, one, "here", tmp_path, seconds=1e9).done:
            pass
        sets.append(released_set(config, one, "here", tmp_path))
    assert not torch.equal(sets[0].images, sets[1].images)
    assert torch.equal(sets[1].images, sets[2].images)
    assert len(Ledger(ledger_file(tmp_path, "here")).entries()) == 2
    assert keyed_fingerprint(data, tmp_path, "patient") != keyed_fingerprint(right, tmp_path, "patient")


def test_patients_are_counted_before_and_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    spend, records = Ledger.spend, module.records_by_unit
    monkeypatch.setattr(Ledger, "spend", lambda *a, **k: order.append("spend") or spend(*a, **k))
    monkeypatch.setattr(module, "records_by_unit", lambda *a: order.append("records") or records(*a))
    monkeypatch.setattr(module, "noisy", lambda *a: order.append("noise") or noisy(*a))
    data = labelled(90, patients=30)
    config = settings(unit="patient", method="sketch")
    work(config, data, tmp_path)
    assert order == ["spend", "records", "noise"]
    assert read_plan(config, tmp_path / "experts").records == 30
    assert Ledger(tmp_path / "ledger.db").entries()[0].unit == "patient"


@pytest.mark.parametrize("method", ["sketch", "ptm"])
def test_more_than_the_cap_touches_nothing(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "records_by_unit", None)
    with pytest.raises(FedistillError, match="over the lifetime cap of 1"):
        work(settings(method=method), labelled(90), tmp_path, cap=Cap(epsilon=1.0, delta=1e-2))
    assert Ledger(tmp_path / "ledger.db").entries() == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_capped_site_does_nothing_without_privacy(few: Dataset, tmp_path: Path) -> None:
    config = settings(privacy="none", epsilon=0.0, method="sketch")
    with pytest.raises(FedistillError, match="privacy=none has no epsilon, and this site has a cap of 3: use dp"):
        advance(config, few, "here", tmp_path, seconds=1e9, cap=Cap(epsilon=3.0, delta=1e-5))
    assert not list(tmp_path.iterdir())


def test_sketch_and_experts_are_two_spends_and_methods_share_the_experts(few: Dataset, tmp_path: Path) -> None:
    for method in METHODS:
        finish(settings(method=method, denoise="average"), few, tmp_path / "w")
    entries = Ledger(next(tmp_path.rglob("ledger.db"))).entries()
    assert sorted(e.what for e in entries) == ["experts", "sketch"]
    both = epsilon_of([m for e in entries for m in e.mechanisms], 1e-2).epsilon
    assert both > 3


@pytest.mark.parametrize(
    ("method", "file"), [("sketch", "private-sketch"), ("ptm", "private-counts"), ("ptm", "expert-000")]
)
def test_killed_between_spend_and_file(
    method: str, file: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, owner = settings(method=method), dpsgd if file.startswith("expert") else module
    real = owner.write_tensors

    def killed(path: Path, *rest: object) -> None:
        if path.stem == file:
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(owner, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        work(config, few, tmp_path)
    monkeypatch.setattr(owner, "write_tensors", real)
    done, total = work(config, few, tmp_path)
    assert done == total
    assert len(Ledger(tmp_path / "ledger.db").entries()) == 1
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}
    assert work(config, few, tmp_path) == (done, total)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}


def test_what_is_done_again_in_an_empty_folder_is_paid_for_again(few: Dataset, tmp_path: Path) -> None:
    """Two noisy results of one mechanism, averaged, have less noise than the plan says."""
    config = settings(method="sketch")
    work(config, few, tmp_path)
    shutil.rmtree(tmp_path / "experts")
    work(config, few, tmp_path)
    assert len(Ledger(tmp_path / "ledger.db").entries()) == 2
    shutil.rmtree(tmp_path / "experts")
    with pytest.raises(FedistillError, match="over the lifetime cap"):
        work(config, few, tmp_path, cap=Cap(epsilon=5.0, delta=1e-2))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_what_is_on_disk_is_noisy(kind: str, tmp_path: Path) -> None:
    """Every tensor of the folder against the sums of the records: as far away as the noise is large."""
    data = labelled(90, kind)
    for method in ("sketch", "ptm"):
        work(settings(method=method), data, tmp_path)
    config, folder, task = settings(method="sketch"), tmp_path / "experts", task_of(data)
    targets = targets_of(data.train.labels, 3, kind)
    clean = sketch.sketch(config, task, data.train.images, targets, Records.of_images(90))
    mechanism = read_plan(config, folder)["sketch"]
    wanted = mechanism.noise_multiplier * sketch.NORM * clean.numel() ** 0.5
    assert norm(private_sketch(folder) - clean) == pytest.approx(wanted, rel=0.3)
    counts = torch.nn.functional.normalize(targets, dim=1).sum(0)
    files = {p.name for p in folder.iterdir()}
    assert files == {
        "plan-sketch.json", "plan-experts.json", ".lock", "private-sketch.safetensors", "private-counts.safetensors",
        "expert-000.safetensors",
    }  # fmt: skip
    for file in folder.glob("*.safetensors"):
        for name, tensor in read_tensors(file)[0].items():
            flat = tensor.double().flatten()
            for sums in (clean.flatten(), clean[:, -1], clean[:3, -1] / sketch.COUNT_WEIGHT, counts):
                if len(flat) >= len(sums):
                    near = (flat.unfold(0, len(sums), 1) - sums).norm(dim=1).min()
                    assert near > 0.05 * wanted / clean.numel() ** 0.5, (file, name)


def test_noisy_counts_drive_the_budget_and_small_classes_are_left_out(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, file, scale in (("sketch", "private-sketch", sketch.COUNT_WEIGHT), ("ptm", "private-counts", 1.0)):
        folder = tmp_path / method

        def told(sums: Tensor, mechanism: Mechanism, scale: float = scale) -> Tensor:
            result = noisy(sums, mechanism)
            if mechanism.name in ("sketch", "counts"):
                row = result[:, -1] if mechanism.name == "sketch" else result
                row.copy_(scale * torch.tensor([80.0, 1.0, -4.0]))
            return result

        monkeypatch.setattr(module, "noisy", told)
        config = settings(method=method, denoise="average")
        made = finish(config, few, folder)
        assert torch.bincount(made.hard_labels, minlength=3).tolist() == [2, 0, 0]
        experts = next(folder.rglob(f"{file}.safetensors")).parent
        assert private_counts(config, experts) == [80, 0, 0]
        assert read_json(next(folder.rglob("facts-*.json")))["counts"] == [80, 0, 0]


@pytest.mark.parametrize("method", ["sketch", "ptm"])
def test_a_site_that_is_all_noise_says_so(
    method: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "noisy", lambda sums, mechanism: -torch.ones_like(sums).float())
    with pytest.raises(
        FedistillError, match="No class is larger than the noise that epsilon=3 takes: the site is too small"
    ):
        finish(settings(method=method), few, tmp_path)


def test_experts_that_are_all_noise_say_so(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(experts=1)
    work(config, few, tmp_path)
    monkeypatch.setattr(module, "denoise", lambda paths, *a, **k: [paths[0][:1].expand(5, -1)])
    with pytest.raises(FedistillError, match="smaller than their noise: use method=sketch"):
        denoised(config, task_of(few), tmp_path / "experts", experts(config, tmp_path))


def test_experts_answer_as_they_were_trained(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoising is for their way: shrunk towards the start, an expert answers like a network that has learnt nothing."""
    seen: list[tuple[Tensor, ...]] = []

    def bundle(*args: object) -> Bundle:
        made = load_bundle(*args)
        seen.append(made.trajectories)
        return made

    monkeypatch.setattr(job, "load_bundle", bundle)
    teach, ptm = (settings(method=method, denoise="average") for method in ("teach", "ptm"))
    finish(teach, few, tmp_path)
    finish(ptm, few, tmp_path)
    trained = job.expert_paths(teach, few, "here", tmp_path)
    for mine, raw, other in zip(seen[0], trained, seen[-1], strict=True):
        assert torch.equal(mine, raw)
        assert not torch.equal(other, raw)


def test_denoising_knows_the_noise_of_a_step(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the way that experts go when nobody takes part."""
    monkeypatch.setattr(dpsgd, "sample", lambda *_: torch.zeros(0, dtype=torch.int64))
    config, told = settings(), {}
    work(config, few, tmp_path)
    monkeypatch.setattr(module, "denoise", lambda paths, *a, **k: told.update(k) or paths)
    paths = denoised(config, task_of(few), tmp_path / "experts", experts(config, tmp_path))
    assert len(paths) == 1
    for path in paths:
        ways = path[1:] - path[:-1]
        assert float(ways.square().mean() ** 0.5) == pytest.approx(told["step_noise"] * 5**0.5, rel=0.15)
    assert told["every"] == 5


def test_of_two_processes_one_waits(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each could release a noisy result of its own, and only one is paid for."""
    made = []

    def slow(sums: Tensor, mechanism: Mechanism) -> Tensor:
        made.append(mechanism)
        time.sleep(0.3)
        return noisy(sums, mechanism)

    monkeypatch.setattr(module, "noisy", slow)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work, settings(method="sketch"), few, tmp_path) for _ in range(2)]
        assert [job.result() for job in jobs] == [(1, 1), (1, 1)]
    assert len(made) == 1


@pytest.mark.parametrize("method", METHODS)
def test_several_findings_work_in_private(method: str, tmp_path: Path) -> None:
    data = labelled(90, "multilabel")
    made = finish(settings(method=method, denoise="average"), data, tmp_path)
    assert len(made) == 6
    assert (made.labels.sum(1) <= 1).all()  # which findings occur together is private
    facts = read_json(next(tmp_path.rglob("facts-*.json")))
    assert len(facts["counts"]) == 3


def test_a_record_counts_one_in_all_whatever_it_has() -> None:
    """Of counts: one image with all findings, and a patient of many images and classes."""
    for kind, patients in (("multilabel", 0), ("multiclass", 4), ("multilabel", 4)):
        data, found = labelled(60, kind, patients=patients), []
        unit = "patient" if patients else "image"

        def kept(rest: Tensor, data: Dataset = data, unit: str = unit, found: list[Tensor] = found) -> None:
            part = data.train.take(rest)
            records = dpsgd.records_by_unit(part, unit)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "noisy", lambda sums, mechanism: found.append(sums) or sums)
                patch.setattr(module, "write_tensors", lambda *a: None)
                patch.setattr(module, "read_tensors", lambda *a: ({"counts": found[-1]}, {}))
                module._counts(task_of(data), part, Path("/nowhere"), records, Mechanism(
                    name="counts", sample_rate=1.0, noise_multiplier=1.0, steps=1))  # fmt: skip

        everybody = torch.arange(60)
        kept(everybody)
        kept(everybody[everybody % 4 > 0] if patients else everybody[1:])
        assert 0 < norm(found[0] - found[1]) <= 1 + 1e-9
        if patients and kind == "multiclass":
            assert float(found[0].sum()) == pytest.approx(4)


def test_weights_are_bounded_whatever_the_noise_says() -> None:
    for kind in ("multiclass", "multilabel"):
        for counts in ([-5.0, 90.0, 0.3], [30.0, 30.0, 30.0], [-1.0, -2.0, -3.0]):
            weights = weights_of(torch.tensor(counts), 90, kind)
            assert torch.isfinite(weights).all()
            assert (weights > 0).all()
            assert weights.max() <= 100
    assert torch.allclose(weights_of(torch.tensor([30.0, 30.0, 30.0]), 90, "multiclass"), torch.ones(3))
    assert torch.allclose(weights_of(torch.tensor([30.0, 60.0]), 90, "multilabel"), torch.tensor([2.0, 0.5]))


def test_the_set_states_its_plan(few: Dataset, tmp_path: Path) -> None:
    config = settings(method="sketch", seed=4711)
    about = finish(config, few, tmp_path).manifest["here"]
    assert about["privacy"]["epsilon"] <= 3
    assert len(about["privacy"]["conditions"]) == 10
    assert "4711" not in str(about["privacy"])
    assert few.fingerprint not in str(about)
