"""Study files: what they expand to, and mistakes, each one sentence with the file or the cell."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from tinystudy import SETTINGS, write_study

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.simulation import app_folder
from fedistill.study.cost import estimates, sharing
from fedistill.study.plan import ARM, Cell, Study, cells_of, load_study, read_study, with_changes
from fedistill.study.results import OTHERS
from fedistill.study.run import next_cell

READY = ("budget", "federations", "methods", "privacy-accuracy", "private-federations", "rounds", "sites-and-skew")


def study(tmp_path: Path, text: str) -> Study:
    return read_study(write_study(tmp_path, text))


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def test_every_combination_is_a_cell(tmp_path: Path) -> None:
    found = study(tmp_path, "seeds = 3\n[settings]\nsites = 4\n[grid]\nipc = [1, 2]\nmethod = ['cf', 'dm']")
    cells = cells_of(found)
    assert names(cells) == [f"ipc {i}, method {m}" for i in (1, 2) for m in ("cf", "dm")]
    assert {(cell.config.sites, cell.config.seeds) for cell in cells} == {(4, 3)}
    assert cells[0].settings == {"ipc": 1, "method": "cf"}
    assert cells[0].seeds == [0, 1, 2]
    assert (cells[0].config.out, cells[0].config.work) == ("", "")


def test_arms_are_crossed_with_the_grid(tmp_path: Path) -> None:
    text = "[grid]\nipc = [1, 2]\n[arms.a]\nmethod = 'cf'\n[arms.b]\nmethod = 'mtt'\nsegment = 3"
    found = study(tmp_path, text)
    cells = cells_of(found)
    assert names(cells) == [f"arm {a}, ipc {i}" for a in "ab" for i in (1, 2)]
    assert found.varied == [ARM, "ipc"]
    assert found.columns == [ARM, "ipc", "method", "segment"]
    assert cells[0].settings == {ARM: "a", "ipc": 1, "method": "cf", "segment": 4}


def test_skip_takes_cells_out_before_they_are_judged(tmp_path: Path) -> None:
    text = (
        "[settings]\nmethod = 'sketch'\n[grid]\nepsilon = [0, 1, 3]\nipc = [1, 2]\n"
        "[arms.open]\n[arms.private]\nprivacy = 'dp'\n"
        "[[skip]]\narm = 'open'\nepsilon = [1, 3]\n[[skip]]\narm = 'private'\nepsilon = 0\n[[skip]]\nipc = 2\nepsilon = 3"
    )
    assert names(cells_of(study(tmp_path, text))) == [
        "arm open, epsilon 0, ipc 1",
        "arm open, epsilon 0, ipc 2",
        "arm private, epsilon 1, ipc 1",
        "arm private, epsilon 1, ipc 2",
        "arm private, epsilon 3, ipc 1",
    ]


def test_keys_depend_on_what_is_computed_and_on_nothing_else(tmp_path: Path) -> None:
    one = cells_of(study(tmp_path, "title = 'A'\nseeds = 1\n[settings]\nsites = 2\n[grid]\nipc = [1, 2]"))
    two = cells_of(study(tmp_path, "seeds = 4\n[settings]\nworkers = 2\n[grid]\nipc = [2, 1]\nsites = [2, 3]"))
    assert {cell.key for cell in one} <= {cell.key for cell in two}
    assert len({cell.key for cell in two}) == 4
    written_out = study(tmp_path, "[settings]\nsites = 2\nmethod = 'dm'\niterations = 1250\n[grid]\nipc = [1]")
    assert cells_of(written_out)[0].key == one[0].key  # as the preset says


def test_cells_that_share_experts_follow_each_other_and_never_run_together(tmp_path: Path) -> None:
    cells = cells_of(study(tmp_path, "seeds = 2\n[settings]\nmethod = 'cf'\n[grid]\nipc = [1, 2]\nalpha = [0.1, 1.0]"))
    assert names(cells) == [f"ipc {i}, alpha {a}" for a in ("0.1", "1") for i in (1, 2)]
    assert next_cell(cells[1:], cells[:1]) == cells[2]
    assert next_cell(cells[1:2], cells[:1]) is None
    shared = sharing(cells)
    assert (shared.used, shared.trained) == (4 * 30, 2 * 30)  # standard: 5 experts at 3 sites, 2 seeds
    guessed = estimates(cells, cores=2)
    assert [guess.networks for guess in guessed] == [30, 0, 30, 0]
    assert guessed[0].seconds > guessed[1].seconds > 0
    assert all(guess.memory > 1e9 and guess.disk > 1e5 for guess in guessed)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[grids]\nipc = [1]", r"tiny\.toml: Unknown key 'grids': did you mean 'grid'\?"),
        ("grid = 3", r"tiny\.toml: grid must be a table\."),
        ("seeds = 'two'", r"seeds must be a whole number\."),
        ("seeds = 0", r"seeds=0 is too small: it must be at least 1\."),
        ("skip = 3", r"skip must be a list of tables"),
        ("[settings]\nipcs = 1", r"Unknown setting in \[settings\] 'ipcs': did you mean 'ipc'\?"),
        ("[settings]\nipc = 'many'", r"\[settings\]: ipc=many is not a whole number\."),
        ("[settings]\nout = 'here'", r"Unknown setting in \[settings\] 'out'"),
        ("[settings]\nserver_data = 'none'", r"Unknown setting in \[settings\] 'server_data'"),
        ("[grid]\nipc = []", r"ipc in \[grid\] must be a list of at least one value\."),
        ("[grid]\nipc = 3", r"ipc in \[grid\] must be a list of at least one value\."),
        ("[grid]\nipc = [1, 0]", r"\[grid\]: ipc=0 is too small"),
        ("[grid]\nsed = [1]", r"Unknown setting in \[grid\] 'sed'"),
        ("[grid]\nseed = [1, 2]", r"seed cannot be in \[grid\]: say seeds = N"),
        ("[settings]\nipc = 1\n[grid]\nipc = [1]", r"ipc is in \[settings\] and in \[grid\]: keep one\."),
        ("[grid]\nipc = [1]\n[arms.a]\nipc = 2", r"ipc is in \[grid\] and in \[arms\.a\]: keep one\."),
        ("[arms]\na = 3", r"arms\.a must be a table of settings"),
        ("[arms.a]\nseed = 3", r"Unknown setting in \[arms\.a\] 'seed'"),
        ("[[skip]]", r"a \[\[skip\]\] names no setting\."),
        ("[arms.one]\n[[skip]]\narm = 'on'", r"Unknown arm 'on': did you mean 'one'\?"),
        ("[[skip]]\nipcs = 3", r"Unknown setting in \[\[skip\]\] 'ipcs'"),
        ("[grid]\nipc = [1, 1]", r"The cells 'ipc 1' and 'ipc 1' are the same run\."),
        ("[grid]\nworkers = [1, 2]", r"The cells 'workers 1' and 'workers 2' are the same run\."),
        ("[grid]\nipc = [1]\n[[skip]]\nipc = 1", r"\[\[skip\]\] leaves no cell of the study tiny\."),
        ("[grid]\npartition = ['iid', 'dirichlit']", r"The cell 'partition dirichlit' cannot be: Unknown partition"),
        ("[grid]\nmodality = ['xrayy']", r"cannot be: Unknown modality 'xrayy': did you mean 'xray'"),
        ("[grid]\nmodel = ['convnett']", r"cannot be: Unknown model 'convnett'"),
        ("[grid]\naugment = ['foo']", r"cannot be: Unknown augmentation 'foo'"),
        ("[settings]\nmethod = 'dm'\n[grid]\nrounds = [1, 2]", r"The cell 'rounds 2' cannot be: rounds=2 needs cf or"),
        (
            "[settings]\nprivacy = 'dp'\nepsilon = 1\nrounds = 2\n[grid]\npatience = [0, 1]",
            r"The cell 'patience 1' cannot be: patience=1 would choose on private validation images",
        ),
        ("[grid]\nmethod = ['cf', 'dtam']", r"The cell 'method dtam' cannot be: Unknown method 'dtam'"),
        ("[grid]\nepsilon = [0, 1]", r"The cell 'epsilon 1' cannot be: epsilon=1 has no effect without privacy=dp"),
        ("[grid]\nprivacy = ['none', 'dp']", r"The cell 'privacy dp' cannot be: privacy=dp needs a budget"),
        ("[grid]\neval_models = ['mpl']", r"The cell 'tiny' cannot be: Unknown model 'mpl'"),
        ("[grid", r"tiny\.toml is not a readable TOML file"),
    ],
)
def test_mistakes_name_the_file_or_the_cell(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence) as caught:
        cells_of(study(tmp_path, text))
    assert "\n" not in caught.value.sentence
    assert "[" not in caught.value.code


def test_too_many_cells_are_refused(tmp_path: Path) -> None:
    text = f"[grid]\nipc = {list(range(1, 200))}\nsegment = {list(range(1, 200))}"
    with pytest.raises(FedistillError, match="has 39601 cells, more than 10000"):
        cells_of(study(tmp_path, text))


def test_studies_are_found_by_name() -> None:
    assert {path.stem for path in (app_folder() / "simulations" / "studies").glob("*.toml")} == set(READY)
    with pytest.raises(FedistillError, match="Unknown study 'method': did you mean 'methods'"):
        load_study("method")
    with pytest.raises(FedistillError, match=r"There is no file nowhere\.toml\."):
        load_study("nowhere.toml")


@pytest.mark.parametrize("name", READY)
def test_the_studies_that_come_with_fedistill(name: str) -> None:
    found = load_study(name)
    cells = cells_of(with_changes(found, {"phantom_images": "300"}, 1))
    assert 1 < len(cells) <= 20
    assert found.title != name
    assert found.seeds >= 3
    assert {cell.config.phantom_images for cell in cells} == {300}


def test_changes_come_before_the_file(tmp_path: Path) -> None:
    found = study(tmp_path, "[settings]\nsites = 2\n[grid]\nipc = [1, 2]\nalpha = [0.1, 1]\n[arms.a]\nmethod = 'cf'")
    changed = with_changes(found, {"sites": "5", "ipc": "7"}, 9)
    cells = cells_of(changed)
    assert names(cells) == ["alpha 0.1", "alpha 1"]
    assert {(c.config.sites, c.config.ipc, c.config.seeds) for c in cells} == {(5, 7, 9)}
    assert changed.columns == found.columns
    for settings, sentence in (
        ({"method": "dm"}, "--set method would change the arm 'a': edit the file"),
        ({"seeds": "2"}, "--set seeds does not work in a study: use --seeds"),
        ({"work": "w"}, "--set work does not work in a study"),
        ({"site": "2"}, "Unknown option 'site': did you mean 'sites'"),
    ):
        with pytest.raises(FedistillError, match=sentence):
            with_changes(found, settings, None)


def test_no_setting_has_the_name_of_a_figure() -> None:
    assert not {f.name for f in fields(Config)} & ({*OTHERS, "cell", ARM} - {"seed"})


def test_the_settings_of_the_tests_are_those_of_a_run(tmp_path: Path) -> None:
    (cell,) = cells_of(study(tmp_path, f"[settings]{SETTINGS}"))
    assert (cell.name, cell.settings) == ("tiny", {})
