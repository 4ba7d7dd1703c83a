"""Everything that was tampered with is found, even by somebody who also mends the checksums."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims import CARD, NONE, private, set_of

from fedistill import cli
from fedistill.errors import FedistillError
from fedistill.privacy import accounting
from fedistill.release.audit import checked_audit, read_audit
from fedistill.release.make import make_release
from fedistill.release.seal import keygen, load_private, load_public, seal
from fedistill.release.verify import verify
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import save_set

AUDIT = {"epsilon_lower": 0.4, "ceiling": 3.49, "confidence": 0.95, "method": "ptm", "claimed_epsilon": 3.3}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    keygen(folder / "key")
    make_release(set_of(private(), soft=True), folder / "out", CARD, key=load_private(folder / "key"))
    make_release(set_of(private(), soft=True), folder / "unsigned", CARD)
    make_release(set_of(NONE), folder / "open", CARD)
    return folder


@pytest.fixture
def signed(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def unsigned(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "unsigned", tmp_path / "unsigned")
    return tmp_path / "unsigned"


@pytest.fixture
def fedistill(monkeypatch, capsys):
    """Run the command line; (exit code, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedistill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, " ".join(err.split())

    monkeypatch.setenv("COLUMNS", "200")
    return run


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, sort_keys=True))


def test_every_changed_byte_is_found(signed: Path) -> None:
    for path in sorted(signed.iterdir()):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert verify(signed).problems, (path.name, place)
        path.write_bytes(content)
    assert verify(signed).problems == ()


def test_every_missing_file_is_found(signed: Path) -> None:
    for path in sorted(signed.iterdir()):
        content = path.read_bytes()
        path.unlink()
        assert any(path.name in problem for problem in verify(signed).problems), path.name
        path.write_bytes(content)
    assert verify(signed).problems == ()


def test_what_does_not_belong_is_found(signed: Path, tmp_path: Path) -> None:
    (signed / "more").mkdir()
    (signed / "notes.txt").write_text("hello")
    assert [p.split()[0] for p in verify(signed).problems] == ["more", "notes.txt"]
    shutil.rmtree(signed / "more")
    (signed / "notes.txt").unlink()
    elsewhere = tmp_path / "same"
    (signed / "README.md").rename(elsewhere)
    (signed / "README.md").symlink_to(elsewhere)
    assert any("README.md" in p for p in verify(signed).problems)


def test_signature_of_another_key(signed: Path, original: Path, tmp_path: Path) -> None:
    publisher = load_public(original / "key.pub")
    assert verify(signed, publisher).problems == ()
    assert verify(signed, publisher).signature.startswith("by the given key")
    other = load_public(keygen(tmp_path / "other"))
    assert any("not that of the given public key" in p for p in verify(signed, other).problems)
    seal(signed, load_private(tmp_path / "other"))
    assert any("not that of the enclosed key" in p for p in verify(signed).problems)
    shutil.copy(tmp_path / "other.pub", signed / "PUBLIC-KEY.pem")
    edited(signed / "privacy.json", lambda d: d.update(description="forged"))
    seal(signed, load_private(tmp_path / "other"))
    found = verify(signed, publisher)
    assert found.signature == "bad"
    assert any("not that of the given public key" in p for p in found.problems)


def test_a_signature_cannot_be_taken_off(signed: Path, unsigned: Path, original: Path) -> None:
    for name in ("SIGNATURE", "PUBLIC-KEY.pem"):
        (signed / name).unlink()
    seal(signed, None)
    assert any("whether the release is signed" in p for p in verify(signed).problems)
    assert verify(unsigned).problems == ()
    assert verify(unsigned, load_public(original / "key.pub")).problems == (
        "The release is not signed: it has no SIGNATURE.",
    )


