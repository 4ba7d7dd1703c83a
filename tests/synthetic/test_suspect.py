"""Suspect sets: every attack where it can be seen, honest sites left in peace, and what is merged then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fedistill.bench.plan import Cell
from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import partition
from fedistill.data.public import NORMALISATION, normalise
from fedistill.evaluation.arms import draw_of_each
from fedistill.evaluation.metrics import Spread
from fedistill.events import claim_folder
from fedistill.experts.train import Task
from fedistill.models.loss import targets_of
from fedistill.seeding import generator
from fedistill.synthetic.oddities import copies, excess, triggers
from fedistill.synthetic.set import SyntheticSet, one_hot
from fedistill.synthetic.suspect import Influence, Judgement, influences_of, judge, select

SITES, IPC, CLASSES = ("a", "b", "c", "d"), 8, 3
BUDGETS = dict.fromkeys(SITES, [IPC] * CLASSES)


def make(site: str, images: torch.Tensor, labels: torch.Tensor, modality: str = "xray") -> SyntheticSet:
    mean, std = NORMALISATION[modality]
    return SyntheticSet(
        images=images,
        labels=labels,
        site=torch.zeros(len(images), dtype=torch.int64),
        sites=(site,),
        class_names=("x", "y", "z"),
        mean=mean,
        std=std,
        modality=modality,
        step_size=(0.01,),
        manifest={site: {}},
    )


def templates() -> list[SyntheticSet]:
    """Sites whose classes are known patterns under noise, seen by scanners of different brightness and contrast."""
    rng = generator(0, "templates")
    patterns = torch.randn((CLASSES, 1, 16, 16), generator=rng)
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    sets = []
    for k, site in enumerate(SITES):
        noise = torch.randn((len(labels), 1, 16, 16), generator=rng)
        sets.append(make(site, (patterns[labels] + noise) * (0.5 + 0.5 * k) + k, one_hot(labels, CLASSES)))
    return sets


def phantoms(tiny: Dataset) -> list[SyntheticSet]:
    """Random real phantoms of four sites."""
    parts = partition(tiny, make_config({"partition": "iid", "sites": 4}))
    sets = []
    for place, site in enumerate(SITES):
        train = parts.at(tiny, place).train
        chosen = draw_of_each(train.labels, [min(IPC, n) for n in train.counts(CLASSES)], generator(0, site))
        images = normalise(train.images[chosen], tiny.modality)
        one = make(site, images, targets_of(train.labels[chosen], CLASSES, tiny.kind), tiny.modality)
        sets.append(dataclasses.replace(one, class_names=tiny.class_names))
    return sets


def soft(labels: torch.Tensor) -> torch.Tensor:
    return 0.85 * one_hot(labels, CLASSES) + 0.05


def flipped(one: SyntheticSet) -> SyntheticSet:
    return dataclasses.replace(one, labels=one.labels.roll(1, 1))


def triggered(one: SyntheticSet) -> SyntheticSet:
    images, labels = one.images.clone(), one.hard_labels.clone()
    images[::2, :, -3:, -3:] = torch.tensor([[-1.0, 1, -1], [1, -1, 1], [-1, 1, -1]])
    labels[::2] = 0
    return dataclasses.replace(one, images=images, labels=soft(labels))


def dominated(one: SyntheticSet) -> SyntheticSet:
    return dataclasses.replace(one, labels=soft(torch.zeros(len(one), dtype=torch.int64)))


def copied(one: SyntheticSet) -> SyntheticSet:
    noise = torch.randn(one.images.shape, generator=generator(0, "copies"))
    return dataclasses.replace(one, images=one.images[:1] + 0.02 * noise)


WORDS = {
    "contradicts the labels": flipped,
    "one small patch in": triggered,
    "beyond the budgets": dominated,
    "near-copy": copied,
}


def suspects(sets: list[SyntheticSet]) -> dict[str, str]:
    return {j.site: "; ".join(j.reasons) for j in judge(sets, BUDGETS) if j.reasons}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("place", range(4))
def test_every_attack_is_found_whoever_the_attacker_is(words: str, place: int) -> None:
    sets = templates()
    sets[place] = WORDS[words](sets[place])
    found = suspects(sets)
    assert list(found) == [SITES[place]]
    assert words in found[SITES[place]]


@pytest.mark.parametrize("words", [w for w in WORDS if w != "contradicts the labels"])
def test_attacks_on_phantoms_are_found(words: str, tiny: Dataset) -> None:
    sets = phantoms(tiny)
    sets[2] = WORDS[words](sets[2])
    found = suspects(sets)
    assert list(found) == ["c"]
    assert words in found["c"]


def test_honest_sites_are_not_suspect(tiny: Dataset) -> None:
    assert suspects(templates()) == {}
    assert suspects(phantoms(tiny)) == {}


def test_the_order_of_arrival_does_not_matter() -> None:
    sets = templates()
    sets[1] = flipped(sets[1])
    assert judge(sets[::-1], BUDGETS) == judge(sets, BUDGETS)


def test_shares_are_what_was_planted() -> None:
    sets = templates()
    thrice = sets[2].images.clone()
    thrice[1:3] = thrice[0]
    sets[2] = dataclasses.replace(sets[2], images=thrice)
    assert copies(sets)[1:] == [0, pytest.approx(3 / 24), 0]
    sets[0] = triggered(templates()[0])
    assert triggers(sets)[0] == pytest.approx(
        11 / 24
    )  # the twelve with the patch, but for the one they are compared with
    assert excess(dominated(sets[0]), [IPC] * 3) == pytest.approx(16 / 24)
    assert excess(sets[1], [IPC, IPC, 0]) == pytest.approx(8 / 24)


def test_a_mark_of_the_scanner_on_all_images_is_no_trigger() -> None:
    sets = templates()
    images = sets[3].images.clone()
    images[:, :, :4, :4] = 2.0
    sets[3] = dataclasses.replace(sets[3], images=images)
    assert suspects(sets) == {}


def test_labels_cannot_be_judged_where_sites_have_one_class_each() -> None:
    sets = []
    for k, one in enumerate(templates()):
        of_class = one.hard_labels == k % CLASSES
        sets.append(
            dataclasses.replace(one, images=one.images[of_class], labels=one.labels[of_class], site=one.site[of_class])
        )
    assert {j.agreement for j in judge(sets, BUDGETS)} == {None}
    assert suspects(sets) == {}


def test_two_sites_cannot_be_judged_and_it_says_so() -> None:
    sets = templates()[:2]
    sets[0] = copied(sets[0])
    found = judge(sets, BUDGETS)
    assert found == [Judgement(site="a"), Judgement(site="b")]
    chosen = select(found, "robust")
    assert (chosen.kept, chosen.left_out) == (("a", "b"), ())
    assert "2 sets are too few" in chosen.note


def of(**reasons: str) -> list[Judgement]:
    return [Judgement(site=site, copies=0.0, reasons=(why,) if why else ()) for site, why in reasons.items()]


def test_a_robust_merge_leaves_suspects_out_but_never_most_of_the_sites() -> None:
    one = of(a="", b="odd", c="")
    assert select(one, "robust").kept == ("a", "c")
    assert select(one, "all").kept == ("a", "b", "c")
    half = select(of(a="", b="odd", c="odd", d=""), "robust")
    assert (half.kept, half.left_out, half.note) == (("a", "d"), ("b", "c"), "")
    most = select(of(a="", b="odd", c="odd"), "robust")
    assert (most.kept, most.left_out) == (("a", "b", "c"), ())
    assert "more than half" in most.note


def test_influence_is_the_difference_that_a_set_makes_on_validation() -> None:
    config = make_config({"eval_steps": 40, "eval_models": "mlp", "workers": 1, "augment": "none"}).resolved()
    rng = generator(0, "influence")
    labels = torch.arange(CLASSES).repeat_interleave(IPC)
    patterns = torch.randint(60, 196, (CLASSES, 1, 16, 16), generator=rng)

    def drawn() -> torch.Tensor:
        return (patterns[labels] + torch.randint(-60, 60, (len(labels), 1, 16, 16), generator=rng)).to(torch.uint8)

    sets = [make(site, normalise(drawn(), "xray"), one_hot(labels, CLASSES)) for site in SITES[:3]]
    sets[1] = flipped(sets[1])
    val = Split(drawn(), labels, torch.zeros(len(labels), dtype=torch.int64))
    task = Task((1, 16, 16), ("x", "y", "z"), "xray")
    found = influences_of(config, task, sets, val)
    gains = {site: one.balanced_accuracy.mean for site, one in found.items()}
    assert list(gains) == ["a", "b", "c"]
    assert max(gains, key=gains.__getitem__) == "b"
    assert gains["b"] >= 0 > gains["a"]
    assert all(one.balanced_accuracy.n == 3 and one.balanced_accuracy.std >= 0 for one in found.values())
    assert influences_of(config, task, sets[::-1], val) == found
    assert influences_of(config, task, sets[:2], val) == {}


@pytest.mark.parametrize(
    ("mean", "std", "suspect"), [(0.2, 0.01, True), (0.05, 0.001, False), (0.2, 0.5, False), (-0.2, 0.01, False)]
)
def test_harm_must_be_large_and_beyond_its_noise(mean: float, std: float, suspect: bool) -> None:
    seen = {"b": Influence(Spread(mean, std, 3), None)}
    found = {j.site: j.reasons for j in judge(templates(), BUDGETS, seen)}
    assert bool(found["b"]) == suspect
    assert not any(found[site] for site in "acd")


def test_the_setting_changes_no_key_of_stored_work(tmp_path: Path) -> None:
    one, other = make_config({}).resolved(), make_config({"merge": "robust"}).resolved()
    scopes = ("data", "experts", "distill", "eval")
    for n in range(1, 5):
        assert one.key(*scopes[:n]) == other.key(*scopes[:n])

    def cell(config: Config) -> Cell:
        return Cell(data="d", method="cf", ipc=1, seed=0, config=config, train_images=1, fingerprint="f", against=())

    assert (cell(one).key, cell(one).experts) == (cell(other).key, cell(other).experts)


def test_a_run_from_before_the_setting_goes_on(tmp_path: Path) -> None:
    config = make_config({})
    claim_folder(tmp_path / "run", config)
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace('"merge": "all",', ""))
    claim_folder(tmp_path / "run", config)
