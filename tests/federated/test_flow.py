"""The whole server flow with the real client app, over an in-process grid."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill import cli
from fedistill.commands.audit import largest
from fedistill.config import Config, make_config
from fedistill.deploy import admitted_file
from fedistill.errors import FedistillError
from fedistill.events import read_events
from fedistill.files import read_json, write_json
from fedistill.simulation import check
from fedistill.synthetic.store import load_set
from server import collect, stages
from server.stages import _below

TINY = Config(
    partition="iid", sites=3, phantom_images=90, phantom_classes=2, phantom_size=16, width=8, depth=2, experts=1,
    expert_steps=60, ipc=1, segment=2, iterations=4, syn_steps=2, eval_nets=1, eval_steps=5, eval_models="mlp",
    slice_seconds=0.5, deadline=60.0,
).resolved()  # fmt: skip
NODES: list[dict[str, Any]] = [{"partition-id": i} for i in range(3)]


def run(
    out: Path,
    break_with: Callable[[str, int, int], float | None] = lambda kind, node, before: None,
    nodes: list[dict[str, Any]] = NODES,
    **changes: Any,
) -> LocalGrid:
    grid = LocalGrid(client_app, nodes, break_with)
    config = dataclasses.replace(TINY, out=str(out), **changes)
    serve(grid, config)
    return grid


def events(out: Path, **fields: Any) -> list[Any]:
    found, _ = read_events(out / "events.jsonl")
    return [e for e in found if all(getattr(e, k) == v for k, v in fields.items())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out)
    return out


def test_happy_path_leaves_everything_in_the_run_folder(finished: Path) -> None:
    seed = finished / "seed-0"
    merged = load_set(seed / "merged")
    assert merged.sites == ("site-1", "site-2", "site-3")
    assert len(merged) == 6
    sites = read_json(seed / "sites.json")
    assert {s["status"] for s in sites.values()} == {"ok"}
    assert all(s["upload_bytes"] > 0 and s["iterations"] == 4 and s["synthetic_images"] == 2 for s in sites.values())
    counts = read_json(seed / "federated.json")["site-2"]["mlp"]
    assert sum(map(sum, counts)) > 0
    assert set(read_json(seed / "arms.json")["mlp"]) == {"distilled", "random_real", "local_only", "centralised"}
    assert read_json(finished / "summary.json")["sites"][0]["name"] == "site-1"
    assert (finished / "report.html").exists()
    summary = read_json(finished / "summary.json")
    assert sum(b["count"] for b in summary["calibration"]["bins"]) == summary["data"]["test"]


def story(out: Path) -> list[tuple[str, str]]:
    """What is said of a site, but for its progress."""
    return [(e.phase, e.status) for e in events(out, site="site-1") if e.status != "progress"]


def test_events_tell_the_story_of_a_site(finished: Path) -> None:
    assert story(finished) == [("describe", "done"), ("distill", "start"), ("distill", "done"), ("collect", "done")]
    own = [(e.phase, e.status) for e in events(finished, site="") if e.status == "done"]
    assert own == [("describe", "done"), ("collect", "done"), ("evaluate", "done"), ("report", "done")]


def test_merged_set_is_what_the_sites_released(finished: Path) -> None:
    merged = load_set(finished / "seed-0" / "merged")
    for site in merged.sites:
        own = load_set(finished / "seed-0" / "round-1" / f"site-{site}")
        assert torch.equal(merged.images[merged.of_site(site)], own.images)


def test_finished_seed_asks_nothing_and_new_seeds_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert run(out).sent == []
    assert run(out, seeds=2).count("query.describe") == 3
    assert (out / "seed-1" / "federated.json").exists()


def test_resume_asks_only_for_what_is_missing(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("merged", "round-1/site-site-2"):
        shutil.rmtree(out / "seed-0" / name)
    (out / "seed-0" / "federated.json").unlink()
    grid = run(out, work=str(out / "work"))
    assert [grid.count("train.distill", i) for i in range(3)] == [0, 1, 0]
    assert len(load_set(out / "seed-0" / "merged").sites) == 3


def test_other_settings_are_refused(finished: Path) -> None:
    with pytest.raises(FedistillError, match="ipc was 1 and is now 2"):
        run(finished, ipc=2)


def test_a_failing_site_is_left_out_and_its_reason_is_safe(tmp_path: Path) -> None:
    grid = run(tmp_path / "run", lambda kind, node, before: 2 if kind == "train.distill" and node == 1 else None)
    assert load_set(tmp_path / "run/seed-0/merged").sites == ("site-1", "site-3")
    failed = read_json(tmp_path / "run/seed-0/sites.json")["site-2"]
    assert (failed["status"], failed["reason"]) == ("failed", collect.BROKEN[2])
    assert "4711" not in "".join(p.read_text() for p in (tmp_path / "run").glob("*.json*"))
    assert grid.count("train.distill", 1) == 1


def test_below_quorum_is_an_error_that_names_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match=r"2 sites finished and 3 are needed\. site-2: its client app") as caught:
        run(tmp_path / "run", lambda kind, node, before: 2 if (kind, node) == ("train.distill", 1) else None, quorum=3)
    assert caught.value.code == "quorum"
    assert read_json(tmp_path / "run/error.json") == {"code": "quorum", "sentence": caught.value.sentence}
    assert events(tmp_path / "run", site="", phase="collect", status="failed")[0].message == caught.value.sentence


def test_a_quorum_of_more_sites_than_there_are(tmp_path: Path) -> None:
    for sites in (3, 0):  # 0: as many as there are
        with pytest.raises(
            FedistillError, match=r"^quorum=4 is more than the 3 sites that take part: it can never be met\.$"
        ):
            check(dataclasses.replace(TINY, quorum=4, sites=sites))
    with pytest.raises(FedistillError, match=r"^3 sites finished and 4 are needed\.$"):
        run(tmp_path / "run", quorum=4, sites=0)
    assert _below(9, 2, [("south", "")]).sentence == "2 sites finished and 9 are needed."


def test_a_crashed_site_is_asked_again(tmp_path: Path) -> None:
    grid = run(
        tmp_path / "run", lambda kind, node, before: 5 if (kind, node, before) == ("train.distill", 1, 0) else None
    )
    assert len(load_set(tmp_path / "run/seed-0/merged").sites) == 3
    assert grid.count("train.distill", 1) >= 2
    assert events(tmp_path / "run", site="site-2", status="note")[0].message == "it is not connected; asking again"


def test_a_site_that_keeps_crashing_fails(tmp_path: Path) -> None:
    run(tmp_path / "run", lambda kind, node, before: 8 if (kind, node) == ("train.distill", 1) else None)
    assert read_json(tmp_path / "run/seed-0/sites.json")["site-2"]["reason"] == "its client process died (3 times)"


@pytest.mark.parametrize(("away", "asked"), [(True, 0), (False, 1)])
def test_a_site_that_was_silent_is_asked_again_where_it_is_connected(tmp_path: Path, away: bool, asked: int) -> None:
    """Each time that it is not there would cost minutes."""

    def dies(kind: str, node: int, before: int) -> float | None:
        if (kind, node) != ("train.distill", 1):
            return None
        grid.gone |= {node} if away else set()
        return 8

    grid = LocalGrid(client_app, NODES, dies)
    serve(grid, dataclasses.replace(TINY, out=str(tmp_path / "run")))
    assert [grid.count("evaluate.models", node) for node in range(3)] == [1, asked, 1]
    told = "it is not connected, and did not answer before"
    assert bool(events(tmp_path / "run", site="site-2", message=told)) == away


def test_a_late_site_is_left_out(tmp_path: Path) -> None:
    def slow(kind: str, node: int, before: int) -> float | None:
        return 0.99 if (kind, node) == ("train.distill", 2) else None

    run(tmp_path / "warm")  # experts and sets are ready: only the slow site takes time
    run(tmp_path / "run", slow, work=str(tmp_path / "warm/work"), deadline=0.8)
    late = read_json(tmp_path / "run/seed-0/sites.json")["site-3"]
    assert (late["status"], late["reason"]) == ("late", "no answer within 1 s")
    assert load_set(tmp_path / "run/seed-0/merged").sites == ("site-1", "site-2")


def test_later_rounds_build_on_the_merged_set(tmp_path: Path) -> None:
    run(tmp_path / "run", rounds=2, method="ptm")
    first, seed = story(tmp_path / "run")[:4], tmp_path / "run/seed-0"
    assert first == [("describe", "done"), ("experts", "start"), ("experts", "done"), ("distill", "start")]
    assert sorted(p.name for p in (seed / "round-2").iterdir()) == [f"site-site-{i}" for i in (1, 2, 3)]
    assert read_json(seed / "sites.json")["site-1"]["iterations"] == 8


def deployed(tmp_path: Path, names: list[str]) -> list[dict[str, Any]]:
    return [real_site(n, tmp_path / f"disk-{i}") for i, n in enumerate(names)]


def test_a_server_without_data_lets_the_sites_choose_and_judge(tmp_path: Path) -> None:
    nodes = deployed(tmp_path, ["north", "south"])
    grid = run(tmp_path / "run", nodes=nodes, sites=2, server_data="none")
    assert grid.count("evaluate.models", 0) == 2  # validation counts to choose, then test counts
    summary = read_json(tmp_path / "run/summary.json")
    assert list(summary["arms"]) == ["distilled"]
    counted = sum(sum(map(sum, a["mlp"])) for a in read_json(tmp_path / "run/seed-0/federated.json").values())
    pooled = summary["federated"]["distilled"]
    mean = sum(pooled[s]["accuracy"] * pooled[s]["images"] for s in ("north", "south")) / counted
    assert summary["arms"]["distilled"]["accuracy"]["mean"] == pytest.approx(mean)


def test_deployed_sites_keep_their_work_on_their_own_disks(tmp_path: Path) -> None:
    run(tmp_path / "run", nodes=deployed(tmp_path, ["north", "south"]), sites=2, server_data="none")
    assert load_set(tmp_path / "run/seed-0/merged").sites == ("north", "south")
    assert list((tmp_path / "disk-0").rglob("facts-*.json"))
    assert not (tmp_path / "run/work").exists()


@pytest.mark.parametrize("settings", [{"method": "random"}, {"method": "herding"}, {"init": "real"}])
def test_a_real_site_sends_no_real_image_whatever_the_server_says(settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="would send real images: no site does that"):
        run(tmp_path / "run", nodes=deployed(tmp_path, ["north", "south"]), sites=2, server_data="none", **settings)
    assert not list((tmp_path / "run").rglob("set.safetensors"))


def test_a_site_may_have_any_name(tmp_path: Path) -> None:
    run(tmp_path / "run", nodes=deployed(tmp_path, ["..", "St. Mary's / east"]), sites=2, server_data="none")
    assert load_set(tmp_path / "run/seed-0/merged").sites == ("..", "St. Mary's / east")
    assert (tmp_path / "run/seed-0/sites.json").exists()


def test_a_server_without_data_must_know_how_many_sites_there_are(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="sites=0: say how many"):
        run(tmp_path / "run", nodes=deployed(tmp_path, ["north"]), sites=0, server_data="none")


def test_changed_data_are_noticed_when_a_run_goes_on(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "seed-0" / "federated.json").unlink()
    told = read_json(out / "seed-0" / "sites.json")
    told["site-2"]["fingerprint"] = "of other images"
    write_json(out / "seed-0" / "sites.json", told)
    with pytest.raises(FedistillError, match="data of site 'site-2' have changed"):
        run(out)


def test_an_error_about_files_stays_at_a_real_site(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\nMueller_Anna_1957.png,a\n")
    nodes = deployed(tmp_path, ["north", "south", "east"])
    nodes[0] = real_site("north", tmp_path / "disk-0", str(tmp_path / "m.csv"))
    run(tmp_path / "run", nodes=nodes, sites=3, server_data="none")
    everything = "".join(p.read_text() for p in (tmp_path / "run").rglob("*.json*"))
    assert "Mueller" not in everything
    assert "Mueller" in (tmp_path / "disk-0" / "errors.log").read_text()


def test_two_sites_with_one_name(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="Two sites say that they are 'north'"):
        run(tmp_path / "run", nodes=deployed(tmp_path, ["north", "north"]), sites=2, server_data="none")


def test_strangers_in_a_simulation(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="site-1, site-2, but the SuperNodes are north, site-2"):
        run(tmp_path / "run", nodes=deployed(tmp_path, ["north", "site-2"]), sites=2)


def test_wrong_number_of_supernodes(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="3 sites, the federation 4 SuperNodes"):
        run(tmp_path / "run", nodes=[{"partition-id": i} for i in range(4)])
    with pytest.raises(FedistillError, match="1 of 3 sites connected"):
        run(tmp_path / "run2", nodes=NODES[:1])


def test_unexpected_errors_stay_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("patient 4711")

    monkeypatch.setattr("client.app.advance", broken)
    with pytest.raises(FedistillError, match=r"see errors\.log in the work folder of the site"):
        run(tmp_path / "run")
    assert "patient 4711" in (tmp_path / "run/work/errors.log").read_text()
    (tmp_path / "run/work/errors.log").unlink()
    assert all(b"4711" not in p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_sites_that_differ_are_named() -> None:
    about = {
        "class_names": ["a", "b"],
        "kind": "multiclass",
        "geometry": [1, 8, 8],
        "modality": "xray",
        "counts": [1, 0],
    }
    with pytest.raises(FedistillError, match="Site 'west' differs in modality: ct and not xray"):
        stages.agree({"north": about, "south": about, "west": about | {"modality": "ct"}})
    with pytest.raises(FedistillError, match="Site 'west' differs in kind: ordinal and not multiclass"):
        stages.agree({"north": about, "south": about, "west": about | {"kind": "ordinal"}})
    with pytest.raises(FedistillError, match="No site has a training image of class b"):
        stages.agree({"north": about})
    assert stages.agree({"n": about, "s": about | {"counts": [0, 1]}}).geometry == (1, 8, 8)


def test_events_are_json_lines(finished: Path) -> None:
    for line in (finished / "events.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {
            "t", "seed", "site", "phase", "status", "step", "total", "loss", "eta", "message",
        }  # fmt: skip


def test_too_small_a_site_is_not_audited() -> None:
    with pytest.raises(FedistillError, match=r"has 30 training images, too few to audit: it takes 32\."):
        largest(TINY)
    site, canaries = largest(dataclasses.replace(TINY, phantom_images=120, partition="quantity", alpha=0.5))
    assert canaries == len(site.train) // 4 > 10


def test_an_attack_is_in_the_summary_and_the_report(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = read_json(out / "summary.json")
    assert before["audit"] is None
    config = make_config(before["config"] | {"out": str(out)})
    found = {
        "site": "site-2", "canaries": 16, "shadows": 8, "claimed_epsilon": 1.0, "epsilon_lower": 1.5, "ceiling": 2.0,
        "confidence": 0.95, "delta": 1e-3, "contradicts": True, "power": True,
        "copies": {"images": 2, "exact": 0, "red_flag": True},
    }  # fmt: skip

    def attack(config: Config, site: Any, folder: Path, **more: Any) -> Any:
        write_json(folder / "audit.json", found)
        return found

    monkeypatch.setattr(cli, "attack", attack)
    monkeypatch.setattr(cli, "show", lambda result, folder: None)
    site = next(iter(check(config)))
    summary = cli._attacked(config, site, 16)
    assert summary | {"audit": None} == before | {key: summary[key] for key in ("config", "command", "seconds")}
    assert (summary["audit"]["site"], summary["audit"]["contradicts"], summary["audit"]["exact"]) == ("site-2", True, 0)
    for file in ("report.html", "results.md"):
        assert "The claim of epsilon=1 is contradicted: do not release." in (out / file).read_text()


def test_a_site_cannot_answer_under_the_name_of_another(tmp_path: Path) -> None:
    """Where `fedistill server run` wrote down under which name each key was admitted."""
    out = tmp_path / "run"
    write_json(admitted_file(out), {"100": "north", "101": "east"})
    nodes = [real_site(name, tmp_path / name) for name in ("north", "south")]
    run(out, nodes=nodes, sites=2, quorum=1, server_data="none")
    assert load_set(out / "seed-0/merged").sites == ("north",)
    assert "its key was admitted as 'east'" in " ".join(e.message for e in events(out, phase="describe"))


def test_only_the_sites_that_a_job_names_are_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    write_json(admitted_file(out), {"100": "north", "102": "west"})
    nodes = [real_site(name, tmp_path / name) for name in ("north", "south", "west")]
    grid = run(out, nodes=nodes, sites=2, server_data="none")
    assert load_set(out / "seed-0/merged").sites == ("north", "west")
    assert not any(node == 1 for _, node in grid.sent)


def test_a_site_that_answers_at_once_and_never_is_ready_is_asked_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "MANY_QUICK", 3)
    monkeypatch.setattr(collect, "QUICK", 0.5)
    told = {
        "phase": "distill",
        "step": 1,
        "total": 9,
        "iterations": 1,
        "skipped": 0,
        "seconds": {},
        "notes": [],
        "curve": [],
    }

    def client(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.distill" and context.node_id == 101:
            return Message(RecordDict({"reply": ConfigRecord({"json": json.dumps(told)})}), reply_to=message)
        return client_app(message, context)

    grid = LocalGrid(client, NODES)
    deadline = 12.0  # in which the other site has to finish, on a busy machine too
    serve(grid, dataclasses.replace(TINY, out=str(tmp_path / "run"), deadline=deadline, quorum=1))
    assert 4 <= grid.count("train.distill", 1) <= 3 + deadline / 0.5 + 2
