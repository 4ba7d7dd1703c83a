"""privacy=dp in a federation: what the messages carry, what is paid for, and what a site refuses."""

from __future__ import annotations

import dataclasses
import json
import stat
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from localgrid import LocalGrid, real_site, serve
from PIL import Image
from rich.console import Console

from client.app import app as client_app
from fedistill.config import Config, make_config
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.events import read_events
from fedistill.files import read_json
from fedistill.matching.problem import Bundle
from fedistill.privacy.ledger import Ledger
from fedistill.release.claim import check_promise
from fedistill.simulation import simulate
from fedistill.site import gate
from fedistill.site.describe import describe_privately, keyed_fingerprint, task_of
from fedistill.site.policy import read_policy
from fedistill.synthetic.store import load_set
from server import app as server_app
from server import stages
from server.replies import read_description

SITES = 2
BASE = {
    "partition": "iid", "sites": SITES, "phantom_images": 60, "phantom_classes": 2, "phantom_size": 16, "width": 4, "depth": 2,
    "ipc": 2, "method": "sketch", "sketch_networks": 2, "sketch_frequencies": 8, "sketch_augmentations": 1, "iterations": 3,
    "eval_nets": 1, "eval_steps": 4, "eval_batch": 8, "eval_models": "mlp", "slice_seconds": 60.0, "deadline": 60.0,
    "privacy": "dp", "epsilon": 20.0,
}  # fmt: skip


def tiny(**more: Any) -> Config:
    return make_config(BASE | more).resolved()


