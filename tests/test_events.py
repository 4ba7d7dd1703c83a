"""The event log survives killed writers; a run folder belongs to one configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedistill.config import Config
from fedistill.errors import FedistillError
from fedistill.events import EventLog, claim_folder, read_events
from fedistill.files import read_json, write_json


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    log.add(0, "", "describe", "start")
    first, offset = read_events(log.path)
    log.add(0, "Nord-Süd", "experts", "progress", step=3, total=9, loss=0.5, eta=1.5, message="two\nlines")
    second, end = read_events(log.path, offset)
    assert [e.phase for e in first + second] == ["describe", "experts"]
    assert second[0].site == "Nord-Süd"
    assert second[0].message == "two\nlines"
    assert read_events(log.path, end) == ([], end)
    assert second[0].t >= first[0].t


def test_partial_line_is_waited_for_and_then_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.add(0, "a", "distill", "done")
    with open(path, "ab") as file:
        file.write(b'{"t": 1, "seed"')
    events, offset = read_events(path)
    assert len(events) == 1
    EventLog(path).add(0, "b", "distill", "done")  # a new writer after the old one was killed
    events, _ = read_events(path, offset)
    assert [e.site for e in events] == ["b"]


def test_missing_log_is_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none.jsonl") == ([], 0)


def test_unknown_words_are_programming_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training/start"):
        EventLog(tmp_path / "e").add(0, "", "training", "start")


def test_folder_goes_on_with_more_seeds_only(tmp_path: Path) -> None:
    config = Config(preset="quick").resolved()
    claim_folder(tmp_path, config)
    claim_folder(tmp_path, dataclasses.replace(config, seeds=3, deadline=5.0))
    with pytest.raises(FedistillError, match="ipc was 10 and is now 3") as caught:
        claim_folder(tmp_path, dataclasses.replace(config, ipc=3))
    assert caught.value.code == "other-run"


def test_a_report_of_more_seeds_is_kept(tmp_path: Path) -> None:
    config = Config(preset="quick", seeds=2).resolved()
    claim_folder(tmp_path, config)
    claim_folder(tmp_path, dataclasses.replace(config, seeds=1))  # nothing is finished: fewer may do
    claim_folder(tmp_path, config)
    write_json(tmp_path / "summary.json", {"seeds": [0, 1]})
    claim_folder(tmp_path, config)
    with pytest.raises(FedistillError, match="the report of a run of 2 seeds: say --seeds 2") as caught:
        claim_folder(tmp_path, dataclasses.replace(config, seeds=1))
    assert caught.value.code == "other-run"
    assert read_json(tmp_path / "config.json")["seeds"] == 2


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FedistillError, match="neither empty nor a run"):
        claim_folder(tmp_path, Config())
