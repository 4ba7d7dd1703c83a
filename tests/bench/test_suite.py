"""Suites: small files, whose mistakes are named with the file and the nearest valid word."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinysuite import write_suite

from fedistill.bench.suite import load_suite
from fedistill.errors import FedistillError


def test_a_file_makes_a_method_and_its_name_is_the_method(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path, methods_plain='title = "P"\nmethod = "ptm"\noverlap = "off"')))
    assert (suite.ipc, suite.seeds) == ((1, 2), 2)
    assert list(suite.methods) == ["mtt", "plain", "ptm"]
    assert suite.methods["mtt"].settings == {"method": "mtt"}
    assert suite.methods["plain"].settings == {"method": "ptm", "overlap": "off"}
    assert suite.methods["ptm"].against == ("mtt",)


def test_the_suite_that_comes_with_fedistill() -> None:
    suite = load_suite("medical")
    assert set(suite.data) == {"pneumoniamnist", "ham10000_sites", "wbc_sites", "cxr_sites"}
    assert {"mtt", "ptm", "ptm-no-overlap", "prune", "datm", "random"} <= set(suite.methods)
    assert all(recipe.title != name for name, recipe in suite.methods.items())


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("methods_ptm", 'overlp = "off"', r"methods/ptm\.toml: Unknown key 'overlp': did you mean 'overlap'\?"),
        (
            "methods_ptm",
            "eval_steps = 5",
            r"methods/ptm\.toml: Unknown key 'eval_steps'",
        ),  # the protocol is everybody's
        ("methods_ptm", "ipc = 3", r"methods/ptm\.toml: Unknown key 'ipc'"),
        ("methods_ptm", 'iterations = "many"', r"methods/ptm\.toml: iterations=many is not a whole number"),
        ("methods_ptm", 'against = ["mt"]', r"methods/ptm\.toml: Unknown method 'mt': did you mean 'mtt'\?"),
        ("methods_ptm", 'against = "mtt"', r"methods/ptm\.toml: against='mtt' is not a list"),
        ("methods_ptm", "against = [", r"methods/ptm\.toml is not a readable TOML file"),
        ("methods_whole", "", r"whole\.toml: the name 'whole' is taken"),
        ("data_phantom", 'dat = "phantom"', r"data/phantom\.toml: Unknown key 'dat': did you mean 'data'\?"),
        ("data_phantom", 'title = "no data"', r"data/phantom\.toml does not say which data"),
        ("data_phantom", 'data = "phantom"\ntrain_image = 3', r"phantom\.toml: .*did you mean 'train_images'\?"),
        ("data_phantom", 'data = "phantom"\ntrain_images = -3', r"train_images=-3 is too small"),
        ("data_phantom", 'data = "phantom"\nwidth = 0', r"data/phantom\.toml: width=0 is too small"),
        ("suite", "ipcs = [1]", r"suite\.toml: Unknown key 'ipcs': did you mean 'ipc'\?"),
        ("suite", "ipc = [0]", r"suite\.toml: ipc must be a list of whole numbers"),
        ("suite", "[settings]\nwidht = 4", r"suite\.toml: Unknown key 'widht': did you mean 'width'\?"),
        ("suite", "[settings]\nrounds = 2", r"suite\.toml: Unknown key 'rounds'"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, file: str, text: str, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence):
        load_suite(str(write_suite(tmp_path, **{file: text})))


def test_suites_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="Unknown suite 'medcal': did you mean 'medical'"):
        load_suite("medcal")
    with pytest.raises(FedistillError, match=r"there is no suite\.toml in it"):
        load_suite(str(tmp_path))
    (tmp_path / "suite.toml").write_text("")
    with pytest.raises(FedistillError, match="at least one file in data/"):
        load_suite(str(tmp_path))