class Recorder(LocalGrid):
    """Keeps every reply as the JSON and the array names that crossed the wire."""

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []
        super().__init__(self._listen, nodes)

    def _listen(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        plain = {name: dict(record) for name, record in reply.content.config_records.items()}
        self.said.append((message.metadata.message_type, plain))
        return reply

    def answers(self, kind: str) -> list[Any]:
        return [json.loads(said["reply"]["json"]) for k, said in self.said if k == kind and "reply" in said]

    def errors(self, kind: str) -> list[tuple[str, str]]:
        return [
            (said["error"]["code"], said["error"]["sentence"]) for k, said in self.said if k == kind and "error" in said
        ]


def run(config: Config, nodes: list[dict[str, Any]]) -> Recorder:
    grid = Recorder(nodes)
    try:
        serve(grid, config)
    except FedistillError as error:
        grid.failed = error  # type: ignore[attr-defined]
    return grid


def simulated() -> list[dict[str, Any]]:
    return [{"partition-id": i} for i in range(SITES)]


def deployed(tmp_path: Path, data: str = "phantom", **tables: dict[str, Any]) -> list[dict[str, Any]]:
    return [real_site(n, tmp_path / n, data, **tables) for n in ("north", "south")]


def capped(epsilon: float = 100.0, delta: float = 0.01, **more: Any) -> dict[str, Any]:
    return {"required": True, "lifetime_epsilon": epsilon, "lifetime_delta": delta} | more


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A simulation that buys no answers."""
    out = tmp_path_factory.mktemp("private") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "WAIT_SIMULATED", 0.5)
        return out, run(tiny(out=str(out)), simulated())


def test_no_count_and_no_fingerprint_crosses_the_wire(finished: tuple[Path, Recorder]) -> None:
    out, grid = finished
    told = {about["site"]: about for about in grid.answers("query.describe")}
    assert [about["counts"] for about in told.values()] == [None, None]
    assert {about["train"] for about in told.values()} == {30}
    data, parts = server_app.divided(dataclasses.replace(tiny(out=str(out)), out="", work=str(out / "work")))
    everything = json.dumps(grid.said) + "".join(p.read_text() for p in out.glob("seed-0/**/*.json"))
    for place, name in enumerate(parts.names):
        assert told[name]["fingerprint"] != parts.at(data, place).fingerprint
        assert parts.at(data, place).fingerprint not in everything
    assert not grid.count("evaluate.models")


def test_notes_speak_of_noisy_counts_only() -> None:
    data = load_data(tiny())
    told = Bundle(task_of(data), (), (3, 0), noisy=True).notes(tiny(ipc=10))
    assert told == (
        f"class {data.class_names[0]}: a noisy count of 3, so 3 synthetic instead of 10",
        f"class {data.class_names[1]}: no more images than noise, so no synthetic instead of 10",
    )
    assert Bundle(task_of(data), (), (3, 4), noisy=True).notes(tiny(ipc=2)) == ()


def test_the_report_says_what_is_promised(finished: tuple[Path, Recorder]) -> None:
    out, _ = finished
    summary = read_json(out / "summary.json")
    union = summary["privacy"]
    assert 0 < union["epsilon"] <= 20
    assert union["epsilon"] == max(site["privacy"]["epsilon"] for site in summary["sites"])
    assert (union["delta"], union["unit"], union["answers_epsilon"]) == (0.01, "image", None)
    assert summary["sites"][0]["privacy"]["mechanisms"][0].startswith("sketch: 1 sum over all records, noise ")
    assert [site["images"] for site in summary["sites"]] == [None, None]
    assert "eval_epsilon=0 buys none" in " ".join(summary["notes"])
    assert "budgets of a patient at several sites add up" in (out / "results.md").read_text()
    page = (out / "report.html").read_text()
    assert "No formal privacy guarantee" not in page
    assert "Differential privacy." in page
    assert "images per class" not in page


def test_a_finished_run_is_found_again_and_changed_data_are_noticed(finished: tuple[Path, Recorder]) -> None:
    out, _ = finished
    config = tiny(out=str(out))
    assert simulate(config, Console(file=StringIO()))["privacy"]
    secret = next((out / "work").glob("site-*/secret"))
    before = secret.read_bytes()
    secret.write_bytes(b"another")
    with pytest.raises(FedistillError, match="secrets in the work folder"):
        simulate(config, Console(file=StringIO()))
    secret.write_bytes(before)


EXPERTS = {"method": "ptm", "experts": 1, "expert_steps": 40, "segment": 2, "syn_steps": 2, "skip_above": 1000.0}


@pytest.mark.parametrize(
    "more", [{"task": "multilabel", "ipc": 3}, {"task": "ordinal"}, EXPERTS, EXPERTS | {"task": "multilabel"}]
)
def test_every_kind_of_task_and_of_private_work(more: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    grid = run(tiny(out=str(out), eval_epsilon=5.0, server_data="none", **more), deployed(tmp_path))
    assert [about["counts"] for about in grid.answers("query.describe")] == [None, None]
    assert load_set(out / "seed-0/merged").sites == ("north", "south")
    summary = read_json(out / "summary.json")
    assert 0 < summary["privacy"]["epsilon"] <= 20
    assert summary["arms"]["distilled"]["accuracy"]["mean"] is not None
    mechanisms = Ledger(tmp_path / "north/site-north/ledger.db", create=False).entries()[0].mechanisms
    assert [m.name for m in mechanisms] == (["counts", "dp-sgd"] if "method" in more else ["sketch"])


def test_patients_are_protected_where_they_are_named(tmp_path: Path) -> None:
    rng, lines = np.random.default_rng(0), ["path,label,split,patient"]
    for i in range(96):
        split = ("train", "val", "test")[i % 3]
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i // 3 % 2]},{split},{split}-{i // 6}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    nodes = deployed(tmp_path, str(tmp_path / "m.csv"))
    grid = run(tiny(out=str(tmp_path / "run"), eval_epsilon=5.0, server_data="none", unit="patient"), nodes)
    assert [about["train"] for about in grid.answers("query.describe")] == [16, 16]  # of 32 images
    entries = Ledger(tmp_path / "north/site-north/ledger.db", create=False).entries()
    assert {e.unit for e in entries} == {"patient"}
    summary = read_json(tmp_path / "run/summary.json")
    assert (summary["privacy"]["unit"], summary["data"]["train"]) == ("patient", 32)
    assert "32 training patients" in (tmp_path / "run/report.html").read_text()


def test_answers_are_paid_for_once(tmp_path: Path) -> None:
    config = tiny(out=str(tmp_path / "run"), eval_epsilon=5.0)
    first = run(config, simulated())
    ledger = Ledger(tmp_path / "run/work/site-site-1/ledger.db", create=False)
    paid = [(e.data, e.what, e.unit) for e in ledger.entries()]
    assert paid == [("site-1", "sketch", "image"), ("site-1/test", "answers", "image")]
    (tmp_path / "run/seed-0/federated.json").unlink()
    again = run(config, simulated())
    assert sorted(map(str, first.answers("evaluate.models"))) == sorted(map(str, again.answers("evaluate.models")))
    assert len(ledger.entries()) == 2
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["privacy"]["answers_epsilon"] == 5.0
    assert set(summary["federated"]["distilled"]) == {"site-1", "site-2"}


def test_the_same_work_among_other_sites_costs_nothing(tmp_path: Path) -> None:
    nodes = deployed(tmp_path)
    run(tiny(out=str(tmp_path / "one"), server_data="none"), nodes)
    other = {"sites": 1, "partition": "dirichlet", "alpha": 0.9, "data": "pneumoniamnist", "phantom_depth": 0}
    run(tiny(out=str(tmp_path / "two"), server_data="none", **other), nodes[:1])
    assert [e.what for e in Ledger(tmp_path / "north/site-north/ledger.db", create=False).entries()] == ["sketch"]
    made = [load_set(tmp_path / out / "seed-0/round-1/site-north") for out in ("one", "two")]
    assert np.array_equal(made[0].images, made[1].images)
    run(tiny(out=str(tmp_path / "three"), server_data="none", sites=1, seed=1), nodes[:1])  # this does say what is done
    assert len(Ledger(tmp_path / "north/site-north/ledger.db", create=False).entries()) == 2


def test_a_server_without_data_buys_what_it_elects_with(tmp_path: Path) -> None:
    run(tiny(out=str(tmp_path / "run"), eval_epsilon=5.0, server_data="none"), deployed(tmp_path))
    ledger = Ledger(tmp_path / "north/site-north/ledger.db", create=False)
    assert [e.data for e in ledger.entries()] == ["north", "north/val", "north/test"]
    by_name = {e.data: e.mechanisms[0] for e in ledger.entries()}
    assert by_name["north/val"].clip_norm == pytest.approx(5**0.5)  # five learning rates
    assert by_name["north/test"].clip_norm == 1
    assert read_json(tmp_path / "run/seed-0/elected.json")["by_answers"]


def test_a_server_that_buys_nothing_takes_a_middle_rate_and_says_so(tmp_path: Path) -> None:
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), deployed(tmp_path))
    assert not grid.count("evaluate.models")
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["arms"]["distilled"]["learning_rate"] == [0.01]
    assert summary["arms"]["distilled"]["accuracy"]["mean"] is None
    assert "the learning rate of the global models is 0.01" in " ".join(summary["notes"])
    assert (tmp_path / "run/seed-0/model-mlp.safetensors").exists()
    assert (tmp_path / "run/report.html").exists()


def test_a_cap_that_is_passed_reaches_the_server_as_a_code_and_a_sentence(tmp_path: Path) -> None:
    nodes = deployed(tmp_path, privacy=capped(10, 1e-4))
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), nodes)
    assert {code for code, _ in grid.errors("train.distill")} == {"over-budget"}
    assert all("over the lifetime cap of 10" in sentence for _, sentence in grid.errors("train.distill"))
    assert not list(tmp_path.rglob("private-sketch*"))
    assert "over the lifetime cap of 10" in read_json(tmp_path / "run/error.json")["sentence"]


def test_the_cap_holds_for_answers_too(tmp_path: Path) -> None:
    nodes = deployed(tmp_path, privacy=capped(25, 0.001))
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none", epsilon=5.0, eval_epsilon=24.0), nodes)
    assert {code for code, _ in grid.errors("evaluate.models")} == {"over-budget"}
    assert read_json(tmp_path / "run/seed-0/federated.json") == {}
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["arms"]["distilled"]["learning_rate"] == [0.01]


@pytest.mark.parametrize(
    ("rules", "changes", "why"),
    [
        (capped(), {"privacy": "none", "epsilon": 0.0}, "privacy=dp only"),
        (capped(max_epsilon=3.0), {}, "epsilon=20 is more than this site gives to one job: 3"),
        (capped(max_epsilon=30.0), {"eval_epsilon": 40.0}, "eval_epsilon=40 is more"),
        (capped(unit="patient"), {}, "unit=image is not enough for this site: it takes part with unit=patient"),
    ],
)
def test_a_site_refuses_what_it_does_not_allow_before_it_says_anything(
    rules: dict[str, Any], changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none", **changes), deployed(tmp_path, privacy=rules))
    refused = grid.errors("query.describe")
    assert {code for code, _ in refused} == {"policy"}
    assert all(why in sentence for _, sentence in refused)
    assert grid.answers("query.describe") == []


def test_a_policy_that_is_not_understood_stops_everything_and_is_not_described(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = deployed(tmp_path, privacy=capped(max_epsilons=3.0))
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), nodes)
    assert {code for code, _ in grid.errors("query.describe")} == {"site-config"}
    assert "max_epsilon" not in json.dumps(grid.said)
    assert "did you mean 'max_epsilon'?" in caplog.text


@pytest.mark.parametrize("node", [{}, {"site-config": "site.toml"}, {"site": "north"}])
def test_a_node_needs_a_policy(node: dict[str, Any], tmp_path: Path) -> None:
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), [node, node])
    assert {code for code, _ in grid.errors("query.describe")} == {"node-config"}


def test_training_images_are_no_test_images(tmp_path: Path) -> None:
    """Their account is another one: answers on them would be booked on the wrong people."""
    config = tiny(eval_epsilon=5.0, server_data="none")
    job = RecordDict({"job": ConfigRecord({"config": json.dumps(config.to_dict()), "split": "train"})})
    node = deployed(tmp_path)[0]
    Recorder([node])  # which sets up Flower's identity
    message = Message(job, 100, "evaluate.models")
    context = Context(run_id=1, node_id=100, node_config=node, state=RecordDict(), run_config={})
    reply = client_app(message, context).content.config_records["error"]
    assert reply["code"] == "bad-job"
    assert not (tmp_path / "north").exists()


def test_a_broken_ledger_is_not_described_to_the_server(tmp_path: Path) -> None:
    (tmp_path / "north/site-north").mkdir(parents=True)
    (tmp_path / "north/site-north/ledger.db").write_text("nonsense")
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), deployed(tmp_path))
    assert (
        "broken-ledger",
        "A file of this site's own cannot be used: errors.log there, or its SuperNode's output, says why.",
    ) in grid.errors("train.distill")
    assert str(tmp_path) not in json.dumps(grid.said)
    assert "ledger.db" in (tmp_path / "north/errors.log").read_text()


def test_what_is_wrong_with_private_data_is_private(tmp_path: Path) -> None:
    nodes = deployed(tmp_path)
    (tmp_path / "m.csv").write_text("path,label\nMueller_Anna_1957.png,a\n")
    nodes[0] = real_site("north", tmp_path / "north", str(tmp_path / "m.csv"))
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), nodes)
    assert grid.errors("query.describe") == [
        ("bad-data", "The data of site 'north' cannot be used: errors.log there says why.")
    ]


def test_a_log_that_cannot_be_written_sends_nothing_either(tmp_path: Path) -> None:
    nodes = deployed(tmp_path)
    nodes[0] = real_site("north", tmp_path / "north", str(tmp_path / "nowhere.csv"))
    (tmp_path / "north").write_text("a file where the folder should be")
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none"), nodes)
    assert grid.errors("query.describe") == [
        ("bad-data", "The data of site 'north' cannot be used: errors.log there says why.")
    ]


def test_patients_must_be_named_before_work_starts(tmp_path: Path) -> None:
    grid = run(tiny(out=str(tmp_path / "run"), unit="patient"), simulated())
    assert {code for code, _ in grid.errors("query.describe")} == {"no-patients"}
    with pytest.raises(FedistillError, match="manifest with a patient column"):
        simulate(tiny(out=str(tmp_path / "other"), unit="patient"), Console(file=StringIO()))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"method": "cf"}, "not-private"),
        ({"epsilon": 0.0}, "no-budget"),
        ({"init": "real"}, "not-private"),
        ({"delta": 0.5}, "large-delta"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(changes: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(FedistillError) as caught:
        simulate(tiny(out=str(tmp_path / "run"), **changes), Console(file=StringIO()))
    assert caught.value.code == code
    assert not (tmp_path / "run").exists()
    grid = run(tiny(out=str(tmp_path / "flower"), **changes), simulated())
    assert not grid.count("train.distill")
    assert not list((tmp_path / "flower").rglob("ledger.db"))


def test_the_secret_is_the_sites_own(tmp_path: Path) -> None:
    data = load_data(tiny())
    word = keyed_fingerprint(data, tmp_path / "a")
    assert word == keyed_fingerprint(data, tmp_path / "a") != keyed_fingerprint(data, tmp_path / "b")
    secret = tmp_path / "a" / "secret"
    assert (len(secret.read_bytes()), stat.S_IMODE(secret.stat().st_mode)) == (32, 0o600)
    assert keyed_fingerprint(load_data(tiny(seed=1)), tmp_path / "a") != word


def test_a_description_with_counts_is_refused_where_they_are_private(tmp_path: Path) -> None:
    about = describe_privately(load_data(tiny()), "north", tmp_path, 60)
    assert read_description(about, private=True)["counts"] is None
    with pytest.raises(FedistillError, match="tells private counts"):
        read_description(about | {"counts": [30, 30]}, private=True)
    with pytest.raises(FedistillError, match="not one count per class"):
        read_description(about)


def test_a_set_must_promise_what_was_asked_for(finished: tuple[Path, Recorder]) -> None:
    made = load_set(finished[0] / "seed-0/round-1/site-site-1")
    config = tiny()
    check_promise(made, config)
    about = made.manifest["site-1"]
    for change in ({"epsilon": None}, {"epsilon": 30.0}, {"unit": "patient"}):
        other = dataclasses.replace(made, manifest={"site-1": about | {"privacy": about["privacy"] | change}})
        with pytest.raises(FedistillError, match="was asked for") as caught:
            check_promise(other, config)
        assert caught.value.code == "refused-set"


@pytest.mark.flower
def test_real_private_run_on_the_ray_engine(tmp_path: Path) -> None:
    summary = simulate(tiny(out=str(tmp_path / "run"), eval_epsilon=5.0), Console(file=StringIO()))
    assert [site["status"] for site in summary["sites"]] == ["ok"] * SITES
    assert 0 < summary["privacy"]["epsilon"] <= 20
    for site in ("site-1", "site-2"):
        ledger = Ledger(tmp_path / f"run/work/site-{site}/ledger.db", create=False)
        assert [e.what for e in ledger.entries()] == ["sketch", "answers"]


def test_a_set_waits_for_a_person_and_the_server_for_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "POLL_SECONDS", 0.02)
    policies = [
        read_policy(Path(node["site-config"]))
        for node in deployed(tmp_path, privacy=capped(), release={"manual": True})
    ]
    nodes = [{"site-config": str(tmp_path / f"{n}.toml")} for n in ("north", "south")]
    done = threading.Event()

    def officers() -> None:
        north, south = policies
        while not done.wait(0.05):
            if [r for r in gate.requests(north) if r.decision is None] and gate.requests(south):
                time.sleep(0.5)  # the server asks again meanwhile
                gate.decide(north, gate.requests(north)[0].id, approved=True, reason="")
                gate.decide(south, gate.requests(south)[0].id, approved=False, reason="not this one")
                return

    thread = threading.Thread(target=officers)
    thread.start()
    out = tmp_path / "run"
    grid = run(tiny(out=str(out), server_data="none", quorum=1, slice_seconds=0.2), nodes)
    done.set()
    thread.join()
    assert load_set(out / "seed-0/merged").sites == ("north",)
    assert grid.errors("train.distill") == [("rejected", "This site does not let the set leave.")]
    events, _ = read_events(out / "events.jsonl")
    assert [e.message for e in events if e.phase == "release" and e.status == "progress"][:1] == [
        "waits for a person at the site"
    ]
    assert [(e.site, e.status) for e in events if e.phase == "release" and e.status == "done"] == [("north", "done")]
    assert "not this one" not in json.dumps(grid.said)
    left = [plain for kind, plain in grid.said if kind == "train.distill" and "text" in plain]
    assert len(left) == 1


def test_counts_of_answers_stay_where_the_policy_says_so(tmp_path: Path) -> None:
    nodes = deployed(tmp_path, release={"answers": False})
    grid = run(tiny(out=str(tmp_path / "run"), server_data="none", privacy="none", epsilon=0.0), nodes)
    assert {code for code, _ in grid.errors("evaluate.models")} == {"policy"}
    assert grid.answers("evaluate.models") == []


@pytest.mark.parametrize("more", [{"method": "cf"}, {"labels": "soft"}, {"method": "ptm", "budget": "proportional"}])
def test_work_that_is_not_private_costs_nothing(more: dict[str, Any], tmp_path: Path) -> None:
    """Whatever a server's message says: the site itself asks before it pays."""
    config = dataclasses.replace(tiny(server_data="none"), **more)
    about = {"config": json.dumps(config.to_dict()), "round": 1, "run": "r", "seconds": 5.0}
    node = deployed(tmp_path)[0]
    Recorder([node])  # which sets up Flower's identity
    message = Message(RecordDict({"job": ConfigRecord(about)}), 100, "train.distill")
    context = Context(run_id=1, node_id=100, node_config=node, state=RecordDict(), run_config={})
    reply = client_app(message, context).content.config_records["error"]
    assert reply["code"] in ("not-private", "not-for-method")
    assert not list(tmp_path.rglob("ledger.db"))
