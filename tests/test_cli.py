"""The command line: a user's mistake is one sentence and exit code 2, and nothing is lost."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from fedistill import cli, load_set
from fedistill.evaluation import predictor
from fedistill.privacy.ledger import Ledger
from fedistill.site.folder import ledger_file

TINY = ["--experts", "2", "--width", "4", "--iterations", "4", "--ipc", "2", "--preset", "quick"] + [
    part
    for pair in (
        "expert_steps=30", "checkpoint_every=5", "syn_steps=3", "segment=2", "workers=1", "phantom_images=90", "phantom_size=16",
        "phantom_classes=3", "eval_steps=5", "eval_nets=1", "eval_models=convnet", "image_lr=5", "skip_above=1000",
    )
    for part in ("--set", pair)
]  # fmt: skip


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fedistill", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, " ".join(err.split())


@pytest.fixture
def fedistill(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run(*map(str, arguments), monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["simulate", "--iteratons", "5"], "'--iteratons'. (Did you mean"),
        (["simulate", "--set", "iteratons=5"], "Unknown option 'iteratons': did you mean 'iterations'?"),
        (["simulate", "--set", "iterations"], "--set iterations has no '='"),
        (["simulate", "--ipc", "3", "--set", "ipc=4"], "ipc is given twice"),
        (["simulate", "--ipc", "many"], "'many' is not a valid int"),
        (["simulate", "--ipc", "0"], "ipc=0 is too small"),
        (["simulate", "--method", "dtam"], "Unknown method 'dtam': did you mean 'datm'?"),
        (["simulate", "--init", "nois"], "did you mean 'noise'"),
        (["simulate", "--preset", "quik"], "did you mean 'quick'"),
        (["simulate", "--partition", "dirichlt"], "did you mean 'dirichlet'"),
        (["simulate", "--set", "eval_models=convnet,mpl"], "did you mean 'mlp'"),
        (["simulate", "--set", "augment=flip,rotat"], "did you mean 'rotate'"),
        (["simulate", "--set", "window=3"], "window=3.0 is too large: it must be at most 1"),
        (["simulate", "--method", "prune", "--set", "mask_keep=2"], "mask_keep=2.0 is too large"),
        (["simulate", "--set", "depth=6"], "depth=6 halves images of 28 pixels to nothing"),
        (["simulate", "--set", "model=convnt"], "did you mean 'convnet'"),
        (["simulate", "--set", "server_data=none"], "server_data=none is for real sites"),
        (["distill", "--out", "set", "--set", "expert_steps=5", "--method", "mtt"], "segment=4 needs more checkpoints"),
        (["distill", "--out", "set", "--method", "ptmm"], "did you mean 'ptm'"),
        (["simulate", "--privacy", "dpp"], "did you mean 'dp'"),
        (["simulate", "--privacy", "dp"], "privacy=dp needs a budget: say --epsilon"),
        (["simulate", "--privacy", "dp", "--epsilon", "3", "--method", "dm"], "method=dm cannot be private"),
        (["simulate", "--privacy", "dp", "--epsilon", "3", "--delta", "much"], "much is neither a number nor auto"),
        (["simulate", "--privacy", "dp", "--epsilon", "3", "--delta", "0.5"], "delta=0.5 is not below 1/"),
        (["simulate", "--privacy", "dp", "--epsilon", "3", "--unit", "patient"], "unit=patient needs to know"),
        (["simulate", "--epsilon", "3"], "epsilon=3 has no effect without privacy=dp"),
        (["distill", "--out", "set", "--privacy", "dp", "--epsilon", "3"], "say where with --work"),
        (["distill", "--out", "set", "--lifetime-epsilon", "3"], "belong together"),
        (
            ["distill", "--out", "set", "--lifetime-epsilon", "3", "--lifetime-delta", "1e-5"],
            "A lifetime cap means nothing without privacy=dp",
        ),
        (["distill", "--out", "set", "--set", "rounds=2"], "rounds and seeds belong to a federation"),
        (["simulate", "--set", "device=cuda"], "device=cuda is not available"),
        (["simulate", "--data", "nowhere.npz"], "nowhere.npz"),
        (["simulate", "--data", "pneumoniamnst"], "did you mean 'pneumoniamnist'"),
        (["simulate", "--data", "phantom", "--ipc", "500"], "ipc=500 asks for 2000 synthetic images"),
        (["simulate", "--method", "mtt", "--set", "segment=500"], "segment=500 needs more checkpoints"),
        (["simulate", "--method", "dm", "--rounds", "2"], "rounds=2 needs cf or trajectory matching"),
        (["simulate", "--out", "x" * 300], "cannot be read or written: File name too long."),
        (["evaluate", "nowhere"], "holds no synthetic set"),
        (["probe", "--ipc", "1,two"], "ipc=1,two is no list of whole numbers"),
        (["probe", "--ipc", "0"], "ipc=0 is no list of budgets"),
        (["probe", "--ipc", "500"], "ipc=500 asks for more images than phantom has: use ipc=225 or less"),
        (["probe", "--set", "eval_models=convnt"], "did you mean 'convnet'"),
        (["probe", "--partition", "dirichlt"], "did you mean 'dirichlet'"),
        (["probe", "--fit", "nowhere.csv"], "there is no such file"),
        (["probe", "--fit", "results.csv", "--ipc", "1"], "--fit takes no other option"),
        (["simulat"], "No such command 'simulat'"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(fedistill, tmp_path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = fedistill(*arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(tmp_path.rglob("config.json"))  # no run was begun


def test_only_what_is_wrong_with_a_file_is_said_of_files(monkeypatch, capsys) -> None:
    for error, sentence in (
        (
            PermissionError(errno.EACCES, "Permission denied", "there/file"),
            "there/file cannot be read or written: Permission denied.",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "A file cannot be read or written: No space left on device.",
        ),
    ):
        monkeypatch.setattr(cli, "app", Mock(side_effect=error))
        code, _, err = run("simulate", monkeypatch=monkeypatch, capsys=capsys)
        assert (code, err) == (2, f"Error: {sentence}")
    monkeypatch.setattr(cli, "app", Mock(side_effect=ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")))
    with pytest.raises(ConnectionRefusedError):
        cli.main()


def test_a_folder_of_another_run_is_refused_and_kept(fedistill, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("irreplaceable")
    code, _, err = fedistill("simulate", "--data", "phantom", "--out", tmp_path / "run")
    assert code == 2
    assert "neither empty nor a run" in err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "irreplaceable"


def test_a_file_in_the_place_of_the_folder_is_refused(fedistill, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("thesis")
    for place in (tmp_path / "run", tmp_path / "run" / "below"):
        code, _, err = fedistill("simulate", "--data", "phantom", "--out", place)
        assert code == 2
        assert f"{tmp_path / 'run'} is a file: choose another folder." in err


def test_an_error_in_a_worker_process_is_still_one_sentence(fedistill, tmp_path: Path) -> None:
    settings = ["workers=2" if a == "workers=1" else a for a in TINY]
    diverges = ("--method", "mtt", "--set", "expert_lr=1e30")
    code, _, err = fedistill("distill", "--out", tmp_path / "set", *settings, *diverges)
    assert code == 2
    assert "An expert diverged" in err


def test_slices_of_no_length_still_get_somewhere(fedistill, tmp_path: Path) -> None:
    assert fedistill("distill", "--out", tmp_path / "set", *TINY, "--set", "slice_seconds=0")[0] == 0


def test_private_work_keeps_its_ledger_and_its_cap(fedistill, tmp_path: Path) -> None:
    sketch = ("sketch_networks=2", "sketch_frequencies=8", "phantom_images=90", "phantom_size=16", "phantom_classes=2")
    private = [
        "--data", "phantom", "--privacy", "dp", "--epsilon", "20", "--delta", "auto", "--ipc", "2", "--iterations", "3",
        "--work", tmp_path / "work", "--lifetime-epsilon", "25", "--lifetime-delta", "0.01",
    ]  # fmt: skip
    private += [part for pair in sketch for part in ("--set", pair)]
    code, text, err = fedistill("distill", "--out", tmp_path / "one", "--json", *private)
    assert code == 0, err
    assert "differential privacy for every image" in json.loads(text)["manifest"]["privacy"]["statement"]
    ledger = tmp_path / "work/site-phantom/ledger.db"
    assert ledger.exists()
    assert ledger.parent.stat().st_mode & 0o777 == 0o700  # sketches and experts of private data are for nobody else
    code, _, err = fedistill("distill", "--out", tmp_path / "two", *private, "--seed", "1")
    assert code == 2
    assert "over the lifetime cap of 25" in err


def test_a_cap_is_not_got_round_by_another_name_of_the_file(fedistill, tmp_path: Path) -> None:
    """The same images as export-december.npz instead of export-november.npz would have a ledger of their own."""
    private = ("--data", "phantom", "--privacy", "dp", "--epsilon", "20", "--work", tmp_path / "work")
    cap = ("--lifetime-epsilon", "25", "--lifetime-delta", "0.01")
    Ledger(ledger_file(tmp_path / "work", "export, of/november"))
    code, _, err = fedistill("distill", "--out", tmp_path / "set", *private, *cap)
    assert code == 2
    assert "holds the ledger of export, of/november, and these data are called phantom" in err
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["site-export%2C%20of%2Fnovember"]


def test_distill_then_evaluate(fedistill, tmp_path: Path) -> None:
    out = tmp_path / "set"
    code, text, err = fedistill("distill", "--data", "phantom", "--out", out, "--json", *TINY)
    assert code == 0, err
    facts = json.loads(text)
    made = load_set(out)
    assert facts["images"] == len(made) == 6
    assert facts["manifest"]["privacy"]["statement"].startswith("No formal guarantee")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]  # the work folder is gone

    code, _, err = fedistill("distill", "--data", "phantom", "--out", out, *TINY)
    assert code == 2
    assert "exists already" in err

    settings = TINY[TINY.index("--set") :]
    code, text, err = fedistill("evaluate", out, "--data", "phantom", "--width", "4", "--json", *settings)
    assert code == 0, err
    arms = json.loads(text)["arms"]
    assert set(arms) == {"distilled", "random_real"}
    assert arms["distilled"]["images"] == arms["random_real"]["images"] == 6
    assert 0 <= arms["distilled"]["balanced_accuracy"]["mean"] <= 1

    code, _, err = fedistill("evaluate", out, "--data", "phantom", "--width", "4", *settings)
    assert code == 0
    assert "Distilled" in err


def test_evaluate_refuses_data_that_do_not_fit(fedistill, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert fedistill("distill", "--data", "phantom", "--out", out, *TINY)[0] == 0
    code, _, err = fedistill("evaluate", out, "--data", "phantom", "--set", "phantom_classes=4")
    assert code == 2
    assert "do not fit: class_names" in err


def test_distill_takes_an_npz_file(fedistill, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 40), ("val", 10), ("test", 10)):
        labels = np.arange(n) % 2
        arrays[f"{split}_images"] = (rng.integers(0, 120, (n, 16, 16)) + 100 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None]
    np.savez(tmp_path / "scans.npz", **arrays)
    code, _, err = fedistill("distill", "--data", tmp_path / "scans.npz", "--out", tmp_path / "set", *TINY)
    assert code == 0, err
    assert load_set(tmp_path / "set").sites == ("scans",)


PROBE = ["--data", "phantom", "--ipc", "1,5"] + [
    part
    for pair in ("phantom_images=90", "phantom_size=16", "phantom_classes=3", "width=4", "eval_steps=3", "eval_nets=2", "workers=1")
    for part in ("--set", pair)
]  # fmt: skip


def test_probe_then_fit_then_probe(fedistill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "PATH", tmp_path / "predictor.json")
    code, out, err = fedistill("probe", *PROBE)
    assert (code, out) == (0, "")
    assert "No predictor has been fitted yet" in err
    assert "Recommended" not in err
    assert "Random real images, scored on 22 validation images" in err
    assert "north" in err
    code, out, _ = fedistill("probe", *PROBE, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["format"] == "fedistill-probe/1"
    assert [b["ipc"] for b in found["budgets"]] == [1, 5]
    assert found["predictor"] is found["recommended_ipc"] is None

    rows = ["data,method,ipc,seed,model,status,images,balanced_accuracy"]
    for i, name in enumerate("abc"):
        rows.append(f"{name},whole,0,0,convnet,ok,300,0.9")
        rows += [
            f"{name},{m},{n},0,convnet,ok,{2 * n},0.{5 + i}{s}" for n in (1, 9) for m, s in (("random", 1), ("dm", 9))
        ]
    (tmp_path / "results.csv").write_text("\n".join(rows))
    code, out, err = fedistill("probe", "--fit", tmp_path / "results.csv")
    assert (code, out) == (0, "")
    assert "mean gain ★" in err
    assert "gain +8.0 points over random real images (results.csv: 6 cells of 3 data sets" in err
    code, out, _ = fedistill("probe", "--fit", tmp_path / "results.csv", "--json")
    assert json.loads(out) == json.loads((tmp_path / "predictor.json").read_text())

    code, _, err = fedistill("probe", *PROBE)
    assert code == 0
    assert "★ Recommended: --ipc" in err
    assert "Took" in err


def test_lists(fedistill) -> None:
    code, out, _ = fedistill("methods")
    assert code == 0
    assert all(name in out for name in ("mtt", "datm", "ptm", "prune", "sketch", "teach", "arXiv 2403.13469"))
    code, out, _ = fedistill("options")
    assert code == 0
    assert "by preset: quick" in out
    assert fedistill("--version")[1].strip() == "0.1.0"


@pytest.mark.parametrize(
    ("command", "default"), [(["study", "run"], "[default: 1; x>=1]"), (["study", "run"], "[required]")]
)
def test_help_has_defaults_and_no_signs_of_a_markup(fedistill, command, default):
    _, shown, _ = fedistill(*command, "--help")
    assert "\\" not in shown
    assert default in shown
