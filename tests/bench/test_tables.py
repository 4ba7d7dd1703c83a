"""Tables and plots from rows whose figures are known by heart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedistill.bench.plots import write_plots
from fedistill.bench.results import COLUMNS, Row, read_rows, write_rows
from fedistill.bench.run import write_tables
from fedistill.bench.tables import markdown, paired_differences, paired_table, signed
from fedistill.errors import FedistillError


def row(method: str, seed: int, accuracy: float | None, *, data: str = "eyes", ipc: int = 1, **more: object) -> Row:
    base: Row = dict.fromkeys(COLUMNS)
    base |= {"data": data, "method": method, "ipc": ipc, "seed": seed, "model": "convnet", "against": "", "reason": ""}
    base |= {"status": "failed" if accuracy is None else "ok", "images": 10 * ipc, "upload_bytes": 1000 * ipc}
    return base | dict.fromkeys(("accuracy", "balanced_accuracy", "auc", "val_auc"), accuracy) | more


ROWS = [
    row("whole", 0, 0.9, ipc=0),
    row("whole", 1, 0.8, ipc=0),
    row("mtt", 0, 0.6),
    row("mtt", 1, 0.7),
    row("ptm", 0, 0.7, against="mtt"),
    row("ptm", 1, 0.74, against="mtt"),
    row("random", 0, 0.5),
    row("random", 1, 0.4),
    row("mtt", 0, 0.8, ipc=10),
    row("mtt", 1, 0.8, ipc=10),
    row("ptm", 0, 0.7, ipc=10, against="mtt"),
    row("ptm", 1, None, ipc=10, against="mtt", reason="Too much | of it."),
    row("random", 0, None, ipc=10, reason="defect: KeyError"),
    row("random", 1, None, ipc=10, reason="defect: KeyError"),
]


def line(text: str, section: str, first: str) -> list[str]:
    """The entries of the row that starts with `first`, in the first table after the heading `section`."""
    after = text.split(f"### {section}\n", 1)[1]
    found = next(part for part in after.splitlines() if part.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[2:-1]]


def test_means_deviations_bold_and_failures() -> None:
    text = markdown(ROWS)
    assert line(text, "Accuracy", "method") == ["eyes, IPC 1", "eyes, IPC 10"]
    assert line(text, "Accuracy", "mtt") == [".650 ± .071", "**.800 ± .000**"]
    assert line(text, "Accuracy", "ptm") == ["**.720 ± .028**", ".700 (n=1, 1 failed)"]
    assert line(text, "Accuracy", "random") == [".450 ± .071", "failed"]
    assert line(text, "Accuracy", "*whole*") == [".850 ± .071", ".850 ± .071"]
    assert line(text, "Macro-F1", "mtt") == ["–", "–"]  # no figure: nothing is bold
    assert "over 2 seeds" in text
    assert "| eyes | ptm | 10 | 1 | Too much \\| of it. |" in text


GRADED = [
    row("whole", 0, 0.9, ipc=0, data="grades", qwk=0.8, mae=0.2, val_qwk=0.7),
    row("mtt", 0, 0.8, data="grades", qwk=0.4, mae=0.9, val_qwk=0.3),
    row("ptm", 0, 0.5, data="grades", qwk=0.6, mae=0.5, val_qwk=0.5, against="mtt"),
    row("random", 0, 0.7, data="grades", qwk=0.1, mae=1.5, val_qwk=0.2),
    row("mtt", 0, 0.8, data="chests", map=0.3, val_map=0.25),
    row("ptm", 0, 0.7, data="chests", map=0.4, val_map=0.45, against="mtt"),
]


def test_grades_and_findings_are_compared_by_their_own_figures(tmp_path: Path) -> None:
    """ptm has fewer grades exactly right than mtt, and is nearer to them."""
    text = markdown([*ROWS, *GRADED])
    assert line(text, "QWK", "method") == ["chests, IPC 1", "eyes, IPC 1", "eyes, IPC 10", "grades, IPC 1"]
    assert line(text, "QWK", "ptm") == ["–", "–", "failed", "**.600 (n=1)**"]
    assert line(text, "MAE (grades)", "ptm")[3] == "**.500 (n=1)**"  # the smaller, the better
    assert line(text, "mAP", "ptm")[0] == "**.400 (n=1)**"
    assert line(text, "Recovery of all real images (HLR)", "ptm")[3] == "**+.200 (n=1)**"  # 0.8 - 0.6 in QWK
    assert line(text, "Improvement over random real images (IOR)", "mtt")[3] == "+.300 (n=1)"
    assert line(text, "Recovery of all real images (HLR)", "ptm")[1] == "**+.130 ± .099**"  # of classes as before
    assert "Of chests it is AUC in place of accuracy. Of grades it is QWK in place of accuracy." in text
    assert "QWK on validation:\n\n| pair | IPC 1 | IPC 10 |" in text
    assert "QWK" not in markdown(ROWS)
    write_plots([*ROWS, *GRADED], tmp_path)
    svg = (tmp_path / "accuracy-by-images.svg").read_text()
    assert all(f"{name} (convnet)" in svg for name in ("AUC", "balanced accuracy", "QWK"))


def test_a_table_from_before_has_no_figures_of_grades(tmp_path: Path) -> None:
    old = [name for name in COLUMNS if "qwk" not in name and "map" not in name and name != "mae"]
    write_rows(tmp_path / "results.csv", ROWS, old)
    assert read_rows(tmp_path / "results.csv") == ROWS


def test_half_measured_methods_cannot_be_the_best() -> None:
    rows = [*ROWS, row("lucky", 0, 0.99)]
    assert line(markdown(rows), "Accuracy", "lucky")[0] == ".990 (n=1)"
    assert line(markdown(rows), "Accuracy", "ptm")[0] == "**.720 ± .028**"


def test_recovery_and_improvement() -> None:
    """HLR of ptm at IPC 1: (0.9 - 0.7, 0.8 - 0.74); IOR of ptm: (0.7 - 0.5, 0.74 - 0.4)."""
    text = markdown(ROWS)
    assert line(text, "Recovery of all real images (HLR)", "ptm")[0] == "**+.130 ± .099**"
    assert line(text, "Recovery of all real images (HLR)", "mtt") == ["+.200 ± .141", "**+.050 ± .071**"]
    assert line(text, "Improvement over random real images (IOR)", "ptm")[0] == "**+.270 ± .099**"
    assert line(text, "Improvement over random real images (IOR)", "mtt")[1] == "failed"  # random is


def test_pairs_share_data_and_seed() -> None:
    rows = [*ROWS, row("mtt", 0, 0.3, data="lungs"), row("ptm", 0, 0.2, data="lungs", against="mtt")]
    assert paired_differences(rows, "ptm", "mtt", 1, "accuracy") == pytest.approx([0.1, 0.04, -0.1])
    assert paired_differences(rows, "ptm", "mtt", 10, "accuracy") == pytest.approx([-0.1])
    # mean 0.04 / 3, deviation 0.1026..., error 0.0593
    assert "| ptm − mtt | +.013 ± .059 (3) | −.100 (1) |" in paired_table(rows, "accuracy")
    assert paired_table(ROWS, "macro_f1") == "There are none yet."


def test_signs() -> None:
    assert signed({"mean": -0.0123, "std": 0.1}) == "−.012 ± .100"
    assert signed({"mean": 0.0001, "std": None}) == ".000"


def test_models_have_tables_of_their_own_the_headline_first() -> None:
    rows = [r | {"model": model} for r in ROWS for model in ("mlp", "convnet")]
    assert re.findall("## Networks: (.*)", markdown(rows)) == ["mlp", "convnet"]


def test_a_committed_table_is_enough(tmp_path: Path) -> None:
    write_rows(tmp_path / "results.csv", ROWS)
    assert read_rows(tmp_path / "results.csv") == ROWS
    write_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == markdown(ROWS)
    svg = (tmp_path / "accuracy-by-images.svg").read_bytes()
    assert all(word in svg.decode() for word in ("eyes", "ptm", "whole", "images in the set"))
    assert "bytes of the set" in (tmp_path / "accuracy-by-bytes.svg").read_text()
    write_tables(tmp_path)
    assert (tmp_path / "accuracy-by-images.svg").read_bytes() == svg


def test_nothing_to_show_yet(tmp_path: Path) -> None:
    for rows in ([], [row("mtt", 0, None)], [row("whole", 0, 0.5, ipc=0)]):
        assert markdown(rows).startswith("# Benchmark")
        assert write_plots(rows, tmp_path) == []


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="run the benchmark first"):
        read_rows(tmp_path / "results.csv")
    (tmp_path / "results.csv").write_text("data,method\nx,y\n")
    with pytest.raises(FedistillError, match="it lacks ipc, seed"):
        read_rows(tmp_path / "results.csv")
    (tmp_path / "results.csv").write_text(",".join(COLUMNS) + "\n" + ",".join("x" for _ in COLUMNS) + "\n")
    with pytest.raises(FedistillError, match="is not a table of results"):
        read_rows(tmp_path / "results.csv")
