from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from fedistill.report.page import render_report
from fedistill.report.tables import (
    BEST,
    arms_markdown,
    arms_table,
    duration,
    number,
    score,
    sites_table,
    size,
    verdict,
)

Pair = tuple[float | None, float | None]


def make(distilled: Pair, random_real: Pair, centralised: Pair = (0.8, 0.01), images: int = 150) -> dict[str, Any]:
    def arm(pair: Pair, shift: float, n: int) -> dict[str, Any]:
        names = ("balanced_accuracy", "accuracy", "macro_f1", "auc")
        mean, std = pair
        figures = {
            k: {"mean": None if mean is None else mean + shift + i / 97, "std": std} for i, k in enumerate(names)
        }
        return figures | {"images": n, "upload_bytes": 2352 * n, "std_over": "networks"}

    arms = {
        "centralised": arm(centralised, 0, 524),
        "distilled": arm(distilled, 0, 150),
        "random_real": arm(random_real, 0, images),
    }
    return {"arms": arms}


def shown(table: object) -> str:
    console = Console(width=200, file=None, record=True, force_terminal=False, quiet=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_every_figure_is_from_the_summary() -> None:
    summary = make((0.712, 0.021), (0.589, 0.033))
    terminal, markdown = shown(arms_table(summary)), arms_markdown(summary)
    for arm in summary["arms"].values():
        for metric in ("balanced_accuracy", "accuracy", "macro_f1", "auc"):
            expected = f"{arm[metric]['mean']:.3f} ± {arm[metric]['std']:.3f}".replace("0.", ".")
            assert expected in terminal
            assert expected in markdown
        assert f"{arm['images']}" in terminal
        assert size(arm["upload_bytes"]) in markdown
    assert "over networks" in terminal.replace("\n", " ")
    real = "not private and never sent: Random real images, Centralised."
    assert real in markdown
    assert real in " ".join(terminal.split())
    assert markdown.index("Distilled union ★") < markdown.index("Random real images") < markdown.index("Centralised")


def test_markdown_has_equal_columns() -> None:
    rows = [line for line in arms_markdown(make((0.7, 0.02), (0.6, 0.02))).splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {8}


@pytest.mark.parametrize(
    ("distilled", "random_real", "said"),
    [
        ((0.71, 0.02), (0.587, 0.03), "beats random real images of the same budget by 12.3 points"),
        ((0.55, 0.02), (0.60, 0.01), "loses to random real images of the same budget by 5.0 points"),
        ((0.61, 0.03), (0.58, 0.03), "cannot be told apart: the difference of +3.0 points is within"),
        ((0.58, 0.03), (0.61, 0.03), "cannot be told apart: the difference of -3.0 points is within"),
        ((0.71, None), (0.60, None), "chance is not ruled out"),
        ((0.71, 0.0), (0.60, 0.0), "chance is not ruled out"),
        ((None, None), (0.60, 0.1), "There is no verdict"),
        ((float("nan"), 0.1), (0.60, 0.1), "There is no verdict"),
    ],
)
def test_verdict(distilled: Pair, random_real: Pair, said: str) -> None:
    assert said in verdict(make(distilled, random_real))


@pytest.mark.parametrize(
    ("kind", "headline", "columns"),
    [
        ("multilabel", "AUC", "| Arm | AUC | mAP | Balanced accuracy | Accuracy | Macro-F1 | Images | Upload |"),
        (
            "ordinal",
            "QWK",
            "| Arm | QWK | MAE (grades) | Balanced accuracy | Accuracy | Macro-F1 | AUC | Images | Upload |",
        ),
    ],
)
def test_each_kind_has_its_figures_and_its_headline(kind: str, headline: str, columns: str) -> None:
    summary = make((0.5, 0.02), (0.6, 0.02)) | {"data": {"kind": kind}}  # the distilled union loses on the old figures
    for arm, value in (("distilled", 0.8), ("random_real", 0.6)):
        summary["arms"][arm] |= {name: {"mean": value, "std": 0.01} for name in ("auc", "map", "qwk", "mae")}
    assert arms_markdown(summary).startswith(columns + "\n")
    assert f"higher {headline} of the two arms" in arms_markdown(summary)
    assert "Distilled union ★" in arms_markdown(summary)
    assert f"On {headline} the distilled union beats random real images of the same budget by 20.0 points" in verdict(
        summary
    )
    assert headline in shown(arms_table(summary))


def test_verdict_combines_the_deviations() -> None:
    # .05 lies above each deviation but within sqrt(.04² + .04²) = .057
    assert "cannot be told apart" in verdict(make((0.65, 0.04), (0.60, 0.04)))


def test_verdict_tells_unequal_budgets_and_the_price() -> None:
    text = verdict(make((0.71, 0.02), (0.60, 0.02), centralised=(0.751, 0.01), images=120))
    assert "(150 against 120 images)" in text
    assert "4.1 points below centralised" in text
    assert "within one standard deviation of centralised" in verdict(make((0.79, 0.02), (0.6, 0.02)))


@pytest.mark.parametrize(
    ("key", "name"), [("fedavg", "Federated averaging"), ("dp-fedavg", "Private federated averaging")]
)
def test_averaging_is_an_arm_without_images(key: str, name: str) -> None:
    summary = make((0.71, 0.02), (0.60, 0.02))
    summary["arms"][key] = summary["arms"]["centralised"] | {
        "balanced_accuracy": {"mean": 0.77, "std": 0.01}, "images": None, "upload_bytes": 81_600,
    }  # fmt: skip
    row = next(line for line in arms_markdown(summary).splitlines() if name in line)
    assert row.endswith("| - | 81.6 kB |")
    assert f"6.0 points below {name.lower()} and 9.0 points below centralised" in verdict(summary)
    page = render_report(summary, {}, {})
    assert f">{name}</th>" in page
    assert "<td>-</td><td>81.6 kB</td>" in page


@pytest.mark.parametrize("summary", [{}, {"arms": {}}, {"arms": {"distilled": None}}])
def test_nothing_known_is_no_error(summary: dict[str, Any]) -> None:
    assert "no verdict" in verdict(summary)
    assert shown(arms_table(summary))
    assert BEST in arms_markdown(summary)
    assert shown(sites_table(summary))


def test_sites_table_shows_failures_and_hides_control_codes() -> None:
    site = {
        "name": "[red]x\x1b[31m",
        "status": "failed",
        "reason": "Out of memory.",
        "train": 7,
        "images": [3, 4],
        "phases": {},
    }
    text = shown(sites_table({"sites": [site]}))
    assert "failed: Out of memory." in text
    assert "[red]x" in text
    assert "\x1b" not in text
    assert "7" in text


def test_figures_for_people() -> None:
    assert [score({"mean": 0.7104, "std": 0.02}), score(1.0), score(None)] == [".710 ± .020", "1.000", "n/a"]
    assert [size(0), size(999), size(117000), size(2.1e9), size(None)] == ["0 B", "999 B", "117 kB", "2.1 GB", "n/a"]
    assert [duration(3.21), duration(41), duration(412), duration(7500)] == ["3.2 s", "41 s", "6 min 52 s", "2 h 5 min"]
    assert [number(150), number(49.5), number(12345.0)] == ["150", "49.5", "12,345"]
