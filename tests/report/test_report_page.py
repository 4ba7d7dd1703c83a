from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from pages import CLASSES, arm, make_set, make_summary, render

from fedistill.data.dataset import Split
from fedistill.evaluation.intervals import wilson
from fedistill.report.page import render_report
from fedistill.report.tables import METRICS, guarantee, score

VOID = {"meta", "img", "link", "br", "hr", "input"}
NASTY = "<script>alert(1)</script>"


class Balance(HTMLParser):
    """Collects tags, addresses and text, and fails on an end tag without its start."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_balanced_and_stands_alone() -> None:
    page = render(make_summary())
    found = parse(page)
    assert re.findall(r"https?://[^\s\"'<]*", page) == ["http://www.w3.org/2000/svg"] * page.count("xmlns=")
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "@import" not in page
    assert "url(" not in page
    assert found.tags.count("h1") == 1
    assert '<html lang="en">' in page
    assert 'name="viewport"' in page
    assert 'href="#results"' in page
    assert 'id="results"' in page


def test_images_are_embedded_with_a_description() -> None:
    found = parse(render(make_summary()))
    assert len(found.images) == 3 * len(CLASSES)
    assert "2 synthetic images of jtsc, neutrophil" in {image["alt"] for image in found.images}
    assert all(str(image["src"]).startswith("data:image/png;base64,") and image["alt"] for image in found.images)
    assert "not photographs of patients" in found.text


def test_figures_of_the_summary_are_on_the_page() -> None:
    summary = make_summary()
    text = parse(render(summary)).text
    for figures in summary["arms"].values():
        assert all(score(figures[m]) in text for m in ("accuracy", "balanced_accuracy", "macro_f1", "auc"))
        assert all(score(recall) in text for recall in figures["per_class_recall"].values())
    for expected in ("No formal privacy guarantee", "over seeds", "6 min 52 s", "351 kB", ".660", "500 (3 skipped)"):
        assert expected in text
    assert summary["command"] in text
    assert "ab12cd34ef56" in text


@pytest.mark.parametrize("place", ["site", "class", "note", "reason", "command", "config", "phase", "version"])
def test_untrusted_text_is_escaped(place: str) -> None:
    summary = make_summary()
    classes = CLASSES
    if place == "class":
        classes = (NASTY, *CLASSES[1:])
        summary["data"]["class_names"] = list(classes)
    elif place == "note":
        summary["notes"] = [NASTY]
    elif place == "reason":
        summary["sites"][0] |= {"status": "failed", "reason": NASTY}
    elif place == "phase":
        summary["sites"][0]["phases"][NASTY] = 1.0
    elif place == "command":
        summary["command"] = NASTY
    elif place == "config":
        summary["config"]["data"] = NASTY
    elif place == "version":
        summary["versions"]["torch"] = NASTY
    name = f'{NASTY}" onload="x' if place == "site" else "jtsc"
    summary["sites"][0]["name"] = name
    page = render_report(summary, {name: make_set(name, classes)}, {name: [(0, 1.0), (10, 0.5)], "b": [(0, 1.0)]})
    assert "script" not in parse(page).tags
    assert "<script" not in page
    assert '" onload="' not in page
    assert "&lt;script&gt;" in page


def private(**changes: Any) -> dict[str, Any]:
    summary = make_summary()
    promise = {"epsilon": 2.981, "delta": 1e-3, "unit": "patient", "accountant": "a", "mechanisms": ["sketch: 1 sum"]}
    for site in summary["sites"]:
        site |= {"images": None, "privacy": promise}
    union = {
        "epsilon": 2.981,
        "delta": 1e-3,
        "unit": "patient",
        "statement": "S",
        "answers_epsilon": 1.0,
        "simulated": True,
    }
    return summary | {"privacy": union | changes}


def test_a_promise_stands_where_the_warning_stood() -> None:
    text = " ".join(parse(render(private())).text.split())
    assert "No formal privacy guarantee" not in text
    for expected in ("(2.99, 0.001)-differential privacy of the merged set for every patient", "sketch: 1 sum", "noisy counts",
                     "budgets of a patient at several sites add up", "read the data themselves", "epsilon=1"):  # fmt: skip
        assert expected in text
    assert "per class" not in text.split("Results")[0]


def test_no_promise_for_the_union_where_a_site_gives_none() -> None:
    summary = private(
        epsilon=None, delta=None, unit=None, statement="No formal guarantee: the images of jtsc were made without."
    )
    summary["sites"][0]["privacy"] = {"epsilon": None, "delta": None, "unit": None, "accountant": "", "mechanisms": []}
    text = " ".join(parse(render(summary)).text.split())
    assert "No guarantee for the union. No formal guarantee: the images of jtsc" in text
    assert "No formal privacy guarantee." in text
    assert guarantee(summary) == "No formal guarantee: the images of jtsc were made without."
    assert guarantee(make_summary()) == ""


def test_failed_and_late_sites_are_told_before_the_results() -> None:
    summary = make_summary()
    summary["sites"][0] |= {
        "status": "failed",
        "reason": "Out of memory.",
        "images": None,
        "phases": {},
        "final_loss": None,
        "iterations": None,
    }
    summary["sites"][1]["status"] = "late"
    summary["notes"] = ["Site bccd answered late and is not in the merged set."]
    text = parse(render(summary)).text
    attention = text.index("Attention")
    assert attention < text.index("Out of memory.") < text.index("On balanced accuracy")
    assert attention < text.index(summary["notes"][0]) < text.index("On balanced accuracy")
    assert "1 of 3" in text


def test_warns_where_images_started_from_patients() -> None:
    summary = make_summary()
    assert "Started from real patients" not in render(summary)
    summary["config"]["init"] = "real"
    assert "Started from real patients" in render(summary)
    summary["config"]["data"] = "phantom"
    page = render(summary)
    assert "Started from real patients" not in page
    assert "procedural" in page


def test_null_and_missing_figures_are_shown_as_unknown() -> None:
    summary = make_summary()
    for figures in summary["arms"].values():
        figures["auc"] = {"mean": None, "std": None}
        figures["balanced_accuracy"] = {"mean": None, "std": None}
        figures["per_class_recall"]["basophil"] = {"mean": None, "std": None}
    text = parse(render(summary)).text
    assert "n/a" in text
    assert "There is no verdict" in text
    assert "nan" not in text.lower()


@pytest.mark.parametrize(
    ("kind", "figures", "words"),
    [
        (
            "multilabel",
            ("auc", "map"),
            ("On AUC the distilled union", "any number of findings", "Recall of each finding"),
        ),
        ("ordinal", ("qwk", "mae"), ("On QWK the distilled union", "one grade per image", "Recall of each class")),
    ],
)
def test_figures_of_the_kind_of_task_come_first(kind: str, figures: tuple[str, ...], words: tuple[str, ...]) -> None:
    summary = make_summary()
    summary["data"] |= {"kind": kind, "geometry": [1, 12, 28, 28]}
    for k, arm_ in enumerate(summary["arms"].values()):
        arm_ |= {name: {"mean": 0.4321 - 0.01 * k, "std": 0.012} for name in figures}
    page = render(summary)
    text = parse(page).text
    assert all(word in text for word in (*words, ".432 ± .012", "channels × depth × height × width"))
    titles, page = [METRICS[name] for name in figures], page[page.index('id="arms"') :]
    assert page.index(f">{titles[0]}</th>") < page.index(f">{titles[1]}</th>") < page.index(">Balanced accuracy</th>")


def test_empty_summary_still_renders() -> None:
    parse(render_report({}, {}, {}))
    bare = copy.deepcopy(make_summary())
    bare |= {"arms": {"distilled": {}, "random_real": None}, "federated": {}, "cross_architecture": {}}
    bare["sites"] = [{"name": "lonely"}]
    text = parse(render_report(bare, {}, {"lonely": []})).text
    assert "lonely" in text
    assert "Other architectures" not in text


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("cf", "compares them with the real images in every iteration"),
        ("random", "These are real patients’ images"),
    ],
)
def test_what_a_method_reads_is_said(method: str, sentence: str) -> None:
    summary = make_summary()
    assert sentence not in " ".join(render(summary | {"config": summary["config"] | {"method": "ptm"}}).split())
    assert sentence in " ".join(render(summary | {"config": summary["config"] | {"method": method}}).split())


def test_the_order_is_that_of_a_readers_questions() -> None:
    page = render(make_summary())
    parts = ("results", "sites", "images", "classes", "calibration", "architectures", "arms", "again")
    places = [page.index(f'<h2 id="{part}"') for part in parts]
    assert places == sorted(places)
    assert [f"#{part}" for part in parts] == re.findall(r'<li><a href="([^"]*)"', page)
    told = re.findall(r"<dt>(.*?)</dt>\s*<dd class=\"figure[^>]*>(.*?)</dd>", page)
    assert told == [
        ("What was made", "150 synthetic images"),
        ("How good: balanced accuracy", score(make_summary()["arms"]["distilled"]["balanced_accuracy"])),
        ("How private", "No formal guarantee"),
        ("How much was sent", "351 kB"),
    ]
    assert ("How private", "ε 2.99, δ 0.001") in re.findall(
        r"<dt>(.*?)</dt>\s*<dd class=\"figure[^>]*>(.*?)</dd>", render(private())
    )


def test_recall_has_the_interval_of_its_counts() -> None:
    page = render(make_summary())

    def row(name: str, share: str, right: int, of: int) -> str:
        low, high = (f"{end:.3f}".removeprefix("0") for end in wilson(right, of) or (0, 0))
        return f'<th scope="row">{name}</th><td>{share}</td><td>{low} to {high}</td><td>{right} of {of}</td>'

    assert row("neutrophil", ".850", 17, 20) in page  # at both sites
    assert row("neutrophil", ".900", 9, 10) in page
    assert row("basophil", ".000", 0, 3) in page


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"federated": {}}, "no site counted its answers"),
        ({"federated": {"distilled": {"jtsc": {"accuracy": 0.7}}}}, "the summary of this run has no counts"),
    ],
)
def test_without_counts_there_is_no_interval_and_a_reason(change: dict[str, Any], reason: str) -> None:
    text = " ".join(parse(render(make_summary() | change)).text.split())
    assert reason in text
    assert "Recognised" not in text


def test_noisy_counts_have_no_interval() -> None:
    summary = private()
    for figures in summary["federated"]["distilled"].values():
        figures["recognised"] = None
    text = " ".join(parse(render(summary)).text.split())
    assert "are private and have noise of their own" in text
    assert "Recognised" not in text


def test_calibration_is_left_out_where_the_server_had_no_data() -> None:
    page = render(make_summary())
    assert "Expected calibration error of a convnet" in " ".join(page.split())
    assert ".081 ± .011" in page
    for summary in (
        make_summary() | {"calibration": None},
        {k: v for k, v in make_summary().items() if k != "calibration"},
    ):
        assert "calibration" not in parse(render(summary)).text.lower()


def test_real_images_are_shown_only_where_they_are_phantoms() -> None:
    summary = make_summary()
    split = Split(
        torch.randint(256, (5, 3, 28, 28), dtype=torch.uint8), torch.arange(5), torch.zeros(5, dtype=torch.int64)
    )
    sets = {"jtsc": make_set("jtsc")}
    page = render_report(summary | {"config": summary["config"] | {"data": "phantom"}}, sets, {}, split)
    assert page.count("1 real phantoms, ") == 5
    page = render_report(summary, sets, {})
    assert "real phantoms" not in page
    assert "Real images are never shown here" in page


def test_sites_with_data_of_their_own_are_never_called_phantoms() -> None:
    summary = make_summary()
    summary["config"] |= {
        "data": "phantom",
        "server_data": "none",
    }  # the default of a setting that real sites do not use
    text = " ".join(parse(render(summary)).text.split())
    assert "phantom" not in text.split("Every setting")[0]
    assert "no patient is involved" not in text
    assert "Distillation report: the sites’ own data" in text
    summary["config"]["server_data"] = "same"
    assert "no patient is involved" in " ".join(parse(render(summary)).text.split())


def test_selected_real_images_are_shown_only_where_they_are_phantoms() -> None:
    summary = make_summary()
    summary["config"] |= {"method": "random"}
    page = render(summary)
    assert "they are not shown here" in page
    assert "<img" not in page
    summary["config"] |= {"data": "phantom"}
    assert page.count("<img") < render(summary).count("<img")


def test_networks_that_travelled_for_a_comparison_are_told() -> None:
    summary = make_summary()
    sentence = "where their parameters are what travels"
    assert sentence not in " ".join(parse(render(summary)).text.split())
    summary["arms"]["ensemble"] = arm(0.6)
    assert sentence in " ".join(parse(render(summary)).text.split())
