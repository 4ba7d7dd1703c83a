"""Figures of tasks with several findings and of grades, against scikit-learn."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import all_arms, confusion_at, evaluate_arms, global_models
from fedistill.evaluation.metrics import NAMES, counts_of, counts_shape, from_counts, images_in, merit, score
from fedistill.evaluation.single import evaluate_set
from fedistill.models.loss import KINDS, targets_of
from fedistill.synthetic.set import SyntheticSet


def settings(**more: object) -> Config:
    tiny = {
        "phantom_images": 90, "phantom_classes": 3, "phantom_size": 16, "width": 4, "depth": 2, "eval_steps": 4, "eval_nets": 1,
        "eval_batch": 8, "workers": 1, "ipc": 2, "eval_models": "convnet", "partition": "iid", "sites": 2,
    }  # fmt: skip
    return make_config(tiny | more).resolved()


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(5, 60))
def test_findings_equal_scikit_learn(seed: int, findings: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    both = torch.tensor([[0], [1]]).expand(2, findings)  # every finding is there and is absent
    truth = torch.cat([both, (torch.rand((n, findings), generator=rng) < 0.3).long()])
    probabilities = torch.rand(truth.shape, generator=rng)
    mine, said = score(probabilities, truth, "multilabel"), (probabilities >= 0.5).long()
    t, p, s = truth.numpy(), probabilities.double().numpy(), said.numpy()
    columns = range(findings)
    assert mine["auc"] == pytest.approx(oracle.roc_auc_score(t, p, average="macro"))
    assert mine["map"] == pytest.approx(oracle.average_precision_score(t, p, average="macro"))
    assert mine["accuracy"] == pytest.approx((t == s).mean())
    balanced = [oracle.balanced_accuracy_score(t[:, k], s[:, k]) for k in columns]
    assert mine["balanced_accuracy"] == pytest.approx(sum(balanced) / findings)
    assert mine["macro_f1"] == pytest.approx(oracle.f1_score(t, s, average="macro", zero_division=0))
    assert mine["per_class_recall"] == pytest.approx(list(oracle.recall_score(t, s, average=None)))
    tables = counts_of(probabilities, truth, "multilabel")
    assert tables.tolist() == oracle.multilabel_confusion_matrix(t, s).tolist()
    assert images_in(tables) == n + 2


def test_findings_that_nobody_or_everybody_has_do_not_count() -> None:
    truth = torch.tensor([[1, 0, 1], [0, 0, 1]])
    mine = score(torch.tensor([[0.9, 0.1, 0.9], [0.2, 0.7, 0.9]]), truth, "multilabel")
    assert (mine["auc"], mine["map"], mine["balanced_accuracy"], mine["macro_f1"]) == (1, 1, 1, 1)
    assert mine["per_class_recall"] == [1, None, 1]
    assert mine["accuracy"] == pytest.approx(5 / 6)
    nothing = from_counts(torch.zeros(3, 2, 2, dtype=torch.int64), "multilabel")
    assert nothing["accuracy"] is None
    assert nothing["balanced_accuracy"] is None


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(5, 60))
def test_grades_equal_scikit_learn(seed: int, grades: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    truth = torch.cat([torch.arange(grades), torch.randint(grades, (n,), generator=rng)])
    probabilities = torch.rand((len(truth), grades), generator=rng).softmax(1)
    mine, said = score(probabilities, truth, "ordinal"), probabilities.argmax(1)
    assert mine["qwk"] == pytest.approx(oracle.cohen_kappa_score(truth, said, weights="quadratic"), abs=1e-12)
    assert mine["mae"] == pytest.approx(oracle.mean_absolute_error(truth, said))
    assert mine["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, said))


def test_kappa_of_a_network_that_always_says_the_same() -> None:
    truth, said = torch.tensor([0, 1, 2, 1]), torch.eye(3)[[1, 1, 1, 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = oracle.cohen_kappa_score(truth, [1] * 4, weights="quadratic")
    assert score(said, truth, "ordinal")["qwk"] == want == 0
    assert score(said, torch.ones(4, dtype=torch.int64), "ordinal")["qwk"] is None
    assert from_counts(torch.zeros(3, 3), "ordinal")["mae"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_sites_add_up_to_the_pooled_figures(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(2, (40, 3), generator=rng) if kind == "multilabel" else torch.randint(3, (40,), generator=rng)
    probabilities = torch.rand((40, 3), generator=rng)
    parts = [counts_of(probabilities[cut], truth[cut], kind) for cut in (slice(15), slice(15, None))]
    assert parts[0].shape == counts_shape(3, kind)
    figures, whole = from_counts(parts[0] + parts[1], kind), score(probabilities, truth, kind)
    assert set(figures) == set(whole) - {"auc", "map"}
    assert all(figures[name] == whole[name] for name in figures)
    assert set(NAMES[kind]) | {"per_class_recall"} == set(whole)


def test_what_a_learning_rate_is_chosen_by() -> None:
    """The headline decides, the second figure only where that is the same, and counts without areas decide by the rest."""
    assert merit({"auc": 0.8, "map": 0.2}, "multilabel") > merit({"auc": 0.7, "map": 0.9}, "multilabel")
    assert merit({"auc": 0.8, "map": 0.3}, "multilabel") > merit({"auc": 0.8, "map": 0.2}, "multilabel")
    assert merit({"balanced_accuracy": 0.8}, "multilabel") > merit({"balanced_accuracy": 0.7}, "multilabel")
    assert merit({"qwk": 0.1, "auc": 0.5, "balanced_accuracy": 0}, "ordinal") > merit(
        {"qwk": -0.1, "auc": 1}, "ordinal"
    )
    assert merit({"qwk": 0.1, "auc": None}, "ordinal") > merit({"qwk": None, "auc": None}, "ordinal")


def merged_of(data: Dataset, names: tuple[str, ...], each: int) -> SyntheticSet:
    rng = torch.Generator().manual_seed(0)
    m = each * len(names)
    return SyntheticSet(
        images=torch.randn((m, *data.geometry), generator=rng),
        labels=targets_of(data.train.labels[:m], data.classes, data.kind),
        site=torch.arange(m) // each,
        sites=names,
        class_names=data.class_names,
        mean=0.4,
        std=0.25,
        modality=data.modality,
        step_size=(0.01,) * len(names),
        manifest={name: {} for name in names},
        kind=data.kind,
    )


@pytest.mark.parametrize(
    ("task", "more"),
    [("multilabel", {}), ("ordinal", {}), ("multilabel", {"phantom_depth": 4}), ("multiclass", {"phantom_depth": 4})],
)
def test_all_arms_of_every_kind(task: str, more: dict[str, int], tmp_path: Path) -> None:
    config = settings(task=task, **more)
    data = load_data(config)
    part = partition(data, config)
    merged = merged_of(data, part.names, 5)
    arms = {arm.name: arm for arm in all_arms(config, data, part, merged)}
    if task == "multilabel":  # as many as each site released, whatever their findings
        random = arms["random_real"].materials[0].images
        at_first = {image.numpy().tobytes() for image in data.train.images[part.index[0]["train"]]}
        assert sum(image.numpy().tobytes() in at_first for image in random) == 5
        assert len(random) == 10
    results = evaluate_arms(config, data, part, merged, tmp_path, lambda *event: None)["convnet"]
    for figures in results.values():
        assert set(NAMES[data.kind]) <= set(figures)
        assert 0 <= figures["auc"]["mean"] <= 1
    theta = global_models(config, merged, tmp_path)["convnet"]
    counts = confusion_at(config, data, "convnet", theta, "test")
    assert counts.shape == counts_shape(data.classes, data.kind)
    assert images_in(counts) == len(data.test)


def test_a_set_is_evaluated_only_on_data_of_its_kind() -> None:
    config = settings(task="multilabel")
    data = load_data(config)
    result = evaluate_set(config, data, merged_of(data, ("all",), 6))
    assert result["data"]["kind"] == "multilabel"
    assert result["arms"]["random_real"]["images"] == 6
    assert result["arms"]["distilled"]["map"]["mean"] is not None
    grades = load_data(settings(task="ordinal"))
    other = merged_of(load_data(settings()), ("all",), 6)
    with pytest.raises(FedistillError, match="do not fit: class_names is"):
        evaluate_set(settings(), grades, other)
