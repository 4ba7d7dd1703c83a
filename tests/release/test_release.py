"""A release round trip: what is written can be read by everybody it is meant for, and says the same thing everywhere."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from claims import CARD, DELTA, NONE, private, set_of
from PIL import Image

from fedistill import load_set
from fedistill.config import make_config
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.models.enlarge import enlarge, reduce
from fedistill.release.claim import CONDITIONS, certainty, read_claim, upwards
from fedistill.release.document import Card
from fedistill.release.make import make_release
from fedistill.release.seal import keygen, load_private
from fedistill.release.verify import verify
from fedistill.synthetic.merge import merge
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import quantise


def halved(made: SyntheticSet) -> SyntheticSet:
    """The set with every other pixel, enlarged again."""
    return quantise(replace(made, images=enlarge(reduce(made.images, 2), 2), scale=2))


ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "private": lambda: set_of(private()),
    "open": lambda: set_of(NONE),
    "mixed": lambda: set_of(private(), NONE),
    "soft": lambda: set_of(private(), soft=True, classes=3, shape=(3, 28, 28)),
    "multilabel": lambda: set_of(NONE, kind="multilabel", classes=14),
    "enlarged": lambda: halved(set_of(private())),
    "volumes": lambda: set_of(NONE, shape=(1, 28, 28, 28), classes=11, per_class=6),
}


def released(made: SyntheticSet, folder: Path, **more) -> dict:
    make_release(made, folder, CARD, **more)
    return json.loads((folder / "privacy.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_set_comes_back(name: str, tmp_path: Path) -> None:
    made = SETS[name]()
    released(made, tmp_path / "out")
    back = load_set(tmp_path / "out")
    assert torch.equal(back.images, made.images)
    assert torch.equal(back.labels, made.labels)
    assert back.manifest == made.manifest
    assert verify(tmp_path / "out").problems == ()
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]
    assert Image.open(tmp_path / "out" / "contact-sheet.png").height > 40


@pytest.mark.parametrize("name", SETS)
def test_croissant_is_valid(name: str, tmp_path: Path) -> None:
    mlc = pytest.importorskip("mlcroissant")
    made = SETS[name]()
    released(made, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mlc.Dataset(jsonld=tmp_path / "out" / "croissant.json")
        names = [record["classes/name"] for record in found.records("classes")]
    assert not found.metadata.ctx.issues.errors
    assert not found.metadata.ctx.issues.warnings
    assert [n.decode() if isinstance(n, bytes) else n for n in names] == list(made.class_names)
    assert {f.name for f in found.metadata.distribution} == {p.name for p in (tmp_path / "out").iterdir()} - {
        "croissant.json",
        "SHA256SUMS",
    }
    assert read_claim(made).sentence in found.metadata.personal_sensitive_information
    plain = json.loads((tmp_path / "out" / "croissant.json").read_text())
    assert ("fedistill:epsilon" in plain) is read_claim(made).formal


@pytest.mark.parametrize(
    ("name", "flag", "python_class"),
    [
        ("private", "pneumoniamnist", "PneumoniaMNIST"),
        ("soft", "pathmnist", "PathMNIST"),
        ("multilabel", "chestmnist", "ChestMNIST"),
        ("volumes", "organmnist3d", "OrganMNIST3D"),
    ],
)
def test_medmnist_loads_the_file(name: str, flag: str, python_class: str, tmp_path: Path, monkeypatch) -> None:
    import medmnist

    made = SETS[name]()
    released(made, tmp_path / "out")
    shutil.copy(tmp_path / "out" / "toy.npz", tmp_path / f"{flag}.npz")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'INFO["{flag}"]["n_samples"]["train"] = {len(made)}' in card
    monkeypatch.setitem(medmnist.INFO[flag]["n_samples"], "train", len(made))
    loaded = getattr(medmnist, python_class)(split="train", root=tmp_path)
    assert len(loaded) == len(made)
    for k in (0, len(made) - 1):
        image, target = loaded[k]
        expected = (made.images[k] * made.std + made.mean).clamp(0, 1).numpy()
        values = np.asarray(image, dtype=np.float64) / (1 if name == "volumes" else 255)
        values = values if name == "volumes" else values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        assert np.abs(values - expected).max() <= 0.5 / 255 + 1e-6
        if made.kind == "multilabel":
            assert target.tolist() == (made.labels[k] >= 0.5).int().tolist()
        else:
            assert target.tolist() == [int(made.labels[k].argmax())]
    for split in ("val", "test"):
        assert len(getattr(medmnist, python_class)(split=split, root=tmp_path).imgs) == 0


@pytest.mark.parametrize("name", ["mixed", "soft", "volumes"])
def test_own_reader_takes_the_file(name: str, tmp_path: Path) -> None:
    made = SETS[name]()
    released(made, tmp_path / "out")
    data = load_data(make_config({"data": str(tmp_path / "out" / "toy.npz")}))
    assert data.class_names == made.class_names
    assert data.site_names == made.sites
    assert data.modality == "xray"
    assert data.geometry == made.geometry
    assert sum(len(split) for split in data.splits.values()) == len(made)


def test_card_header_is_yaml_and_text_cannot_break_out(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    card = Card(
        name="toy",
        date="2026-11-03",
        publisher="A & B\n## Forged",
        license='Own: "terms"\n- x',
        description="<script>x</script>\n\n# Title | cell",
    )
    made = set_of(NONE)
    made = SyntheticSet(**(made.__dict__ | {"class_names": ("a|b", "c\nd")}))
    make_release(made, tmp_path / "out", card)
    text = (tmp_path / "out" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["license"] == "other"
    assert found["license_name"] == 'Own: "terms" - x'
    assert found["task_categories"] == ["image-classification"]
    assert found["size_categories"] == ["n<1K"]
    assert found["pretty_name"] == "toy"
    assert {"medical", "synthetic", "xray"} <= set(found["tags"])
    assert "differential-privacy" not in found["tags"]
    assert "<script>" not in body
    assert "\n## Forged" not in body
    assert "\n# Title" not in body
    assert r"a\|b" in body


def test_known_and_unspecified_licenses(tmp_path: Path) -> None:
    for k, (license, expected) in enumerate(
        ((CARD.license, "cc-by-4.0"), (Card(name="x", date="").license, "unknown"))
    ):
        make_release(set_of(NONE), tmp_path / str(k), Card(name="toy", date="2026-11-03", license=license))
        text = (tmp_path / str(k) / "README.md").read_text()
        assert text.startswith(f"---\nlicense: {expected}\n")
        assert license in json.loads((tmp_path / str(k) / "croissant.json").read_text())["license"]


def test_the_card_of_a_set_that_is_kept_smaller_says_so(tmp_path: Path) -> None:
    made = SETS["enlarged"]()
    released(made, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "28x28 pixels (kept as 14x14 and enlarged) with 1 channel " in card
    assert "`scale`" in card
    assert np.load(tmp_path / "out" / f"{CARD.name}.npz")["train_images"].shape == (len(made), 28, 28)
    released(SETS["private"](), tmp_path / "plain")
    assert "kept as" not in (tmp_path / "plain" / "README.md").read_text()


def test_guarantee_stands_first(tmp_path: Path) -> None:
    said = released(set_of(private()), tmp_path / "out")
    assert next(iter(said)) == "guarantee"
    assert said["epsilon"] == private()["epsilon"]
    assert said["delta"] == DELTA
    assert said["unit"]["protected"] == "image"
    assert said["audit"] == "not audited"
    assert said["copies"] == "not computed"
    assert [c["number"] for c in said["conditions"]] == list(range(1, 11))
    assert {c["status"] for c in said["conditions"]} == {"passed", "declared"}
    site = said["accounting"][0]
    assert site["mechanisms"] == private()["mechanisms"]
    assert site["second"]["epsilon"] == pytest.approx(site["epsilon"], abs=0.02)
    body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[2]
    assert body.index(said["guarantee"].split(",")[0]) < body.index("## ")


def test_without_guarantee_every_part_says_so(tmp_path: Path) -> None:
    for name in ("open", "mixed"):
        said = released(SETS[name](), tmp_path / name)
        assert said["guarantee"].startswith("No formal guarantee")
        assert not {"epsilon", "delta"} & set(said)
        assert {c["status"] for c in said["conditions"]} == {"not-applicable"}
        head = (tmp_path / name / "README.md").read_text().split("---\n", 2)[2][:60]
        assert "No formal guarantee" in head
        assert "fedistill:epsilon" not in json.loads((tmp_path / name / "croissant.json").read_text())
    assert "epsilon" not in (tmp_path / "open" / "privacy.json").read_text()
    assert "site-1" in said["guarantee"]
    assert "site-0" not in said["guarantee"]


def test_merged_guarantee_is_the_largest_of_disjoint_sites() -> None:
    weak = private(unit="patient", epsilon=5.0, delta=1e-3, adjacency="add-remove")
    claim = read_claim(set_of(private(), weak))
    assert (claim.epsilon, claim.delta, claim.unit) == (5.0, 1e-3, "image")
    assert claim.adjacencies == ("add-remove", "zero-out")
    assert read_claim(set_of(weak)).unit == "patient"


def test_merge_of_sets_releases(tmp_path: Path) -> None:
    north, south = set_of(private()), set_of(private())
    south = SyntheticSet(**(south.__dict__ | {"sites": ("south",), "manifest": {"south": south.manifest["site-0"]}}))
    said = released(merge([north, south]), tmp_path / "out")
    assert [site["site"] for site in said["accounting"]] == ["site-0", "south"]
    assert "add up" in said["unit"]["overlap"]


def test_conditions_that_nobody_states_are_not_passed() -> None:
    some = [{"number": 1, "name": "x", "status": "passed", "how": ""}]
    found = read_claim(set_of(private(conditions=some), private())).conditions()
    assert found[0].status == "passed"
    assert {c.status for c in found[1:]} == {"not-stated"}
    assert len(found) == len(CONDITIONS)


def test_words_that_draw_legal_conclusions_do_not_occur(tmp_path: Path, audit) -> None:
    words = re.compile("an[o]nym|complian[t]", re.IGNORECASE)
    for path in (ROOT / "fedistill").rglob("*.py"):
        assert not words.search(path.read_text()), path
    for name, make in SETS.items():
        asked = {} if read_claim(make()).sites[0].formal else {"claimed_epsilon": None}
        released(make(), tmp_path / name, audit=audit | asked)
        for path in (tmp_path / name).iterdir():
            assert not words.search(path.read_bytes().decode("latin1")), path
    card = Card(name="toy", date="2026-11-03", description="Fully Anonymous images.")
    with pytest.raises(FedistillError, match="'Anonymous', which is a legal conclusion"):
        make_release(set_of(NONE), tmp_path / "bad", card)
    assert not (tmp_path / "bad").exists()


def test_real_images_and_starts(tmp_path: Path) -> None:
    said = released(set_of(NONE, about={"init": "real"}), tmp_path / "out")
    assert "REAL PATIENTS' IMAGES" in said["guarantee"]
    assert "REAL PATIENTS' IMAGES" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(FedistillError, match="Condition 2 failed"):
        released(set_of(private(), about={"init": "real"}), tmp_path / "real")
    with pytest.raises(FedistillError, match="never released") as caught:
        released(set_of(NONE, about={"method": "herding"}), tmp_path / "real")
    assert caught.value.code == "real-images"


def test_audit_is_quoted_and_can_forbid(tmp_path: Path, audit) -> None:
    from fedistill.release.audit import checked_audit

    said = released(set_of(private()), tmp_path / "out", audit=checked_audit(audit, "here"))
    assert said["audit"]["epsilon_lower"] == 0.4
    assert said["audit"]["ceiling"] == 3.49
    assert said["copies"] == {"exact": 0, "images": 12}
    assert "a name that is not quoted" not in json.dumps(said)
    assert verify(tmp_path / "out").problems == ()
    with pytest.raises(FedistillError, match="contradicts the claim") as caught:
        released(set_of(private()), tmp_path / "bad", audit=checked_audit(audit | {"epsilon_lower": 3.4}, "here"))
    assert caught.value.code == "audit-contradicts"
    unclaimed = audit | {"epsilon_lower": 3.4, "claimed_epsilon": None}
    released(set_of(NONE), tmp_path / "open", audit=checked_audit(unclaimed, "here"))
    blind = checked_audit(audit | {"broken_arm": {"caught": False}}, "here")
    assert blind["power"] is False


@pytest.mark.parametrize(
    ("privacy", "changes"),
    [(NONE, {"method": "sketch", "claimed_epsilon": 1.0}), (None, {"claimed_epsilon": 10.0}), (None, {"method": "dm"})],
)
def test_an_audit_of_something_else_is_not_quoted(privacy, changes: dict, tmp_path: Path, audit) -> None:
    from fedistill.release.audit import checked_audit

    with pytest.raises(FedistillError, match="The audit attacked method=") as caught:
        released(set_of(privacy or private()), tmp_path / "out", audit=checked_audit(audit | changes, "here"))
    assert caught.value.code == "other-audit"
    assert not (tmp_path / "out").exists()


def test_a_set_with_real_images_in_it_is_not_released(tmp_path: Path) -> None:
    from fedistill.release.audit import checked_audit

    audit = {"epsilon_lower": 0.0, "ceiling": 2.0, "confidence": 0.95, "claimed_epsilon": None, "method": "ptm"}
    released(set_of(NONE), tmp_path / "fine", audit=checked_audit(audit | {"copies": {"exact": 0}}, "here"))
    with pytest.raises(FedistillError, match="3 synthetic images that are real") as caught:
        released(set_of(NONE), tmp_path / "out", audit=checked_audit(audit | {"copies": {"exact": 3}}, "here"))
    assert caught.value.code == "copies"


def test_failed_condition_forbids(tmp_path: Path) -> None:
    failed = [{"number": 9, "name": "x", "status": "failed", "how": "Batches were shuffled."}]
    with pytest.raises(FedistillError, match=r"Condition 9 failed.*Batches were shuffled") as caught:
        released(set_of(private(), private(conditions=failed)), tmp_path / "out")
    assert caught.value.code == "condition-failed"
    assert list(tmp_path.iterdir()) == []


def test_claim_below_the_accountants_is_not_released(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match=r"come to 3\.2") as caught:
        released(set_of(private(epsilon=3.0, second=None)), tmp_path / "out")
    assert caught.value.code == "unsound"
    with pytest.raises(FedistillError, match="second accountant"):
        released(set_of(private(second={"epsilon": 1.0, "accountant": "mine"})), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epsilon": "3"}, "epsilon is not a number"),
        ({"epsilon": True}, "epsilon is not a number"),
        ({"epsilon": -1.0}, "epsilon is not a number from 0"),
        ({"delta": None}, "delta is not a number"),
        ({"delta": 1.0}, "delta is not strictly"),
        ({"unit": "hospital"}, "unit is none of image"),
        ({"unit": ["image"]}, "unit is none of image"),
        ({"adjacency": "replace-one"}, "adjacency is none of"),
        ({"accountant": 3}, "accountant is not a text"),
        ({"mechanisms": []}, "no mechanisms"),
        ({"mechanisms": [3]}, "a mechanism is not a record"),
        ({"mechanisms": [{"name": "x", "sample_rate": 2, "noise_multiplier": 1, "steps": 1, "clip_norm": 1}]}, "sample_rate"),
        ({"mechanisms": [{"name": "x", "sample_rate": 0.1, "noise_multiplier": 0, "steps": 1, "clip_norm": 1}]}, "no noise"),
        ({"mechanisms": [{"name": "x", "sample_rate": 0.1, "noise_multiplier": 1, "steps": 1e9, "clip_norm": 1}]}, "steps"),
        ({"conditions": [{"number": 11, "status": "passed"}]}, "number is not a number from 1 to 10"),
        ({"conditions": [{"number": 1, "status": "fine"}]}, "status of"),
        ({"conditions": 2 * [{"number": 1, "status": "passed"}]}, "listed twice"),
        ({"public": "phantoms"}, "public is not a list"),
        ({"second": 3}, "second is not a record"),
        ({"noise": {"Seed": 3}}, "'Seed'"),
    ],
)  # fmt: skip
def test_a_promise_is_not_taken_on_trust(changes: dict, text: str) -> None:
    with pytest.raises(FedistillError, match=text) as caught:
        read_claim(set_of(private(**changes)))
    assert caught.value.code in ("bad-privacy", "seed-in-manifest")


def test_absent_promises_are_none() -> None:
    made = set_of(NONE)
    for manifest in ({}, {"site-0": 3}, {"site-0": {}}, {"site-0": {"privacy": 3}}, {"site-0": {"privacy": {}}}):
        assert not read_claim(SyntheticSet(**(made.__dict__ | {"manifest": manifest}))).formal


def test_epsilon_is_never_rounded_down() -> None:
    assert [upwards(e) for e in (9.99, 9.991, 0.0, 3.0001)] == ["9.99", "10.00", "0.00", "3.01"]
    assert certainty(0.0) == "50.000"
    assert certainty(1.0) == "73.106"  # e / (1 + e) = 73.1058...
    assert certainty(1e9) == "more than 99.999"


def test_signed_release(tmp_path: Path) -> None:
    public = keygen(tmp_path / "keys" / "key")
    assert (tmp_path / "keys" / "key").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in public.read_bytes()
    said = released(set_of(private()), tmp_path / "out", key=load_private(tmp_path / "keys" / "key"))
    assert said["signature"].startswith("Ed25519")
    assert "signed" in (tmp_path / "out" / "README.md").read_text()
    found = verify(tmp_path / "out")
    assert found.problems == ()
    assert "compare it with the publisher's" in found.notes[0]


def test_same_input_gives_the_same_release(tmp_path: Path) -> None:
    for name in ("a", "b"):
        released(set_of(private()), tmp_path / name)
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FedistillError, match="exists already"):
        make_release(set_of(NONE), tmp_path / "there", CARD)
    with pytest.raises(FedistillError, match="cannot name a file"):
        make_release(set_of(NONE), tmp_path / "out", Card(name="../x", date="2026-11-03"))
    with pytest.raises(FedistillError, match="is no release"):
        verify(tmp_path / "there")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FedistillError, match="not an Ed25519 private key"):
        load_private(tmp_path / "text")
    with pytest.raises(FedistillError, match="cannot be written"):
        make_release(set_of(NONE), tmp_path / "text" / "out", CARD)
    keygen(tmp_path / "key")
    with pytest.raises(FedistillError, match="never overwritten"):
        keygen(tmp_path / "key")