LIES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "epsilon": ("unsigned", lambda f: edited(f / "privacy.json", lambda d: d.update(epsilon=0.1)), "about 'epsilon'"),
    "guarantee": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d.update(guarantee="Safe.")),
        "'guarantee'",
    ),
    "unit": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d["unit"].update(protected="patient")),
        "'unit'",
    ),
    "condition": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d["conditions"][4].update(status="passed")),
        "'conditions'",
    ),
    "noise": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d["accounting"][0]["mechanisms"][0].update(steps=1)),
        "'accounting'",
    ),
    "invented": ("open", lambda f: edited(f / "privacy.json", lambda d: d.update(epsilon=1.0)), "claims an epsilon"),
    "croissant": (
        "unsigned",
        lambda f: edited(f / "croissant.json", lambda d: d.update({"fedistill:epsilon": 0.1})),
        "croissant.json disagrees",
    ),
    "readme": (
        "unsigned",
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("epsilon = ", "epsilon = 0")),
        "README.md does not state",
    ),
    "audit": (
        "unsigned",
        lambda f: edited(
            f / "privacy.json",
            lambda d: d.update(audit={"epsilon_lower": 9, "ceiling": 10, "confidence": 0.9, "method": "ptm"}),
        ),
        "contradicts the claim",
    ),
    "audit of another method": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d.update(audit=AUDIT | {"method": "dm"})),
        "attacked method=dm with epsilon=3.3, and the set was made by method=ptm with epsilon=3.2",
    ),
    "audit of another epsilon": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d.update(audit=AUDIT | {"claimed_epsilon": 1.0})),
        "attacked method=ptm with epsilon=1, and the set",
    ),
    "audit of nothing private": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d.update(audit=AUDIT | {"claimed_epsilon": None})),
        "attacked method=ptm without privacy",
    ),
    "private audit": (
        "open",
        lambda f: edited(f / "privacy.json", lambda d: d.update(audit=AUDIT)),
        "was made by method=ptm without privacy",
    ),
    "empty ledger": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d.update(ledger={"spent so far": "nothing", "data_sets": []})),
        "does not stand on the ledger that is quoted",
    ),
    "poor ledger": (
        "unsigned",
        lambda f: edited(
            f / "privacy.json", lambda d: d.update(ledger={"data_sets": [3, {"epsilon": 2.0, "delta": d["delta"]}]})
        ),
        "does not stand on the ledger that is quoted",
    ),
    "untyped audit": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d.update(audit={"epsilon_lower": "0"})),
        "epsilon_lower is not a number",
    ),
    "name": (
        "unsigned",
        lambda f: edited(f / "privacy.json", lambda d: d["data"].update(name="../../etc/passwd")),
        "cannot be that of a file",
    ),
    "no record": ("unsigned", lambda f: (f / "privacy.json").write_text("[1]"), "is not a record"),
    "not json": ("unsigned", lambda f: (f / "privacy.json").write_text('{"epsilon": NaN}'), "is not JSON"),
    "lacking": ("unsigned", lambda f: edited(f / "privacy.json", lambda d: d.pop("released")), "no 'released'"),
    "set": ("unsigned", lambda f: (f / "set.safetensors").write_bytes(b"12345678"), "files are damaged"),
    "sites": ("unsigned", lambda f: edited(f / "manifest.json", lambda d: d.update(sites=[])), "cannot be read"),
    "npz": (
        "unsigned",
        lambda f: np.savez(f / "toy.npz", train_images=np.zeros((2, 28, 28), np.uint8)),
        "does not hold the images",
    ),
    "npz bomb": (
        "unsigned",
        lambda f: np.savez_compressed(f / "toy.npz", train_images=np.zeros((2000, 280, 280), np.uint8)),
        "holds more than",
    ),
    "sheet": (
        "unsigned",
        lambda f: (f / "contact-sheet.png").write_bytes((f / "README.md").read_bytes()),
        "another contact-sheet.png",
    ),
    "croissant file": (
        "unsigned",
        lambda f: edited(f / "croissant.json", lambda d: d["distribution"][0].update(sha256="0" * 64)),
        "croissant.json describes another README.md",
    ),
    "npz damaged": ("unsigned", lambda f: (f / "toy.npz").write_bytes(b"PK"), "toy.npz cannot be read"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_with_fresh_checksums_are_found(name: str, original: Path, tmp_path: Path) -> None:
    source, lie, text = LIES[name]
    shutil.copytree(original / source, tmp_path / "out")
    lie(tmp_path / "out")
    seal(tmp_path / "out", None)
    problems = verify(tmp_path / "out").problems
    assert any(text in problem for problem in problems), problems
    assert not any("was changed: its checksum" in problem for problem in problems)


def lied(entry: dict[str, Any], folder: Path, original: Path) -> tuple[str, ...]:
    """Problems of a release whose manifest was changed to `entry`."""
    shutil.copytree(original / "unsigned", folder)
    edited(folder / "manifest.json", lambda d: d["manifest"]["site-0"].update(privacy=entry))
    seal(folder, None)
    return verify(folder).problems


def test_accounts_are_done_again(original: Path, tmp_path: Path) -> None:
    found = lied(private(epsilon=2.0, second={"epsilon": 2.0, "accountant": "mine"}), tmp_path / "low", original)
    assert any("come to 3.2" in p for p in found)
    assert any("second accountant finds 3.2" in p for p in found)
    found = lied(private(second={"epsilon": 2.0, "accountant": "mine"}), tmp_path / "second", original)
    assert any("second accountant that it quotes disagrees" in p for p in found)
    found = lied(private(delta=1e-6), tmp_path / "delta", original)  # a smaller delta at the same price
    assert any("claims epsilon" in p for p in found)
    failed = [{"number": 1, "name": "x", "status": "failed", "how": ""}]
    assert any("Condition 1 failed" in p for p in lied(private(conditions=failed), tmp_path / "failed", original))


def test_without_second_accountant_it_is_said(unsigned: Path, monkeypatch) -> None:
    from fedistill.release import verify as module

    monkeypatch.setattr(module, "cross_check", lambda mechanisms, delta: None)
    found = verify(unsigned)
    assert found.problems == ()
    assert any("second accountant was not asked" in note for note in found.notes)


def test_disagreeing_accountants_are_found(unsigned: Path, monkeypatch) -> None:
    from fedistill.release import verify as module

    def high(mechanisms, delta):
        return accounting.Accounted(epsilon=4.0, delta=delta, accountant="other")

    monkeypatch.setattr(module, "cross_check", high)
    assert any("the second accountant finds 4.0" in p for p in verify(unsigned).problems)


def test_audit_files_are_checked(tmp_path: Path, audit) -> None:
    path = tmp_path / "audit.json"
    for change, text in (
        ({"epsilon_lower": None}, "epsilon_lower is not a number"),
        ({"epsilon_lower": -1}, "epsilon_lower is not a number"),
        ({"confidence": 1}, "confidence is not between"),
        ({"claimed_epsilon": "10"}, "neither a number nor null"),
        ({"method": None}, "no method that was attacked"),
        ({"attacks": {}}, "attacks is not a list"),
        ({"attacks": [{}]}, "an attack has no name"),
        ({"broken_arm": []}, "broken_arm is not a record"),
        ({"power": 1}, "power is neither"),
    ):
        path.write_text(json.dumps(audit | change))
        with pytest.raises(FedistillError, match=text):
            read_audit(path)
    path.write_text(json.dumps(audit).replace("3.49", "1e999"))
    with pytest.raises(FedistillError, match="not JSON"):
        read_audit(path)
    with pytest.raises(FedistillError, match="no audit result"):
        read_audit(tmp_path / "none.json")
    assert "seed" not in json.dumps(checked_audit(audit | {"attacks": [{"name": "x", "seed": 3}]}, "here"))


def test_command_line(tmp_path: Path, fedistill, audit) -> None:
    save_set(set_of(private(), soft=True), tmp_path / "set")
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    code, out, _ = fedistill("release", "keygen", tmp_path / "key", "--json")
    assert code == 0
    public = json.loads(out)
    arguments = ["release", "make", tmp_path / "set", tmp_path / "out", "--name", "toy", "--key", tmp_path / "key"]
    code, out, err = fedistill(*arguments, "--publisher", "Hospital", "--audit", tmp_path / "audit.json")
    assert (code, out) == (0, "")
    assert err.startswith("Differential privacy with epsilon = 3.28")
    code, out, _ = fedistill("release", "show", tmp_path / "out")
    assert code == 0
    assert out.startswith("Differential privacy with epsilon = 3.28")
    for word in (
        "60 noisy sums",
        "passed: 1 ",
        "declared: 5",
        "at least 0.40",
        "of method=ptm with epsilon=3.3;",
        public["fingerprint"],
        "unchanged",
        "bytes",
    ):
        assert word in out
    code, out, _ = fedistill("release", "verify", tmp_path / "out", "--public-key", public["public"], "--json")
    said = json.loads(out)
    assert (code, said["sound"], said["problems"]) == (0, True, [])
    (tmp_path / "out" / "README.md").write_text("No formal worries")
    code, out, _ = fedistill("release", "verify", tmp_path / "out")
    assert code == 1
    assert "README.md was changed" in out
    code, out, _ = fedistill("release", "show", tmp_path / "out", "--json")
    assert "README.md was changed" in json.loads(out)["checks"]["problems"][0]
    code, _, err = fedistill(*arguments)
    assert (code, "exists already" in err) == (2, True)


def test_command_line_says_that_there_is_no_guarantee(tmp_path: Path, fedistill) -> None:
    save_set(set_of(private(), NONE), tmp_path / "set")
    code, out, err = fedistill("release", "make", tmp_path / "set", tmp_path / "out", "--name", "toy")
    assert code == 0
    assert err.startswith("No formal guarantee: the images of site-1")
    assert "unsigned" in err
    code, out, _ = fedistill("release", "show", tmp_path / "out")
    assert out.startswith("No formal guarantee")
    assert "unspecified" in out
    code, out, _ = fedistill("release", "verify", tmp_path / "out")
    assert code == 0
    assert "No formal guarantee" in out
    assert "not signed" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["make", "none", "out", "--name", "toy"], "none holds no synthetic set"),
        (["make", "set", "out", "--name", "a b"], "name='a b' cannot name a file"),
        (["make", "set", "out", "--name", "toy", "--key", "set"], "set is not an Ed25519 private key"),
        (["make", "set", "out", "--name", "toy", "--audit", "none"], "There is no audit result none"),
        (["make", "set", "out", "--name", "toy", "--audit", "set/set.safetensors"], "cannot be used"),
        (["make", "set", "out", "--name", "toy", "--description", "non-complian" "t"], "is a legal conclusion"),
        (["make", "set", "out"], "--name"),
        (["show", "set"], "set is no release"),
        (["verify", "none"], "none is no release"),
        (["verify", "set", "--public-key", "set/manifest.json"], "is not an Ed25519 public key"),
        (["keygen", "set"], "set exists already"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch, fedistill) -> None:
    monkeypatch.chdir(tmp_path)
    save_set(set_of(NONE), tmp_path / "set")
    code, out, err = fedistill("release", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_ledger_is_summed_up_without_names(tmp_path: Path, fedistill) -> None:
    books = pytest.importorskip("fedistill.privacy.ledger")
    mechanism = accounting.Mechanism(name="dp-sgd", sample_rate=0.2, noise_multiplier=2.0, steps=60)
    book = books.Ledger(tmp_path / "ledger.db")
    for key in ("one", "two"):
        book.spend(key=key, data="secret-word", unit="image", what="work", delta=1e-4, mechanisms=[mechanism])
    save_set(set_of(private()), tmp_path / "set")
    arguments = ["release", "make", tmp_path / "set", tmp_path / "out", "--name", "toy"]
    code, _, _ = fedistill(*arguments, "--ledger", tmp_path / "ledger.db")
    assert code == 0
    said = json.loads((tmp_path / "out" / "privacy.json").read_text())
    assert said["ledger"]["data_sets"][0]["entries"] == 2
    assert said["ledger"]["data_sets"][0]["epsilon"] > said["epsilon"]
    assert "secret-word" not in json.dumps(said)
    assert verify(tmp_path / "out").problems == ()
    code, _, err = fedistill(*arguments[:3], tmp_path / "two", "--name", "toy", "--ledger", tmp_path / "none.db")
    assert (code, "no ledger" in err) == (2, True)


@pytest.mark.parametrize("spent", [None, {"noise_multiplier": 2.1}, {"steps": 59}, {"unit": "patient"}])
def test_a_ledger_without_the_work_of_the_set_is_refused(
    spent: dict[str, Any] | None, tmp_path: Path, fedistill
) -> None:
    books = pytest.importorskip("fedistill.privacy.ledger")
    book = books.Ledger(tmp_path / "ledger.db")
    if spent is not None:
        fields = {"name": "dp-sgd", "sample_rate": 0.2, "noise_multiplier": 2.0, "steps": 60} | spent
        unit = fields.pop("unit", "image")
        work = {"what": "work", "delta": 1e-4, "mechanisms": [accounting.Mechanism(**fields)]}
        for key in ("one", "two"):  # much, but nothing of this set
            book.spend(key=key, data="word", unit=unit, **work)
    save_set(set_of(private()), tmp_path / "set")
    arguments = ["release", "make", tmp_path / "set", tmp_path / "out", "--name", "toy"]
    code, _, err = fedistill(*arguments, "--ledger", tmp_path / "ledger.db")
    assert (code, "does not stand on the ledger" in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_release_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    from fedistill.release import make as module

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        make_release(set_of(NONE), tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []


def test_sites_of_any_name(tmp_path: Path) -> None:
    made = set_of(NONE)
    name = "St. Mary's | *north* <b>"
    renamed = SyntheticSet(**(made.__dict__ | {"sites": (name,), "manifest": {name: made.manifest["site-0"]}}))
    make_release(renamed, tmp_path / "out", CARD)
    assert verify(tmp_path / "out").problems == ()
    assert r"St. Mary's \| \*north\* \<b\>" in (tmp_path / "out" / "README.md").read_text()
