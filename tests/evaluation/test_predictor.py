"""The predictor: it finds a line that is there, is honest about data sets left out, and yields to simpler rivals."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedistill.errors import FedistillError
from fedistill.evaluation import predictor as predictor_module
from fedistill.evaluation.predictor import (
    FEATURES,
    Cell,
    features,
    fit_predictor,
    load_predictor,
    predict,
    read_cells,
    save_predictor,
    unseen,
)

COLUMNS = [
    "data",
    "method",
    "ipc",
    "seed",
    "model",
    "status",
    "reason",
    "images",
    "upload_bytes",
    "balanced_accuracy",
    "auc",
]
Gain = Callable[[str, float, float, float, float], float]  # data, random, headroom, log10 ipc, share


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(predictor_module, "PATH", tmp_path / "predictor.json")
    return tmp_path / "results.csv"


def benchmark(path: Path, gain: Gain, *, sets: str = "abcdef", seeds: int = 2) -> list[dict[str, object]]:
    """A benchmark of made-up data sets in which distilled sets gain what `gain` says; the rows, also written to `path`."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []

    def add(data: str, method: str, ipc: object, images: int, score: float, **more: object) -> None:
        for seed in range(seeds):
            shift = 0.01 * (seed - (seeds - 1) / 2)  # the mean over seeds is `score`
            row = dict.fromkeys(COLUMNS, "") | {
                "data": data,
                "method": method,
                "ipc": ipc,
                "seed": seed,
                "status": "ok",
            }
            rows.append(row | {"model": "convnet", "images": images, "balanced_accuracy": score + shift} | more)

    for data in sets:
        whole, images = rng.uniform(0.6, 0.9), int(rng.integers(300, 2000))
        add(data, "whole", "", images, whole)
        add(data, "whole", "", images, 0.1, model="mlp")
        for ipc in (1, 5, 10):
            random = whole - rng.uniform(0.0, 0.3)
            seen = (random, whole - random, math.log10(ipc), 2 * ipc / images)
            add(data, "random", ipc, 2 * ipc, random)
            add(data, "dm", ipc, 2 * ipc, random + gain(data, *seen))
            add(data, "dm", ipc, 2 * ipc, 0.99, status="failed")
            add(data, "cf", ipc, 2 * ipc, 0.2)
    write(path, rows)
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def linear(data: str, random: float, headroom: float, log10_ipc: float, share: float) -> float:
    return 0.05 - 0.1 * random + 0.5 * headroom - 0.06 * log10_ipc


def test_a_line_that_is_there_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(path, linear, sets="abcdefghij")
    cells = read_cells(path)
    assert len(cells) == 30
    gains = [cell.distilled - cell.random for cell in cells]
    assert gains == pytest.approx([linear(cell.data, *features(cell)) for cell in cells])

    monkeypatch.setattr(predictor_module, "RIDGE", 1e-9)
    exact = fit_predictor(cells, path)
    assert exact.kind == "ridge"
    assert exact.intercept == pytest.approx(0.05, abs=1e-6)
    assert list(exact.coefficients.values()) == pytest.approx([-0.1, 0.5, -0.06, 0.0], abs=1e-6)
    assert exact.error("ridge") < 1e-6

    monkeypatch.undo()
    shrunk = fit_predictor(cells, path)
    assert shrunk.kind == "ridge"
    assert shrunk.error("ridge") < 0.01 < min(shrunk.error("mean gain"), shrunk.error("random"))


def test_the_ridge_equals_scikit_learn(path: Path) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    benchmark(path, lambda data, *seen: linear(data, *seen) + 0.02 * rng.standard_normal())
    cells = read_cells(path)
    fitted = fit_predictor(cells, path)
    assert fitted.kind == "ridge"
    x, y = np.stack([features(c) for c in cells]), [c.distilled - c.random for c in cells]
    oracle = Ridge(alpha=1.0).fit(StandardScaler().fit_transform(x), y)
    want = oracle.predict(StandardScaler().fit_transform(x))
    mine = fitted.intercept + x @ np.array([fitted.coefficients[name] for name in FEATURES])
    assert mine == pytest.approx(want)


def test_the_error_is_that_on_a_data_set_that_was_left_out(path: Path) -> None:
    """In "f" distillation loses 20 points, elsewhere it gains 10: only leaving "f" out shows that it is off by 30 points."""
    benchmark(path, lambda data, *seen: -0.2 if data == "f" else 0.1)
    fitted = fit_predictor(read_cells(path), path)
    errors = fitted.errors["mean gain"]
    assert errors["f"] == pytest.approx(0.3)
    assert errors["a"] == pytest.approx(0.1 - (4 * 0.1 - 0.2) / 5)  # the mean without "a" still has "f" in it
    assert fitted.error("mean gain") == pytest.approx(np.mean([0.3] + [errors["a"]] * 5))
    assert fitted.errors["random"] == pytest.approx(dict.fromkeys("abcde", 0.1) | {"f": 0.2})
    assert fitted.errors["ridge"]["f"] > 0.25
    assert fitted.half_width >= min(0.2, errors["f"])  # 3 of 18 cells are that far off


