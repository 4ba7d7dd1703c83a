"""The setting `merge` in the server's flow: what is found is written down, told and shown, and only "robust" leaves sets out."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from localgrid import LocalGrid, serve

from client.app import app as client_app
from fedistill.config import Config, make_config
from fedistill.events import read_events
from fedistill.files import read_json
from fedistill.synthetic.merge import merge
from fedistill.synthetic.store import load_set, save_set
from fedistill.wire import quantise

SITES = ("site-1", "site-2", "site-3", "site-4")


def tiny(out: Path, **more: object) -> Config:
    settings = {
        "partition": "iid", "sites": 4, "phantom_images": 120, "phantom_classes": 2, "phantom_size": 16, "width": 8, "depth": 2,
        "experts": 1, "expert_steps": 40, "ipc": 2, "segment": 2, "iterations": 3, "syn_steps": 2, "method": "mtt",
        "eval_nets": 1, "eval_steps": 5, "eval_models": "mlp", "slice_seconds": 60.0, "deadline": 60.0, "workers": 1,
    }  # fmt: skip
    return make_config(settings | {"out": str(out)} | more).resolved()


def run(config: Config, nodes: int = 4) -> None:
    serve(LocalGrid(client_app, [{"partition-id": i} for i in range(nodes)]), config)


def poisoned(finished: Path, out: Path, *sites: str) -> None:
    """A copy of a run whose sets have come, some of them copies of one image, and are not merged yet."""
    shutil.copytree(finished, out)
    seed = out / "seed-0"
    shutil.rmtree(seed / "merged")
    for name in ("federated.json", "arms.json", "suspects.json"):
        (seed / name).unlink()
    for site in sites:
        folder = seed / "round-1" / f"site-{site}"
        own = load_set(folder)
        save_set(quantise(dataclasses.replace(own, images=own.images[:1].expand_as(own.images))), folder)


def over_budget(out: Path, site: str) -> None:
    """Every image of a stored set is softly said to be of the first class."""
    folder = out / f"seed-0/round-1/site-{site}"
    own = load_set(folder)
    save_set(quantise(dataclasses.replace(own, labels=torch.tensor([[0.9, 0.1]]).repeat(len(own), 1))), folder)


def sets_of(out: Path) -> dict[str, torch.Tensor]:
    return {site: load_set(out / f"seed-0/round-1/site-{site}").images for site in SITES}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("all") / "run"
    run(tiny(out))
    return out


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("robust") / "run"
    run(tiny(out, merge="robust"))
    return out


def test_all_merges_every_set_as_it_came_and_tells_which_are_odd(everything: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    poisoned(everything, out, "site-2")
    run(tiny(out))
    merged = load_set(out / "seed-0/merged")
    whole = merge([load_set(out / f"seed-0/round-1/site-{site}") for site in SITES])
    assert torch.equal(merged.images, whole.images)
    assert torch.equal(merged.labels, whole.labels)
    assert (merged.sites, merged.step_size, merged.manifest) == (whole.sites, whole.step_size, whole.manifest)
    found = read_json(out / "seed-0/suspects.json")
    assert found["sites"]["site-2"]["reasons"] == ["repeats itself: 100% of its images have a near-copy"]
    assert found["sites"]["site-1"]["influence"] is None  # nothing is trained to find it
    assert not any(site["left_out"] for site in found["sites"].values())
    told = [e.message for e in read_events(out / "events.jsonl")[0] if e.site == "site-2" and e.status == "note"]
    assert told == ["suspect, but merged: its set repeats itself: 100% of its images have a near-copy"]
    summary = read_json(out / "summary.json")
    assert "The set of site site-2 is suspect and was merged all the same: it repeats itself" in summary["notes"][0]
    assert "suspect, merged all the same: it repeats itself" in (out / "report.html").read_text()


def test_honest_sites_leave_no_note(everything: Path) -> None:
    summary = read_json(everything / "summary.json")
    assert [site["suspicion"]["reasons"] for site in summary["sites"]] == [[]] * 4
    assert summary["notes"] == []
    assert (everything / "report.html").read_text().count("nothing odd") == 4


def test_robust_leaves_the_right_one_out(robust: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    poisoned(robust, out, "site-2")
    run(tiny(out, merge="robust"))
    merged, there = load_set(out / "seed-0/merged"), sets_of(out)
    assert "site-2" not in merged.sites
    for site in merged.sites:
        assert torch.equal(merged.images[merged.of_site(site)], there[site])
    found = read_json(out / "seed-0/suspects.json")["sites"]
    assert {site for site, one in found.items() if one["left_out"]} == set(SITES) - set(merged.sites)
    assert found["site-1"]["influence"]["balanced_accuracy"]["n"] == 3
    summary = read_json(out / "summary.json")
    assert summary["sites"][1]["suspicion"]["left_out_in"] == 1
    assert any("site-2 is suspect and was left out of the merged set" in note for note in summary["notes"])
    assert "left out of the merge: it repeats itself" in (out / "report.html").read_text()


def test_most_sites_are_never_left_out(robust: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    poisoned(robust, out, "site-1", "site-2")
    over_budget(out, "site-3")
    run(tiny(out, merge="robust"))
    assert load_set(out / "seed-0/merged").sites == SITES
    assert any("more than half: all are merged" in note for note in read_json(out / "summary.json")["notes"])
    own = [e.message for e in read_events(out / "events.jsonl")[0] if e.site == "" and e.status == "note"]
    assert any("more than half" in message for message in own)


def test_two_sites_are_not_judged_and_the_report_says_so(tmp_path: Path) -> None:
    run(tiny(tmp_path / "run", sites=2, merge="robust"), nodes=2)
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["notes"] == ["Merge: 2 sets are too few to say that one of them is odd: all are merged."]
    assert "not judged: too few sites" in (tmp_path / "run/report.html").read_text()
