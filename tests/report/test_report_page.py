from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from fedistill.report.page import render_report
from fedistill.report.tables import METRICS, guarantee, score
from fedistill.synthetic.set import SyntheticSet, one_hot

CLASSES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")
VOID = {"meta", "img", "link", "br", "hr", "input"}
NASTY = "<script>alert(1)</script>"


def arm(mean: float, std: float | None = 0.02, images: int = 150) -> dict[str, Any]:
    metrics = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
    figures = {name: {"mean": mean + 0.013 * k, "std": std} for k, name in enumerate(metrics)}
    recall = {name: {"mean": max(0.0, mean - 0.031 * k), "std": std} for k, name in enumerate(CLASSES)}
    return {
        **figures,
        "per_class_recall": recall,
        "images": images,
        "upload_bytes": 2352 * images,
        "seconds": 12.0,
        "std_over": "seeds",
        "learning_rate": [0.03, 0.1, 0.03],
    }


def make_summary() -> dict[str, Any]:
    def site(name: str, images: list[int]) -> dict[str, Any]:
        return {
            "name": name,
            "status": "ok",
            "reason": "",
            "train": sum(images),
            "images": images,
            "phases": {"experts": 12.3, "distill": 140.1},
            "upload_bytes": 117000,
            "iterations": 500,
            "skipped_iterations": 3,
            "final_loss": 0.41,
            "synthetic_images": 50,
            "notes": [],
        }

    arms = {
        "distilled": arm(0.71),
        "random_real": arm(0.587, 0.03),
        "local_only": arm(0.64, 0.05, 50),
        "centralised": arm(0.751, 0.01, 524),
    }
    return {
        "format": "fedistill-summary/1",
        "config": {"data": "wbc_sites", "method": "datm", "init": "noise", "ipc": 10, "eval_models": "convnet,mlp"},
        "versions": {"fedistill": "0.1.0", "torch": "2.6.0", "flwr": "1.41.0", "python": "3.11.9"},
        "seed": 0,
        "seeds": [0, 1, 2],
        "command": "fedistill simulate --data wbc_sites --set ipc=10 --seeds 3",
        "data": {
            "name": "wbc_sites",
            "fingerprint": "ab12cd34ef56",
            "modality": "generic",
            "class_names": list(CLASSES),
            "geometry": [3, 28, 28],
            "train": 524,
            "val": 74,
            "test": 153,
            "partition": "site",
        },
        "sites": [
            site("jtsc", [123, 37, 33, 15, 1]),
            site("bccd", [60, 22, 9, 40, 2]),
            site("rabin", [80, 50, 30, 20, 2]),
        ],
        "arms": arms,
        "cross_architecture": {"mlp": {"distilled": arm(0.55), "random_real": arm(0.51)}},
        "federated": {
            "distilled": {
                "jtsc": {"accuracy": 0.7, "balanced_accuracy": 0.66, "images": 31},
                "bccd": {"accuracy": 0.6, "balanced_accuracy": 0.56, "images": 29},
            }
        },
        "peak_memory_bytes": 2.1e9,
        "seconds": 412.0,
        "notes": [],
    }


def make_set(site: str, classes: tuple[str, ...] = CLASSES, per_class: int = 2) -> SyntheticSet:
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    images = torch.randn(len(labels), 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(
        images=images,
        labels=one_hot(labels, len(classes)),
        site=torch.zeros(len(labels), dtype=torch.int64),
        sites=(site,),
        class_names=classes,
        mean=0.5,
        std=0.25,
        modality="generic",
        step_size=(0.02,),
        manifest={},
    )


def render(summary: dict[str, Any]) -> str:
    names = [site["name"] for site in summary["sites"] if site["status"] == "ok"]
    curves = {name: [(i, 1.2 - i / (600 + 90 * k)) for i in range(0, 500, 5)] for k, name in enumerate(names)}
    return render_report(summary, {name: make_set(name) for name in names}, curves)


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


def test_sheets_are_embedded_with_a_description() -> None:
    found = parse(render(make_summary()))
    assert len(found.images) == 3
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
    titles = [METRICS[name] for name in figures]
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
