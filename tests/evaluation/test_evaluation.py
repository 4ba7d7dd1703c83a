"""Metrics against scikit-learn, and a protocol that cannot look at the test set to choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import partition
from fedistill.errors import FedistillError
from fedistill.evaluation import arms as arms_module
from fedistill.evaluation import fit as fit_module
from fedistill.evaluation.arms import (
    all_arms,
    architectures,
    budget_in_whole_images,
    confusion_at,
    draw_as_many,
    evaluate_arms,
    figures_of,
    global_models,
    random_real,
)
from fedistill.evaluation.fit import of_split, select_and_test
from fedistill.evaluation.metrics import confusion, from_confusion, mean_std, score
from fedistill.models.enlarge import enlarge, reduce
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.synthetic.set import SyntheticSet, one_hot


def settings(**more: object) -> Config:
    tiny = {
        "width": 4,
        "eval_steps": 6,
        "eval_nets": 2,
        "eval_batch": 8,
        "workers": 1,
        "ipc": 2,
        "eval_models": "convnet",
    }
    return make_config(tiny | more).resolved()


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(10, 60))
def test_metrics_equal_scikit_learn(seed: int, classes: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    truth = torch.cat([torch.arange(classes), torch.randint(classes, (n,), generator=rng)])
    probabilities = torch.rand((len(truth), classes), generator=rng).softmax(1)
    mine, predicted = score(probabilities, truth), probabilities.argmax(1)
    assert mine["accuracy"] == pytest.approx(oracle.accuracy_score(truth, predicted))
    assert mine["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, predicted))
    assert mine["macro_f1"] == pytest.approx(oracle.f1_score(truth, predicted, average="macro"))
    assert mine["per_class_recall"] == pytest.approx(list(oracle.recall_score(truth, predicted, average=None)))
    p = probabilities.double()
    if classes == 2:
        want = oracle.roc_auc_score(truth, p[:, 1])
    else:
        want = oracle.roc_auc_score(truth, p / p.sum(1, keepdim=True), multi_class="ovr")
    assert mine["auc"] == pytest.approx(want)


def test_absent_classes_are_none_and_do_not_count() -> None:
    mine = score(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 1]))
    assert mine["balanced_accuracy"] == 1
    assert mine["per_class_recall"] == [1, 1, None]
    assert score(torch.eye(2)[[0, 1]], torch.tensor([0, 0]))["auc"] is None
    assert from_confusion(torch.zeros(2, 2))["accuracy"] is None


def test_confusions_of_sites_add_up_to_the_pooled_one() -> None:
    rng = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(3, (2, 40), generator=rng)
    parts = confusion(truth[:15], predicted[:15], 3) + confusion(truth[15:], predicted[15:], 3)
    assert torch.equal(parts, confusion(truth, predicted, 3))
    assert from_confusion(parts)["accuracy"] == pytest.approx(float((truth == predicted).float().mean()))


def test_deviations() -> None:
    assert mean_std([1.0, 3.0, None]) == {"mean": 2.0, "std": pytest.approx(2**0.5)}
    assert mean_std([2.0]) == {"mean": 2.0, "std": None}
    assert mean_std([None]) == {"mean": None, "std": None}


def test_the_test_set_has_no_say_in_what_is_chosen(tiny: Dataset) -> None:
    """With every test label wrong, the learning rate and the networks are the same to the last bit."""
    config, task, material = settings(), task_of(tiny), of_split(tiny.train, task_of(tiny))
    poisoned = Split(tiny.test.images, (tiny.test.labels + 1) % 3, tiny.test.site)
    one = select_and_test(config, task, "convnet", material, tiny.val, tiny.test)
    two = select_and_test(config, task, "convnet", material, tiny.val, poisoned)
    assert one.learning_rate == two.learning_rate
    assert all(torch.equal(a, b) for a, b in zip(one.thetas, two.thetas, strict=True))
    assert one.scores != two.scores


def test_figures_on_validation_stand_beside_those_on_test(tiny: Dataset) -> None:
    config, task, material = settings(), task_of(tiny), of_split(tiny.train, task_of(tiny))
    same = figures_of([select_and_test(config, task, "mlp", material, tiny.test, tiny.test)])
    assert same["validation"] == {name: same[name]["mean"] for name in same["validation"]}
    assert {"balanced_accuracy", "auc"} <= set(same["validation"])
    other = figures_of([select_and_test(config, task, "mlp", material, tiny.val, tiny.test)])
    assert other["validation"] != {name: other[name]["mean"] for name in other["validation"]}


def test_a_learning_rate_that_diverges_is_not_chosen(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "LEARNING_RATES", (1e30, 0.01))
    result = select_and_test(settings(), task_of(tiny), "mlp", of_split(tiny.train, task_of(tiny)), tiny.val, tiny.test)
    assert result.learning_rate == 0.01
    monkeypatch.setattr(fit_module, "LEARNING_RATES", (1e30,))
    result = select_and_test(settings(), task_of(tiny), "mlp", of_split(tiny.train, task_of(tiny)), tiny.val, tiny.test)
    assert result.scores[0]["balanced_accuracy"] == pytest.approx(1 / 3)


def merged_of(data: Dataset, part, config: Config) -> SyntheticSet:
    counts = {name: [config.ipc] * data.classes for name in part.names}
    random = random_real(data, part, counts, 0)
    m = len(random)
    return SyntheticSet(
        images=torch.randn((m, *data.geometry), generator=torch.Generator().manual_seed(0)),
        labels=one_hot(random.labels, data.classes),
        site=torch.arange(m) // (config.ipc * data.classes),
        sites=part.names,
        class_names=data.class_names,
        mean=0.4,
        std=0.25,
        modality=data.modality,
        step_size=(0.01,) * len(part.names),
        manifest={name: {} for name in part.names},
    )


def test_four_arms_with_equal_budgets_and_no_work_done_twice(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(partition="iid", sites=2, eval_models="convnet,mlp")
    part = partition(tiny, config)
    merged = merged_of(tiny, part, config)
    told = []
    result = evaluate_arms(config, tiny, part, merged, tmp_path, lambda *event: told.append(event))
    assert list(result) == ["convnet", "mlp"]
    for figures in result.values():
        assert list(figures) == ["distilled", "random_real", "local_only", "centralised"]
        assert figures["distilled"]["images"] == figures["random_real"]["images"] == 12
        assert figures["centralised"]["images"] == len(tiny.train)
        assert figures["local_only"]["images"] == len(tiny.train) / 2
        assert figures["local_only"]["upload_bytes"] == 0
        assert figures["centralised"]["upload_bytes"] == len(tiny.train) * 256
    assert told[-1][:2] == (8, 8)
    models = global_models(config, merged, tmp_path)
    assert confusion_at(config, tiny, "mlp", models["mlp"], "test").sum() == len(tiny.test)
    with pytest.raises(FedistillError, match="does not fit"):
        confusion_at(config, tiny, "mlp", models["convnet"], "test")

    monkeypatch.setattr(arms_module, "select_and_test", lambda *a, **k: pytest.fail("an arm was trained again"))
    assert evaluate_arms(config, tiny, part, merged, tmp_path, lambda *event: None) == result
    with pytest.raises(pytest.fail.Exception):
        evaluate_arms(replace(config, eval_steps=7), tiny, part, merged, tmp_path, lambda *event: None)


def test_random_images_take_the_bytes_of_a_set_whose_images_are_kept_smaller(tiny: Dataset) -> None:
    config = settings(partition="iid", sites=2)
    part = partition(tiny, config)
    merged = merged_of(tiny, part, config)
    assert budget_in_whole_images(merged, torch.tensor([5, 0, 8])) == [5, 0, 8]
    small = replace(merged, images=enlarge(reduce(merged.images, 2), 2), scale=2)
    assert budget_in_whole_images(small, torch.tensor([5, 0, 8])) == [2, 0, 2]
    arms = {arm.name: arm.images for arm in all_arms(config, tiny, part, small)}
    assert arms["distilled"] == 12
    assert arms["random_real"] == sum(-(-n // 4) for n in [2] * 6)


def test_random_images_come_from_the_site_and_class_that_they_stand_for(tiny: Dataset) -> None:
    config = settings(partition="iid", sites=2)
    part = partition(tiny, config)
    random = random_real(tiny, part, {"site-1": [3, 0, 1]}, seed=5)
    assert random.counts(3) == [3, 0, 1]
    at_site = {i.numpy().tobytes() for i in tiny.train.images[part.index[0]["train"]]}
    assert all(i.numpy().tobytes() in at_site for i in random.images)


def test_unknown_global_model() -> None:
    with pytest.raises(FedistillError, match="did you mean 'resnet18'"):
        architectures(settings(eval_models="convnet,resnet"))


def test_what_a_class_lacks_is_made_up_for() -> None:
    labels = torch.tensor([0] * 9 + [1])
    found = draw_as_many(labels, [1, 3], generator(0))
    assert len(found) == len(set(found.tolist())) == 4
    assert 9 in found
    assert len(draw_as_many(labels, [2, 1], generator(0))) == 3