def test_where_nothing_is_gained_the_trivial_predictor_is_stored(path: Path) -> None:
    rng = np.random.default_rng(2)
    benchmark(path, lambda data, *seen: 0.05 * rng.standard_normal())
    cells = read_cells(path)
    fitted = fit_predictor(cells, path)
    assert fitted.kind == "random"
    assert fitted.error("random") < min(fitted.error("mean gain"), fitted.error("ridge"))
    assert (fitted.intercept, set(fitted.coefficients.values())) == (0.0, {0.0})
    save_predictor(fitted)
    assert load_predictor() == fitted
    assert predict(fitted, cells[0], noise=0.0).mean == pytest.approx(cells[0].random)


def test_a_gain_that_is_the_same_everywhere_needs_no_line(path: Path) -> None:
    benchmark(path, lambda data, *seen: 0.08)
    fitted = fit_predictor(read_cells(path), path)
    assert fitted.kind == "mean gain"
    assert fitted.intercept == pytest.approx(0.08)
    assert fitted.half_width == pytest.approx(0, abs=1e-9)


def test_the_interval_covers_a_new_data_set_about_as_often_as_it_says(path: Path) -> None:
    """Nine of ten further cells with the same noise lie inside; an interval from the residuals of the fit would be narrower."""
    rng = np.random.default_rng(3)
    benchmark(path, lambda data, *seen: linear(data, *seen) + 0.03 * rng.standard_normal(), sets="abcdefghijkl")
    cells = read_cells(path)
    fitted = fit_predictor(cells, path)
    inside = 0
    for _ in range(500):
        cell = cells[rng.integers(len(cells))]
        truth = cell.random + linear(cell.data, *features(cell)) + 0.03 * rng.standard_normal()
        found = predict(fitted, cell, noise=0.0)
        inside += found.low <= truth <= found.high
    assert 0.85 <= inside / 500 <= 0.99


def test_noise_widens_the_interval_and_scores_stay_scores(path: Path) -> None:
    benchmark(path, lambda data, *seen: 0.08)
    fitted = fit_predictor(read_cells(path), path)
    cell = Cell("new", 10, 0.7, 0.9, 0.01)
    sure, unsure = predict(fitted, cell, noise=0.0), predict(fitted, cell, noise=0.02)
    assert sure.mean == unsure.mean == pytest.approx(0.78)
    assert unsure.high - unsure.low == pytest.approx(2 * 1.645 * 0.02)
    top = predict(fitted, Cell("new", 10, 0.97, 0.98, 0.01), noise=0.1)
    assert (top.mean, top.high) == (1.0, 1.0)
    assert unseen(fitted, cell) == []
    assert unseen(fitted, Cell("new", 100, 0.7, 0.9, 0.9)) == ["log10_ipc", "share"]


def test_what_is_stored_comes_back_with_its_provenance(path: Path) -> None:
    benchmark(path, linear)
    fitted = fit_predictor(read_cells(path), path)
    assert load_predictor() is None
    save_predictor(fitted)
    assert load_predictor() == fitted
    assert fitted.provenance["csv"] == "results.csv"
    assert fitted.provenance["cells"] == dict.fromkeys("abcdef", 3)
    assert fitted.provenance["ipc"] == [1, 5, 10]
    assert (fitted.model, fitted.methods) == ("convnet", ("dm",))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda text: text.replace("balanced_accuracy", "accuracy", 1), "has no column 'balanced_accuracy'"),
        (lambda text: "", "has no column 'data'"),
        (lambda text: text.replace(",ok,", ",failed,"), "has no data set and ipc with status ok"),
        (lambda text: text.replace("whole", "dsa"), "has no data set and ipc with status ok"),
        (lambda text: text.replace("0.1", "ten", 1), "line .*: balanced_accuracy=.*ten.* is not a number from 0 to 1"),
        (lambda text: text.replace("0.1", "41", 1), "is not a number from 0 to 1"),
        (lambda text: text + "a,random,1.5,0,convnet,ok,,2,,0.5,\n", "ipc=1.5 is not a whole number"),
        (lambda text: text + "a,random\n", "fewer values than there are columns"),
        (lambda text: "\n".join(r for r in text.splitlines() if r[1] != "," or r[0] in "ab"), "2 data set.*at least three"),
    ],
)  # fmt: skip
def test_a_bad_csv_is_one_sentence(path: Path, spoil: Callable[[str], str], sentence: str) -> None:
    rows = benchmark(path, linear)
    write(path, [row | ({"balanced_accuracy": 0.1} if row["method"] == "whole" else {}) for row in rows])
    path.write_text(spoil(path.read_text()))
    with pytest.raises(FedistillError, match=sentence) as caught:
        fit_predictor(read_cells(path), path)
    assert "\n" not in caught.value.sentence


def test_files_that_are_none(path: Path) -> None:
    with pytest.raises(FedistillError, match="there is no such file"):
        read_cells(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FedistillError, match="is not a readable CSV file"):
        read_cells(path)
    with pytest.raises(FedistillError, match="is not a readable CSV file"):
        read_cells(path.parent)
