"""Several rounds of distillation: every round is an arm, and with `patience` they stop where validation gets no better."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from localgrid import LocalGrid, real_site, serve

from client.app import app as client_app
from fedistill.config import Config
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.fit import Material, select_and_test
from fedistill.evaluation.metrics import merit
from fedistill.events import read_events
from fedistill.files import read_json
from fedistill.site.describe import task_of
from fedistill.site.gate import identity
from fedistill.synthetic.store import load_set
from server import stages

TINY = Config(
    partition="iid", sites=2, phantom_images=90, phantom_classes=2, phantom_size=16, width=8, depth=2, method="ptm", experts=1,
    expert_steps=40, expert_batch=16, segment=2, iterations=4, syn_steps=2, ipc=1, eval_nets=1, eval_steps=5, eval_models="mlp",
    deadline=60.0, rounds=3, skip_above=1000.0,
).resolved()  # fmt: skip


def run(
    out: Path,
    nodes: list[dict[str, Any]] | None = None,
    break_with: Callable[[str, int, int], float | None] = lambda kind, node, before: None,
    **changes: Any,
) -> LocalGrid:
    grid = LocalGrid(client_app, nodes or [{"partition-id": i} for i in range(2)], break_with)
    serve(grid, dataclasses.replace(TINY, out=str(out), **changes))
    return grid


def test_every_round_is_an_arm_with_the_bytes_up_to_then(tmp_path: Path) -> None:
    run(tmp_path / "run")
    arms = read_json(tmp_path / "run/seed-0/arms.json")["mlp"]
    one, two, all_ = (arms[name]["upload_bytes"] for name in ("distilled-1", "distilled-2", "distilled"))
    assert 1.9 < two / one < 2.1
    assert 2.9 < all_ / one < 3.1
    made = [
        identity(load_set(tmp_path / f"run/seed-0/{name}")) for name in ("merged-1", "merged-2", "merged-3", "merged")
    ]
    assert len(set(made)) == 3
    assert made[2] == made[3]
    assert "Distilled union, 1 round |" in (tmp_path / "run/results.md").read_text()


@pytest.mark.parametrize(
    ("worth", "done", "best"),
    [([0.5, 0.5, 0.6], 2, 1), ([0.5, 0.6, 0.4], 3, 2), ([0.1, 0.2, 0.3], 3, 3), ([None, 0.9, 0.1], 3, 3)],
)
def test_rounds_stop_where_validation_gets_no_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: list[float | None], done: int, best: int
) -> None:
    """Where a round has no answer, all are done, and the last counts."""
    found = [None if value is None else (value,) for value in worth]
    monkeypatch.setattr(stages, "_validated", lambda run, nodes, task, merged, val, round: found[round - 1])
    run(tmp_path / "run", patience=1)
    folder = tmp_path / "run/seed-0"
    assert [(folder / f"merged-{r}").exists() for r in (1, 2, 3)] == [r <= done for r in (1, 2, 3)]
    assert identity(load_set(folder / "merged")) == identity(load_set(folder / f"merged-{best}"))
    told = [e.message for e in read_events(tmp_path / "run/events.jsonl")[0] if "no more rounds" in e.message]
    stopped = f"no better on validation since round {best}: no more rounds"
    assert told == ([stopped] if done - best >= 1 else [])
    arms = read_json(folder / "arms.json")["mlp"]
    others = {f"distilled-{r}" for r in range(1, done + 1) if r != best}
    assert {name for name in arms if name.startswith("distilled")} == {"distilled", *others}
    assert arms["distilled"]["rounds"] == best
    assert arms["distilled"]["upload_bytes"] >= max(arms[name]["upload_bytes"] for name in others)  # all that was sent


def test_the_servers_validation_images_judge_a_round(tmp_path: Path) -> None:
    run(tmp_path / "run", patience=1, rounds=2)
    data = load_data(TINY)
    made = load_set(tmp_path / "run/seed-0/merged-1")
    found = select_and_test(TINY, task_of(data), "mlp", Material(made.images, made.labels), data.val, data.val)
    assert read_json(tmp_path / "run/seed-0/validated-1.json")["merit"] == list(merit(found.val_scores[0], data.kind))


def test_a_round_that_was_done_stays_as_it_was(tmp_path: Path) -> None:
    """A site that failed in it is not asked again after a stop: others went on from what was made without it."""

    def first_fails(kind: str, node: int, before: int) -> float | None:
        return 2 if (kind, node, before) == ("train.distill", 1, 0) else None

    out = tmp_path / "run"
    run(out, break_with=first_fails, rounds=2)
    assert load_set(out / "seed-0/merged-1").sites == ("site-1",)
    before = identity(load_set(out / "seed-0/merged-1"))
    for path in ("merged", "merged-2", "round-2"):
        shutil.rmtree(out / "seed-0" / path)
    (out / "seed-0/arms.json").unlink()
    (out / "seed-0/federated.json").unlink()
    run(out, rounds=2)
    assert identity(load_set(out / "seed-0/merged-1")) == before
    assert load_set(out / "seed-0/merged").sites == ("site-1", "site-2")


def test_where_no_site_validates_all_rounds_are_done(tmp_path: Path) -> None:
    nodes = [real_site(name, tmp_path / name) for name in ("north", "south")]
    silent = lambda kind, node, before: 2 if kind == "evaluate.models" else None  # noqa: E731
    run(tmp_path / "run", nodes, silent, server_data="none", patience=1)
    folder = tmp_path / "run/seed-0"
    assert identity(load_set(folder / "merged")) == identity(load_set(folder / "merged-3"))
    assert "no validation answers: all rounds" in (tmp_path / "run/events.jsonl").read_text()


def test_patience_means_nothing_where_there_is_one_round(tmp_path: Path) -> None:
    run(tmp_path / "run", patience=2, rounds=1)
    assert "distilled" in read_json(tmp_path / "run/seed-0/arms.json")["mlp"]


def test_without_data_at_the_server_the_sites_validate(tmp_path: Path) -> None:
    """Each site's counts are asked for after every round, and again at the end."""
    nodes = [real_site(name, tmp_path / name) for name in ("north", "south")]
    grid = run(tmp_path / "run", nodes, server_data="none", patience=3, rounds=2)
    assert grid.count("evaluate.models") == 2 * (2 + 2)
    for round in (1, 2):
        (merit, *_) = read_json(tmp_path / f"run/seed-0/validated-{round}.json")["merit"]
        assert 0 <= merit <= 1


def test_private_rounds_cannot_choose_on_private_images(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="would choose on private validation images"):
        run(tmp_path / "run", patience=1, privacy="dp", epsilon=8.0)
