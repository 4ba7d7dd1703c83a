from __future__ import annotations

from xml.etree import ElementTree

import pytest

from fedistill.report.curves import POINTS, arms_chart, loss_chart, thin, ticks


def test_charts_are_valid_and_described() -> None:
    curves = {
        "<a&b>": [(0, 1.0), (10, float("nan")), (20, 0.25)],
        "b": [(k, 1 / (k + 1)) for k in range(1000)],
        "c": [],
    }
    root = ElementTree.fromstring(loss_chart(curves, "Loss <of> sites"))
    assert root.get("role") == "img"
    assert "<a&b> from 1.000 to 0.250" in str(root.get("aria-label"))
    name = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{name}title") == "Loss <of> sites"
    lines = root.findall(f"{name}polyline")
    assert [len(str(line.get("points")).split()) for line in lines] == [2, len(thin(curves["b"]))]
    assert len({(line.get("style"), line.get("stroke-dasharray")) for line in lines}) == 2


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": [(0, 0.0)]}, {"a": [(0, float("inf"))]}])
def test_little_to_draw_is_no_error(curves: dict[str, list[tuple[int, float]]]) -> None:
    ElementTree.fromstring(loss_chart(curves, "Loss"))
    ElementTree.fromstring(arms_chart({}, "accuracy"))


def test_arms_chart_draws_known_arms_only() -> None:
    arms = {
        "distilled": {"balanced_accuracy": {"mean": 0.7, "std": 0.02}},
        "centralised": {"balanced_accuracy": {"mean": None, "std": None}},
    }
    chart = arms_chart({"arms": arms, "data": {"class_names": ["a", "b"]}}, "balanced_accuracy")
    assert chart.count("<circle") == 1
    assert "chance" in chart
    assert ".700 ± .020" in chart
    assert "n/a" in chart


def test_thin_keeps_the_mean() -> None:
    line = thin([(k, float(k)) for k in range(300)])
    assert len(line) == POINTS
    assert line[0] == (0.5, 0.5)


@pytest.mark.parametrize("top", [0.003, 0.99, 1.0, 1.24, 1.26, 3.0, 7.0, 150, 500, 5000])
def test_ticks_are_few_and_within(top: float) -> None:
    values = ticks(top)
    assert 3 <= len(values) <= 6
    assert values[0] == 0
    assert values[-1] <= top
