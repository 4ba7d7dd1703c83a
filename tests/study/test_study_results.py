"""Records, the tidy table, what is shown of it, plots and the page, without a run."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tinystudy import write_study

from fedistill.errors import FedistillError
from fedistill.files import read_json, write_json
from fedistill.report.tables import arm_name
from fedistill.study.page import page
from fedistill.study.plan import Cell, Study, cells_of, read_study
from fedistill.study.plots import axes_of, lines_of, write_plots
from fedistill.study.results import FIGURES, Row, finished, read_folder, read_results, record_path, write_results
from fedistill.study.run import forecast, refuse_foreign, run_study
from fedistill.study.tables import cells_table, differences, headline, table

TEXT = "seeds = 2\n[grid]\nmethod = ['cf', 'mtt']\nipc = [1, 10]"


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Study, list[Cell], Path]:
    """A study with three finished cells and one that failed."""
    study, out = read_study(write_study(tmp_path, TEXT)), tmp_path / "out"
    cells = cells_of(study)
    for k, cell in enumerate(cells):
        write_json(record_path(out, cell.key), failed(cell) if k == 3 else done(cell, 0.5 + 0.1 * k))
    return study, cells, out


def done(cell: Cell, score: float) -> dict[str, Any]:
    rows = [
        {
            "seed": seed, "eval_model": model, "trained_on": arm, "kind": "multiclass", "images": 8, "upload_bytes": 12345678,
            "balanced_accuracy": score + 0.02 * seed - (arm == "random_real") * 0.1, "auc": None, "seconds": 1.5,
        }
        for seed in cell.seeds for model in ("convnet", "mlp") for arm in ("distilled", "random_real")
    ]  # fmt: skip
    about = {"status": "ok", "code": "", "reason": "", "seconds": 100.0, "peak_memory_bytes": 3_000_000_000}
    return {"key": cell.key, "seeds": cell.seeds, "rows": rows} | about


def failed(cell: Cell) -> dict[str, Any]:
    reason = "An expert diverged </script>."
    about = {"status": "failed", "code": "expert-diverged", "reason": reason, "seconds": 3.0}
    return {"key": cell.key, "seeds": cell.seeds, "rows": []} | about


def rows_in(ended: tuple[Study, list[Cell], Path]) -> list[Row]:
    study, cells, out = ended
    write_results(out, study, cells)
    return read_results(out / "results.csv")


def test_results_are_one_tidy_table(ended) -> None:
    rows = rows_in(ended)
    assert len(rows) == 3 * 2 * 2 * 2 + 1
    assert {(row["method"], row["ipc"]) for row in rows} == {(m, i) for m in ("cf", "mtt") for i in (1, 10)}
    first, last = rows[0], rows[-1]
    assert (first["seed"], first["upload_bytes"], first["auc"], first["status"]) == (0, 12345678, None, "ok")
    assert (last["seed"], last["balanced_accuracy"], last["code"]) == (None, None, "expert-diverged")
    with open(ended[2] / "results.csv", newline="") as file:
        assert all(None not in row and None not in row.values() for row in csv.DictReader(file))


def test_a_record_of_other_seeds_is_not_finished(ended, tmp_path: Path) -> None:
    _, cells, out = ended
    assert [finished(out, cell) for cell in cells] == [True, True, True, False]
    more = cells_of(read_study(write_study(tmp_path, TEXT.replace("2", "3", 1))))
    assert [cell.key for cell in more] == [cell.key for cell in cells]
    assert not any(finished(out, cell) for cell in more)


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="run the study first"):
        read_results(tmp_path / "results.csv")
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FedistillError, match="is no table of a study: it lacks cell"):
        read_results(tmp_path / "results.csv")


@pytest.mark.parametrize("content", [{}, {"title": "Other"}, ["title", "varied", "names"]])
def test_a_plan_that_is_of_no_study_is_refused(ended, content: Any) -> None:
    study, cells, out = ended
    write_results(out, study, cells)
    write_json(out / "study.json", content)
    with pytest.raises(FedistillError, match=r"study\.json is not that of a study"):
        read_folder(out)
    with pytest.raises(FedistillError, match=r"study\.json is not that of a study"):
        refuse_foreign(out, study)


def test_the_table_has_a_row_per_cell(ended) -> None:
    rows = rows_in(ended)
    assert headline(rows) == "balanced_accuracy"
    head, body = cells_table(rows, ended[0].varied, "balanced_accuracy", "mlp")
    assert head == ["method", "ipc", "Distilled union", "Random real images", "Upload", "n"]
    assert body[0] == ["cf", "1", ".510 ± .014", ".410 ± .014", "12.3 MB", "2"]
    assert body[3] == ["mtt", "10", "failed", "failed", "–", "0"]
    assert cells_table(rows, [], "balanced_accuracy", "mlp")[0][0] == "cell"


def several(cell: str, arm: str, seed: int, auc: float, sent: int = 0) -> Row:
    """A row of a study of which each cell has many arms."""
    about = {"cell": cell, "n": len(cell), "eval_model": "mlp", "trained_on": arm, "seed": seed, "auc": auc}
    return dict.fromkeys(FIGURES) | about | {"kind": "multiclass", "status": "ok", "reason": "", "upload_bytes": sent}


def test_of_many_arms_each_has_a_line_and_what_cells_share_stands_once() -> None:
    arms = ("distilled-1", "distilled", "random_real", "fedavg-1", "fedavg-10", "fedavg", "ensemble", "one-shot")
    rows = [several("a", arm, seed, 0.5 + 0.01 * seed, 1000 * k) for k, arm in enumerate(arms) for seed in (0, 1)]
    rows += [several("bb", arm, seed, 0.5 + 0.01 * seed, 2000) for arm in arms[1:3] for seed in (0, 1)]
    rows += [several("ccc", "distilled", 0, 0.0) | {"status": "failed", "seed": None}]
    head, body = table(rows, ["n"], "auc", "mlp")
    assert head == ["n", "Trained on", "AUC", "Upload", "n"]
    assert body[0] == ["1", "Distilled union, 1 round", ".505 ± .007", "0 B", "2"]
    assert [line[:2] for line in body[len(arms) :]] == [["2", "Distilled union"], ["3", "–"]]
    assert body[-1][2] == "failed"
    alike = [several("dddd", "distilled", seed, 0.5 + 0.01 * seed, 1000) for seed in (0, 1)]  # as in cell a, by chance
    assert table(rows + alike, ["n"], "auc", "mlp")[1] == [*body, ["4", *body[1][1:]]]
    few = [row for row in rows if row["trained_on"] in arms[:3]]
    assert table(few, ["n"], "auc", "mlp") == cells_table(few, ["n"], "auc", "mlp")


@pytest.mark.parametrize(
    ("arm", "changed"),
    [
        ("dp-fedavg", {}),  # noise of its own
        ("central-distilled", {}),
        ("fedavg", {"balanced_accuracy": 0.75}),
        ("fedavg", {"alpha": 3.0}),
        ("fedavg", None),
    ],
)
def test_arms_that_reach_the_same_figure_by_chance_are_all_shown(arm: str, changed: dict[str, float] | None) -> None:
    others = [several("a", f"fedprox-{rounds}", 0, 0.6, rounds) for rounds in range(1, 9)]  # so that arms have lines
    rows = [*others, several("a", arm, 0, 0.5, 3_133_760), several("bb", arm, 0, 0.5, 3_133_760) | (changed or {})]
    cells = ["1", "2"] if changed is not None else ["1"]
    body = table(rows, ["n"], "auc", "mlp")[1]
    assert [line[0] for line in body if line[1] == arm_name(arm)] == cells
    lines = lines_of(rows, axes_of(rows, ["n"], x="upload_bytes", y="auc", by="", where={}))
    assert len([line for line in lines if line.name.endswith(arm_name(arm))]) == len(cells)


def test_an_ablation_is_of_pairs_that_differ_in_nothing_else() -> None:
    def row(arm: str, alpha: float, seed: int, score: float, **more: Any) -> Row:
        figures = dict.fromkeys(FIGURES) | {"balanced_accuracy": score, "auc": score / 2}
        about = {"cell": f"{arm}{alpha}", "arm": arm, "alpha": alpha, "eval_model": "mlp", "trained_on": "distilled"}
        return figures | about | {"seed": seed, "kind": "multiclass", "status": "ok", "reason": ""} | more

    rows = [
        row("full", 0.1, 0, 0.5), row("full", 0.1, 1, 0.6), row("full", 1.0, 0, 0.9),
        row("bare", 0.1, 0, 0.4), row("bare", 0.1, 1, 0.54), row("bare", 1.0, 0, 0.9), row("bare", 1.0, 1, 0.1),
        row("bare", 0.1, 0, 0.0, trained_on="random_real"), row("bare", 0.1, 0, 0.0, eval_model="convnet"),
    ]  # fmt: skip
    head, body = differences(rows, ["arm", "alpha"], "arm", "full", ["balanced_accuracy", "auc"], "mlp")
    assert head == ["arm", "Balanced accuracy", "AUC"]
    assert body == [
        ["bare − full", "−.053 ± .029 (3)", "−.027 ± .015 (3)"]
    ]  # of -.1, -.06 and 0; seed 1 of alpha 1 has no pair
    body = differences(rows, ["arm", "alpha"], "alpha", "0.1", ["balanced_accuracy"], "mlp")[1]
    assert body == [["1 − 0.1", "+.153 ± .298 (3)"]]  # of .4, .5 and -.44
    with pytest.raises(FedistillError, match="Unknown setting that the study varies 'alhpa': did you mean 'alpha'"):
        differences(rows, ["arm", "alpha"], "alhpa", "0.1", ["auc"], "mlp")
    failed = [row | {"status": "failed"} if row["arm"] == "full" else row for row in rows]
    with pytest.raises(FedistillError, match=r"No cell with arm full is finished\."):
        differences(failed, ["arm", "alpha"], "arm", "full", ["auc"], "mlp")
    with pytest.raises(FedistillError, match="Unknown value of arm 'ful': did you mean 'full'"):
        differences(rows, ["arm", "alpha"], "arm", "ful", ["auc"], "mlp")
    text = page("Ablation", rows, ["arm", "alpha"], cells=4, first="full", command="study run <ablation>").decode()
    assert "−.053 ± .029 (3)" in text
    assert "<code>study run &lt;ablation&gt;</code>" in text
    late = [row for row in rows if row["arm"] == "bare" or row["alpha"] == 1.0]  # the first cell is still to come
    late.sort(key=lambda row: str(row["arm"]))
    assert "bare − full" in page("Ablation", late, ["arm", "alpha"], cells=4, first="full").decode()
    for unfinished in ("full", "bare"):
        some = [row for row in rows if row["arm"] != unfinished]
        assert "Against the first arm" not in page("Ablation", some, ["arm", "alpha"], cells=4, first="full").decode()
    rest = page("Ablation", [r for r in rows if r["arm"] == "full"], ["alpha"], cells=2).decode()
    assert "Against the first arm" not in rest
    assert "To repeat" not in rest


def test_a_study_is_about_the_union_of_the_last_round() -> None:
    rows = [several("a", "distilled-1", 0, 0.5, 10), several("a", "distilled", 0, 0.75, 20)]
    text = page("Rounds", rows, ["n"], cells=1).decode()
    assert re.findall(r'<dd class="figure words">(.*?)</dd>', text)[3] == "20 B"
    assert '"main": "distilled"' in text
    assert axes_of(rows, ["n"], x="n", y="auc", by="", where={}).where["trained_on"] == "distilled"
    assert cells_table(rows, ["n"], "auc", "mlp")[1] == [["1", ".500", ".750", "20 B", "1"]]


def test_finished_cells_correct_the_forecast(ended) -> None:
    _, cells, out = ended
    seen = forecast(cells, out, jobs=1)
    assert [one.state for one in seen.cells] == ["finished"] * 3 + ["failed"]
    assert (seen.cells[0].seconds, seen.cells[0].memory, seen.measured) == (100.0, 3_000_000_000, 3)
    blank = forecast(cells, out / "other", jobs=1)
    measured = sum(one.seconds for one in blank.cells[:3])
    assert seen.seconds == pytest.approx(blank.cells[3].seconds * 300 / measured)
    assert blank.memory < forecast(cells, out / "other", jobs=2).memory


def test_a_line_for_each_of_the_other_settings(ended) -> None:
    rows, study = rows_in(ended), ended[0]
    axes = axes_of(rows, study.varied, x="ipc", y="balanced_accuracy", by="", where={})
    lines = lines_of(rows, axes)
    assert [(line.name, list(line.points)) for line in lines] == [("cf", [1, 10]), ("mtt", [1])]
    assert lines[0].points[1] == [0.5, 0.52]  # distilled, with the first model
    axes = axes_of(rows, study.varied, x="method", y="balanced_accuracy", by="trained_on", where={"ipc": "1"})
    assert [line.name for line in lines_of(rows, axes)] == ["Distilled union", "Random real images"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"x": "icp"}, "Unknown column of the study 'icp': did you mean 'ipc'"),
        ({"y": "balanced"}, "Unknown figure 'balanced': did you mean 'balanced_accuracy'"),
        ({"by": "ipc"}, "--x ipc and --by ipc are the same"),
        ({"by": "trained_on"}, "method varies, too: choose one value with --where method=VALUE"),
        ({"where": {"method": "dm"}}, "Unknown value of method 'dm'"),
    ],
)
def test_axes_that_cannot_be(ended, asked: dict[str, Any], sentence: str) -> None:
    choice: dict[str, Any] = {"x": "ipc", "y": "balanced_accuracy", "by": "", "where": {}} | asked
    with pytest.raises(FedistillError, match=sentence):
        axes_of(rows_in(ended), ended[0].varied, **choice)


def test_plots_are_vectors_and_the_same_each_time(ended, tmp_path: Path) -> None:
    rows, study = rows_in(ended), ended[0]
    for x, by, where in (("ipc", "", {}), ("method", "ipc", {}), ("trained_on", "ipc", {"method": "cf"})):
        axes = axes_of(rows, study.varied, x=x, y="balanced_accuracy", by=by, where=where)
        svg, pdf = write_plots(rows, axes, "Tiny", tmp_path)
        assert ElementTree.fromstring(svg.read_text()).tag.endswith("svg")
        assert pdf.read_bytes().startswith(b"%PDF-")
        before = svg.read_bytes(), pdf.read_bytes()
        write_plots(rows, axes, "Tiny", tmp_path)
        assert (svg.read_bytes(), pdf.read_bytes()) == before
    axes = axes_of(rows, study.varied, x="ipc", y="auc", by="", where={})
    with pytest.raises(FedistillError, match="No finished cell has a figure auc"):
        write_plots(rows, axes, "Tiny", tmp_path)


def test_without_privacy_there_is_a_line_across(tmp_path: Path) -> None:
    base = {"status": "ok", "kind": "multiclass", "eval_model": "mlp", "trained_on": "distilled"}
    rows = [base | {"epsilon": e, "seed": s, "auc": 0.7 + s / 9 - e / 90} for e in (0.0, 1.0, 10.0) for s in (0, 1)]
    axes = axes_of(rows, ["epsilon"], x="epsilon", y="auc", by="", where={})
    svg, _ = write_plots(rows, axes, "Privacy", tmp_path)
    assert "no privacy" in svg.read_text()
    about = dict.fromkeys((*FIGURES, "reason", "cell")) | {"auc": 0.5}
    assert '"epsilon": "no privacy"' in page("Privacy", [about | row for row in rows], ["epsilon"], cells=3).decode()


def test_the_page_needs_nothing_else(ended) -> None:
    rows, study = rows_in(ended), ended[0]
    text = page("Tiny <b>", rows, study.varied, cells=5).decode()
    assert not re.search(r'https?:|src=|href="[^#]|@import|url\(', text)
    assert "<h1>Tiny &lt;b&gt;</h1>" in text
    assert "An expert diverged &lt;/script&gt;" in text
    assert text.count("</script>") == 2
    assert "prefers-color-scheme: dark" in text
    assert text.count("<label>") == 3
    assert re.findall(r'<dd class="figure words">(.*?)</dd>', text) == [
        "3 of 5 cells",
        ".510 to .710",
        "No formal guarantee",
        "12.3 MB",
    ]
    assert ".510 ± .014</td>" in text  # without JavaScript, too


def test_foreign_folders_are_refused_and_kept(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, TEXT))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FedistillError, match="neither empty nor that of a study"):
        run_study(study, cells_of(study), tmp_path / "out", Console(file=StringIO()))
    with pytest.raises(FedistillError, match="is a file"):
        refuse_foreign(tmp_path / "out" / "thesis.txt", study)
    write_json(tmp_path / "other" / "study.json", {"study": "other"})
    with pytest.raises(FedistillError, match="holds the study other"):
        refuse_foreign(tmp_path / "other", study)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "irreplaceable"
    assert read_json(tmp_path / "other" / "study.json") == {"study": "other"}


def test_accuracy_over_bytes_has_a_line_per_arm_and_a_point_per_number_of_rounds(tmp_path: Path) -> None:
    def row(cell: str, arm: str, seed: int, sent: int | None, rounds: int | None, auc: float) -> Row:
        figures = {"upload_bytes": sent, "after_rounds": rounds, "auc": auc, "status": "ok", "ipc": len(cell)}
        return {"cell": cell, "eval_model": "mlp", "trained_on": arm, "seed": seed} | figures

    rows = [
        row("a", "distilled", 0, 90, 1, 0.8), row("a", "distilled", 1, 110, 1, 0.9), row("a", "fedavg-1", 0, 400, 1, 0.5),
        row("a", "fedavg", 0, 4000, 10, 0.7), row("a", "local_only", 0, 0, None, 0.6), row("bb", "distilled", 0, 900, 1, 0.85),
        row("bb", "local_only", 0, 0, None, 0.6), row("a", "centralised", 0, 5000, None, 0.9),
        row("bb", "centralised", 0, 5000, None, 0.8),
    ]  # fmt: skip
    axes = axes_of(rows, ["ipc"], x="upload_bytes", y="auc", by="", where={})
    found = {line.name: dict(line.points) for line in lines_of(rows, axes)}
    assert found == {
        "ipc 1, Distilled union": {100: [0.8, 0.9]},
        "Federated averaging": {400: [0.5], 4000: [0.7]},
        "Local only": {0: [0.6]},
        "ipc 1, Centralised": {5000: [0.9]},
        "ipc 2, Distilled union": {900: [0.85]},
        "ipc 2, Centralised": {5000: [0.8]},
    }
    axes = axes_of(rows, ["ipc"], x="after_rounds", y="auc", by="family", where={"ipc": "1"})
    found = {line.name: dict(line.points) for line in lines_of(rows, axes)}
    assert found["Federated averaging"] == {1: [0.5], 10: [0.7]}
    files = write_plots(rows, axes, "Tiny", tmp_path)
    assert [file.name for file in files] == [f"auc-over-after_rounds-by-family-1.{end}" for end in ("svg", "pdf")]
    with pytest.raises(FedistillError, match="Unknown column of the study 'family'"):
        axes_of(rows, ["ipc"], x="ipc", y="auc", by="family", where={})
