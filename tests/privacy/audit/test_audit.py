"""Whole audits of tiny phantoms: leaks are caught, what ignores the data is not blamed, and a killed audit goes on."""

from __future__ import annotations

import json
import random
import secrets
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedistill import cli
from fedistill.commands import shared
from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.privacy.audit import audit as module
from fedistill.privacy.audit.audit import _unseen, audit, broken, claim_of
from fedistill.privacy.audit.canaries import choose, with_canaries
from fedistill.privacy.audit.onerun import ceiling
from fedistill.synthetic.set import SyntheticSet, one_hot

SETTINGS = {
    "phantom_images": 160,
    "phantom_classes": 2,
    "phantom_size": 16,
    "preset": "quick",
    "method": "random",
    "ipc": 3,
    "width": 4,
    "eval_steps": 4,
    "eval_models": "convnet",
    "workers": 1,
}
SIZES = {"canaries": 40, "shadows": 4}


@pytest.fixture(autouse=True)
def coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same coins every time: one audit in twenty may overshoot, but not in these tests."""
    source = random.Random(0)
    monkeypatch.setattr(secrets, "randbits", source.getrandbits)


@pytest.fixture(scope="module")
def config() -> Config:
    return make_config(SETTINGS).resolved()


@pytest.fixture(scope="module")
def data(config: Config) -> Dataset:
    return load_data(config)


def ignorant(config: Config, data: Dataset, name: str, folder: Path, on_progress: object = None) -> SyntheticSet:
    """A set that has nothing to do with the data."""
    rng = torch.Generator().manual_seed(1)
    return SyntheticSet(
        images=torch.randn(12, *data.geometry, generator=rng),
        labels=one_hot(torch.arange(12) % data.classes, data.classes),
        site=torch.zeros(12, dtype=torch.int64),
        sites=(name,),
        class_names=data.class_names,
        mean=0.4,
        std=0.25,
        modality=data.modality,
        step_size=(0.1,),
        manifest={name: {}},
    )


def only_control(config: Config, *rest: object) -> SyntheticSet:
    """Ignores the data, but for the control."""
    return (REHEARSE if config.ipc > 3 else ignorant)(config, *rest)


REHEARSE = module.rehearse


def test_a_release_that_ignores_the_data_is_not_blamed_and_the_control_is_caught(
    config, data, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "rehearse", only_control)
    monkeypatch.setattr(module, "claim_of", lambda config, records: (1.0, 1e-3))
    found = audit(config, data, "north", tmp_path, **SIZES)
    assert found["epsilon_lower"] < 0.1
    assert not found["contradicts"]
    assert found["copies"]["exact"] == 0
    assert not found["copies"]["red_flag"]
    assert all(abs(a["auc"] - 0.5) < 0.15 for a in found["attacks"])
    assert found["power"]
    assert found["broken_arm"]["caught"]
    assert found["broken_arm"]["epsilon_lower"] > 0.8
    assert {a["name"]: a["auc"] for a in found["broken_arm"]["attacks"]}["nearest"] > 0.9
    assert found["ceiling"] == ceiling(26, canaries=40, delta=1e-3, confidence=0.975)
    assert (found["canaries"], found["shadows"], found["claimed_epsilon"], found["delta"]) == (40, 4, 1.0, 1e-3)
    assert all(a["pairs"] == 160 for a in found["attacks"])
    assert "patients" in found["notes"][-1]
    json.dumps(found)


def test_a_claim_that_is_not_kept_is_contradicted(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "claim_of", lambda config, records: (0.3, 1e-3))
    leaky = make_config(SETTINGS | {"ipc": 60}).resolved()  # real images, nearly all of them
    found = audit(leaky, data, "north", tmp_path, **SIZES)
    assert found["contradicts"]
    assert 0.3 < found["epsilon_lower"] <= found["ceiling"]
    assert found["copies"]["exact"] == found["copies"]["images"] == 120
    assert any("exact copies" in note for note in found["notes"])


def test_an_attack_that_misses_the_control_has_no_power(config, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "rehearse", ignorant)
    found = audit(config, data, "north", tmp_path, **SIZES)
    assert not found["power"]
    assert not found["broken_arm"]["caught"]
    assert any("no power" in note for note in found["notes"])


def test_a_real_method_with_phantom_canaries(data, tmp_path) -> None:
    dm = make_config(SETTINGS | {"method": "dm", "iterations": 3}).resolved()
    steps: list[module.Step] = []
    found = audit(dm, data, "north", tmp_path, canaries=12, shadows=4, source="phantom", on_progress=steps.append)
    assert found["method"] == "dm"
    assert found["claimed_epsilon"] is None
    assert not found["contradicts"]
    assert [s.arm for s in steps] == sorted((s.arm for s in steps), reverse=True)  # configured, then broken
    assert {(s.arm, s.run) for s in steps} == {(arm, k) for arm in module.ARMS for k in range(5)}
    assert any(s.job is not None and s.job.done for s in steps)


def test_a_killed_audit_goes_on(config, data, tmp_path, monkeypatch) -> None:
    calls: list[str] = []

    def counted(stop: int) -> Callable[..., SyntheticSet]:
        def rehearse(*arguments: object) -> SyntheticSet:
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(str(arguments[3]))
            return REHEARSE(*arguments)

        return rehearse

    monkeypatch.setattr(module, "rehearse", counted(6))
    with pytest.raises(KeyboardInterrupt):
        audit(config, data, "north", tmp_path, **SIZES)
    before = {p: p.read_text() for p in tmp_path.rglob("inclusion.json")}
    assert len(before) == 7  # the coins of the run that was stopped are tossed
    monkeypatch.setattr(module, "rehearse", counted(-1))
    found = audit(config, data, "north", tmp_path, **SIZES)
    assert len(calls) == len(set(calls)) == 8
    assert {p: p.read_text() for p in before} == before
    monkeypatch.setattr(module, "rehearse", None)  # nothing is left to do
    monkeypatch.setattr(module, "views", None)
    again = audit(config, data, "north", tmp_path, **SIZES)
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert not list(tmp_path.rglob("work"))  # experts are large
    for name in ("inclusion.json", "views.json", "copies.png"):
        assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob(name)} == {0o600}
    assert stat.S_IMODE(next(tmp_path.rglob("run-000")).parent.parent.stat().st_mode) == 0o700


def test_a_set_is_not_made_again_for_its_attack(config, data, tmp_path, monkeypatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    views = module.views
    monkeypatch.setattr(module, "views", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit(config, data, "north", tmp_path, **SIZES)
    monkeypatch.setattr(module, "views", views)
    places: list[str] = []

    def noted(*arguments: object) -> SyntheticSet:
        places.append(str(arguments[3]))
        return REHEARSE(*arguments)

    monkeypatch.setattr(module, "rehearse", noted)
    audit(config, data, "north", tmp_path, **SIZES)
    assert len(places) == 7
    assert not any(place.endswith("configured/run-000/work") for place in places)


def test_unseen_images_are_those_that_the_rehearsal_lacks(data) -> None:
    chosen = choose(data, 20, "own", 0)
    inside = torch.arange(20) < 5
    unseen = _unseen(data, chosen, inside)
    assert len(unseen) == len(data.val) + len(data.test) + 15
    trained = {image.numpy().tobytes() for image in with_canaries(data, chosen, inside).train.images}
    assert not trained & {image.numpy().tobytes() for image in unseen.images}
    assert len(_unseen(data, choose(data, 20, "phantom", 0), inside)) == len(data.val) + len(data.test)


def test_the_control_reads_real_images_without_noise_whatever_is_configured(data) -> None:
    strange = make_config(SETTINGS | {"method": "datm", "labels": "soft", "budget": "sqrt", "overlap": "on"}).resolved()
    control = broken(strange, data, 40)
    assert (control.method, control.labels, control.overlap, control.ipc) == ("random", "auto", "auto", 60)


def test_no_claim_is_no_epsilon(config) -> None:
    assert claim_of(config, 160) == (None, 1e-3)


def test_a_claim_is_read_where_there_is_one() -> None:
    assert claim_of(SimpleNamespace(privacy="dp", epsilon=3, delta=0.0), 160) == (3.0, 1e-3)
    assert claim_of(SimpleNamespace(privacy="dp", epsilon=3, delta=1e-5), 160) == (3.0, 1e-5)
    assert claim_of(SimpleNamespace(privacy="none", epsilon=3, delta=1e-5), 160)[0] is None


def test_too_few_shadows(config, data, tmp_path) -> None:
    with pytest.raises(FedistillError, match="shadows=3 is too few"):
        audit(config, data, "north", tmp_path, canaries=40, shadows=3)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr(shared.screen, "_width", 250)  # a terminal that wraps nothing
    monkeypatch.setattr(sys, "argv", ["fedistill", "audit", *settings, "--canaries", "40", "--shadows", "4", *more])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, " ".join(err.split())


def test_one_screen_for_people(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(module, "rehearse", only_control)
    code, out, err = command(monkeypatch, capsys, "--out", str(tmp_path / "audit"))
    assert (code, out) == (0, "")
    for text in (
        "Claimed: no privacy",
        "could have shown at most",
        "Control: caught",
        "a low bound proves little",
        "0.1 % false alarms",
    ):
        assert text in err
    assert "contradicted" not in err


def test_a_contradiction_is_exit_code_1(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(module, "claim_of", lambda config, records: (0.3, 1e-3))
    monkeypatch.setattr(module, "rehearse", lambda config, *rest: REHEARSE(broken(config, rest[0], 0), *rest))
    code, out, _ = command(monkeypatch, capsys, "--out", str(tmp_path / "audit"), "--json")
    assert code == 1
    assert json.loads(out)["contradicts"]
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == json.loads(out)


def test_mistakes_are_one_sentence(monkeypatch, capsys, tmp_path) -> None:
    code, out, err = command(monkeypatch, capsys, "--out", str(tmp_path / "audit"), "--canary-source", "moon")
    assert (code, out) == (2, "")
    assert "not from 'moon'" in err
