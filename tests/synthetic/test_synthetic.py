"""The synthetic set: on disk, checked, merged."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedistill import load_set
from fedistill.data.public import NORMALISATION
from fedistill.errors import FedistillError
from fedistill.experts.train import Task
from fedistill.matching.problem import most_images
from fedistill.models.enlarge import enlarge
from fedistill.synthetic.check import check_set
from fedistill.synthetic.merge import merge
from fedistill.synthetic.set import SyntheticSet, one_hot
from fedistill.synthetic.sheet import sheet_of
from fedistill.synthetic.store import save_set
from fedistill.wire import quantise

TASK = Task((1, 8, 8), ("benign", "malign"), "xray")


def make(site: str = "north", *, ipc: int = 2, seed: int = 0) -> SyntheticSet:
    labels = torch.arange(2).repeat_interleave(ipc)
    mean, std = NORMALISATION["xray"]
    return SyntheticSet(
        images=torch.randn((2 * ipc, 1, 8, 8), generator=torch.Generator().manual_seed(seed)),
        labels=one_hot(labels, 2),
        site=torch.zeros(2 * ipc, dtype=torch.int64),
        sites=(site,),
        class_names=TASK.class_names,
        mean=mean,
        std=std,
        modality="xray",
        step_size=(0.01,),
        manifest={site: {"method": "mtt"}},
    )


def check(candidate: SyntheticSet, counts: tuple[int, int] = (50, 50)) -> None:
    check_set(candidate, site="north", task=TASK, ipc=2, counts=list(counts))


def test_enlarged_sets_are_merged_and_taken_where_they_were_asked_for(tmp_path: Path) -> None:
    def enlarged(site: str) -> SyntheticSet:
        made = make(site)
        return quantise(replace(made, images=enlarge(made.images[:, :, :4, :4], 2), scale=2))

    both = merge([enlarged("north"), enlarged("south")])
    assert both.scale == 2
    assert torch.equal(enlarge(both.stored, 2), both.images)
    save_set(both, tmp_path / "set")
    assert torch.equal(load_set(tmp_path / "set").images, both.images)
    with pytest.raises(FedistillError, match="scale is 2 and 1"):
        merge([enlarged("north"), make("south")])
    check_set(enlarged("north"), site="north", task=TASK, ipc=2, counts=[50, 50], scale=2)
    with pytest.raises(FedistillError, match="enlarged by 2, not 1"):
        check(enlarged("north"))
    with pytest.raises(FedistillError, match="enlarged by 1, not 2"):
        check_set(make(), site="north", task=TASK, ipc=2, counts=[50, 50], scale=2)


def test_a_folder_gives_back_the_set_as_a_torch_dataset(tmp_path: Path) -> None:
    made = quantise(make())
    save_set(made, tmp_path / "set")
    save_set(made, tmp_path / "set")  # again, over the old one
    back = load_set(tmp_path / "set")
    assert torch.equal(back.images, made.images)
    assert back.manifest == made.manifest
    assert back.step_size == made.step_size
    image, label = next(iter(torch.utils.data.DataLoader(back, batch_size=3)))
    assert image.shape == (3, 1, 8, 8)
    assert label.shape == (3, 2)
    assert (tmp_path / "set" / "contact-sheet.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["set.safetensors", "manifest.json"])
def test_a_missing_or_damaged_folder_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="holds no synthetic set"):
        load_set(tmp_path / "nowhere")
    save_set(make(), tmp_path / "set")
    whole = (tmp_path / "set" / name).read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff" * len(whole)):
        (tmp_path / "set" / name).write_bytes(damage)
        with pytest.raises(FedistillError, match="cannot be read"):
            load_set(tmp_path / "set")


def test_a_good_set_passes() -> None:
    check(make())
    check(make(ipc=1))


WRONG = {
    "another site's name": (lambda s: replace(s, sites=("south",)), "says that it comes from 'south'"),
    "other classes": (lambda s: replace(s, class_names=("malign", "benign")), "its classes are"),
    "another size": (lambda s: replace(s, images=s.images[:, :, :4]), "its images are"),
    "another modality": (lambda s: replace(s, modality="ct"), "other constants"),
    "its own normalisation": (lambda s: replace(s, mean=0.1), "other constants"),
    "NaN pixels": (lambda s: replace(s, images=s.images * float("nan")), "not finite"),
    "wild pixels": (lambda s: replace(s, images=s.images + 1e6), "not finite or beyond"),
    "labels that are no distribution": (lambda s: replace(s, labels=s.labels * 2), "not a distribution"),
    "negative labels": (lambda s: replace(s, labels=torch.tensor([[2.0, -1.0]] * 4)), "not a distribution"),
    "NaN labels": (lambda s: replace(s, labels=s.labels * float("nan")), "finite distribution"),
    "one label too few": (lambda s: replace(s, labels=s.labels[:3]), "one finite distribution per image"),
    "a negative step size": (lambda s: replace(s, step_size=(-0.1,)), "step size"),
    "too many images": (lambda s: make(ipc=3), "3 images of class benign, and its budget is 2"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_the_server_refuses(what: str) -> None:
    spoil, sentence = WRONG[what]
    with pytest.raises(FedistillError, match=sentence) as caught:
        check(spoil(make()))
    assert caught.value.code == "refused-set"
    assert "'north'" in caught.value.sentence


def test_the_budget_of_a_class_follows_the_policy() -> None:
    more = replace(make(ipc=3), labels=one_hot([0, 0, 0, 0, 0, 1], 2))  # 5 and 1
    with pytest.raises(FedistillError, match="5 images of class benign, and its budget is 3"):
        check_set(more, site="north", task=TASK, ipc=3, counts=[50, 10])
    check_set(more, site="north", task=TASK, ipc=3, counts=[50, 10], policy="proportional")
    assert most_images(TASK, ipc=3, counts=[50, 10], policy="proportional") == 6
    assert most_images(TASK, ipc=3, counts=[50, 1], policy="equal") == 4
    with pytest.raises(FedistillError, match="5 images of class benign, and its budget is 4"):
        check_set(more, site="north", task=TASK, ipc=3, counts=[50, 25], policy="proportional")


def test_learned_labels_may_come_to_favour_another_class_but_not_to_be_more() -> None:
    flipped = replace(
        make(), labels=torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    )  # 3 of one, 1 of the other
    check(flipped)
    with pytest.raises(FedistillError, match="6 images, and its budget is 4"):
        check(replace(make(ipc=3), labels=torch.full((6, 2), 0.5)))


FINDINGS = Task((1, 8, 8), ("benign", "malign"), "xray", "multilabel")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s: replace(s, kind="multiclass"), "made for a multiclass task, and this one is multilabel"),
        (lambda s: replace(s, labels=s.labels * 1.5), "not between 0 and 1"),
        (lambda s: replace(s, labels=s.labels - 0.5), "not between 0 and 1"),
        (lambda s: replace(make(ipc=3), kind="multilabel"), "6 images, and its budget is 4"),
        (lambda s: replace(s, labels=s.labels[:, :1]), "finite distribution"),
    ],
)
def test_sets_of_several_findings_are_checked(spoil, sentence: str) -> None:
    good = replace(make(), kind="multilabel", labels=torch.tensor([[1.0, 1], [0, 0], [0.3, 0.9], [1, 0]]))
    check_set(good, site="north", task=FINDINGS, ipc=2, counts=[3, 3])
    with pytest.raises(FedistillError, match=sentence):
        check_set(spoil(good), site="north", task=FINDINGS, ipc=2, counts=[3, 3])


def test_sets_of_another_kind_are_not_merged_with_it() -> None:
    with pytest.raises(FedistillError, match="cannot be merged: kind is multiclass and ordinal"):
        merge([make("north"), replace(make("south"), kind="ordinal")])
    assert merge([replace(make(s), kind="multilabel") for s in ("north", "south")]).kind == "multilabel"


def test_volumes_of_several_findings_are_stored_with_their_middle_slices(tmp_path: Path) -> None:
    labels = torch.tensor([[1.0, 1], [0, 0], [0.3, 0.9], [1, 0]])
    volumes = torch.zeros(4, 1, 6, 8, 8)
    volumes[:, :, 3] = 2.0  # the middle slice alone is white
    made = replace(make(), images=volumes, labels=labels, kind="multilabel")
    assert made.groups.tolist() == [0, 2, 1, 0]
    assert made.hard_labels.tolist() == [0, 0, 1, 0]
    save_set(quantise(made), tmp_path / "set")
    assert load_set(tmp_path / "set").geometry == (1, 6, 8, 8)
    sheet = sheet_of(made)
    plain = sheet_of(replace(made, images=volumes[:, :, 3]))
    assert sheet.tobytes() == plain.tobytes()
    assert sheet.height > sheet_of(replace(made, kind="multiclass", labels=one_hot([0, 0, 1, 0], 2))).height


def test_the_server_refuses_a_class_that_the_site_does_not_have() -> None:
    with pytest.raises(FedistillError, match="1 images of class malign, and its budget is 0"):
        check(make(ipc=1), counts=(50, 0))


def test_merging_does_not_depend_on_the_order_of_arrival() -> None:
    sets = [make(site, seed=k, ipc=k + 1) for k, site in enumerate(("west", "east", "north"))]
    merged = [merge(order) for order in itertools.permutations(sets)]
    assert merged[0].sites == ("east", "north", "west")
    assert len(merged[0]) == 12
    for other in merged[1:]:
        assert torch.equal(other.images, merged[0].images)
        assert torch.equal(other.labels, merged[0].labels)
        assert torch.equal(other.site, merged[0].site)
        assert other.step_size == merged[0].step_size
        assert other.manifest == merged[0].manifest
    for made in sets:
        assert torch.equal(merged[0].images[merged[0].of_site(made.sites[0])], made.images)


@given(st.permutations(["a", "b", "c", "d"]), st.integers(1, 3))
def test_merging_in_steps_is_merging_at_once(names: list[str], cut: int) -> None:
    sets = [make(name, seed=ord(name)) for name in names]
    steps = merge([merge(sets[:cut]), *sets[cut:]])
    at_once = merge(sets)
    assert set(steps.sites) == set(at_once.sites)
    for name in names:
        assert torch.equal(steps.images[steps.of_site(name)], at_once.images[at_once.of_site(name)])


def test_a_set_does_not_speak_for_another_site() -> None:
    north, south = make("north"), make("south")
    lie = replace(north, manifest=dict(north.manifest) | {"south": {"lie": True}})
    assert merge([lie, south]).manifest["south"] == south.manifest["south"]
    assert merge([south, replace(lie, sites=("west",), manifest=lie.manifest)]).manifest == south.manifest


def test_sets_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(FedistillError, match=r"north and south cannot be merged: mean is"):
        merge([make("north"), replace(make("south"), mean=0.1)])
    with pytest.raises(FedistillError, match="same site: north, north"):
        merge([make("north"), make("north")])
    with pytest.raises(FedistillError, match="no synthetic set"):
        merge([])
