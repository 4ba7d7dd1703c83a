from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fedistill
from fedistill.data.sources import resize
from fedistill.errors import FedistillError

TINY = {
    "experts": 2, "expert_steps": 30, "checkpoint_every": 5, "width": 4, "iterations": 5, "syn_steps": 3, "segment": 2,
    "workers": 1, "image_lr": 5.0, "skip_above": 1000.0,
}  # fmt: skip


def images(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    return (torch.rand((n, 1, 16, 16), generator=rng) * 0.5 + 0.4 * labels[:, None, None, None]), labels


def test_five_lines_distil_tensors() -> None:
    x, y = images()
    synthetic = fedistill.distill(x, y, ipc=2, **TINY)
    loader = torch.utils.data.DataLoader(synthetic, batch_size=2)
    image, label = next(iter(loader))
    assert image.shape == (2, 1, 16, 16)
    assert label.shape == (2, 2)
    assert isinstance(synthetic, fedistill.SyntheticSet)


def test_several_findings_grades_and_volumes() -> None:
    x, y = images(48)
    findings = torch.stack([y, (torch.arange(48) % 3 == 0).long()], 1)
    several = fedistill.distill(x, findings, ipc=2, class_names=["mass", "nodule"], **TINY)
    assert (several.kind, several.labels.shape) == ("multilabel", (4, 2))
    assert set(several.labels.flatten().tolist()) <= {0.0, 1.0}
    graded = fedistill.distill(x, torch.arange(48) % 3, ipc=1, task="ordinal", **TINY)
    assert graded.kind == "ordinal"
    assert graded.hard_labels.tolist() == [0, 1, 2]
    assert graded.labels[0, 0] > graded.labels[0, 1] > graded.labels[0, 2] > 0
    volumes = fedistill.distill(x[:, :, None].expand(-1, -1, 8, -1, -1), y, ipc=1, method="mtt", **TINY)
    assert volumes.geometry == (1, 8, 16, 16)
    assert volumes[0][0].shape == (1, 8, 16, 16)


@pytest.mark.parametrize("method", ["random", "k-centre", "herding"])
def test_no_image_of_several_findings_is_selected_twice(method: str) -> None:
    x, y = images(48)
    findings = torch.stack([y, (torch.arange(48) % 3 == 0).long(), (torch.arange(48) % 4 == 1).long()], 1)
    made = fedistill.distill(x, findings, ipc=5, method=method, **TINY)
    assert len(made.images.flatten(1).unique(dim=0)) == len(made) == 15


def test_learned_labels_of_findings_are_probabilities() -> None:
    x, y = images(48)
    findings = torch.stack([y, 1 - y, (torch.arange(48) % 3 == 0).long()], 1)
    made = fedistill.distill(x, findings, ipc=2, method="datm", **TINY)
    assert 0 < made.labels.min() < made.labels.max() < 1
    assert (made.labels.sum(1) - 1).abs().max() > 0.1


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    x, y = images()
    one, two, other = (fedistill.distill(x, y, ipc=1, seed=seed, **TINY) for seed in (3, 3, 4))
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x, y: (x * float("nan"), y), "NaN or values outside"),
        (lambda x, y: (x * 255, y), "scale it to 0..1"),
        (lambda x, y: (x[:, 0, 0], y), "images has shape"),
        (lambda x, y: (x.repeat(1, 2, 1, 1), y), "images has shape"),
        (lambda x, y: (x, torch.tensor(1)), r"labels has shape \(\): it must hold 40 whole numbers"),
        (lambda x, y: (x, y[:-1]), "must hold 40 whole numbers"),
        (lambda x, y: (x, y.float()), "whole numbers"),
        (lambda x, y: (x, y - 1), "labels run from -1"),
        (lambda x, y: (x, y * 0), "All labels are the same"),
        (lambda x, y: (x[:3], y[:3]), "has only 3 training images"),
        (lambda x, y: (x[:0], y[:0]), "images has shape"),
        (lambda x, y: (x[..., :8], y), "square"),
        (lambda x, y: (x.numpy(), y), "torch.from_numpy"),
        (lambda x, y: (x, y * 2), "No image has label 1"),
        (lambda x, y: (x, torch.stack([y, 2 * y], 1)), "0 or 1 for each of 2 findings"),
        (lambda x, y: (x, torch.stack([y, 0 * y], 1)), "No image shows 'finding 1'"),
        (lambda x, y: (x, y[:, None]), "whole numbers, or 0 or 1"),
        (lambda x, y: (x[:3], torch.stack([y, 1 - y], 1)[:3]), "has only 3 training images"),
        (lambda x, y: (x[:, :, None].expand(-1, -1, 4, -1, -1)[..., :8], y), "square"),
        (lambda x, y: (x[:, :, None].expand(-1, -1, 4, -1, -1), y), "depth=3 halves images of 4 pixels"),
    ],
)
def test_bad_tensors_are_one_sentence(spoil, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        fedistill.distill(*spoil(*images()), ipc=2, **TINY)


def test_images_are_resized_as_asked_for() -> None:
    x, y = images()
    large = (255 * torch.nn.functional.interpolate(x, (24, 24))).to(torch.uint8)
    made = fedistill.distill(large, y, ipc=1, method="dm", image_size=16, **TINY)
    assert made.geometry == (1, 16, 16)
    assert torch.equal(made.images, fedistill.distill(resize(large, 16), y, ipc=1, method="dm", **TINY).images)
    volumes = x[:, :, None].expand(-1, -1, 20, -1, -1)
    assert fedistill.distill(volumes, y, ipc=1, method="random", image_size=16, **TINY).geometry == (1, 16, 16, 16)


@pytest.mark.parametrize(
    "settings",
    [
        {"out": "set"}, {"data": "bloodmnist"}, {"partition": "site"}, {"sites": 3}, {"phantom_size": 32}, {"fl_rounds": 3},
        {"eval_steps": 5}, {"patience": 1}, {"server_data": "none"},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_here_are_refused(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(FedistillError, match=f"^{name}=.* means nothing to fedistill.distill"):
        fedistill.distill(*images(), ipc=1, **TINY, **settings)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"class_names": ["a", "a"]}, r"class_names=\['a', 'a'\]: it must be a list of different texts"),
        ({"class_names": [0, 1]}, "different texts"),
        ({"class_names": "ab"}, "different texts"),
        ({"class_names": []}, "different texts"),
        ({"class_names": ["a"]}, "labels run from 0 to 1: valid are 0 to 0"),
        ({"modality": None}, "modality=None is not text"),
        ({"modality": "xrya"}, "did you mean 'xray'"),
    ],
)
def test_names_and_modality_are_looked_at_before_the_work(more: dict[str, object], sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        fedistill.distill(*images(), ipc=1, **TINY, **more)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "multilabel"}, "task=multilabel needs 0 or 1 for every finding"),
        ({"task": "several"}, "Unknown value of task 'several'"),
    ],
)
def test_a_task_that_the_labels_do_not_fit(settings, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        fedistill.distill(*images(), ipc=2, **TINY, **settings)


def test_budgets_by_class_are_not_for_several_findings() -> None:
    x, y = images()
    with pytest.raises(FedistillError, match="budget=sqrt is by class"):
        fedistill.distill(x, torch.stack([y, 1 - y], 1), ipc=2, budget="sqrt", **TINY)


def test_the_caller_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fedistill.distill(*images(), ipc=1, **TINY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_fedistill_does_not_import_torch() -> None:
    code = "import sys, fedistill.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
