from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedistill.report import live
from fedistill.report.live import State, Tail, advance, fold, follow, render


def event(site: str = "jtsc", phase: str = "distill", status: str = "progress", **more: Any) -> dict[str, Any]:
    return {"t": 100.0, "seed": 0, "site": site, "phase": phase, "status": status, **more}


def shown(state: State) -> str:
    console = Console(width=140, file=io.StringIO())
    with console.capture() as captured:
        console.print(render(state))
    return captured.get()


def test_folds_progress_and_starts_new_phases_empty() -> None:
    first = fold([event(status="start", phase="experts"), event(phase="experts", step=2, total=6, loss=0.9, eta=4.0)])
    assert (first.sites[0, "jtsc"].step, first.sites[0, "jtsc"].loss) == (2, 0.9)
    second = advance(first, event(step=120, total=500, loss=0.61, eta=33.0))
    line = second.sites[0, "jtsc"]
    assert (line.phase, line.step, line.total, line.loss, line.eta) == ("distill", 120, 500, 0.61, 33.0)
    assert advance(second, event(phase="evaluate")).sites[0, "jtsc"].loss is None
    assert first.sites[0, "jtsc"].phase == "experts"  # the reducer changes nothing in place


def test_note_is_an_aside() -> None:
    state = fold([event(step=5, total=10), event(phase="report", status="note", message="class a: 1 image")])
    line = state.sites[0, "jtsc"]
    assert (line.phase, line.status, line.step, line.message) == ("distill", "progress", 5, "class a: 1 image")


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"site": 3, "phase": None, "status": [], "step": "many", "total": {}, "loss": "x", "eta": True, "seed": "0"},
        {"phase": "a phase of a later version", "status": "whatever", "loss": float("nan"), "step": float("inf")},
        {"site": "x", "step": 20, "total": 10, "eta": -1},
        {"site": "[bold]\x1b[31m\nname", "phase": "distill", "total": -5},
    ],
)
def test_odd_events_do_no_harm(odd: dict[str, Any]) -> None:
    state = fold([event(), odd, event(site="b", status="failed", message="Out of memory.")])
    text = shown(state)
    assert "Out of memory." in text
    assert "\x1b" not in text


def test_render_has_a_line_per_site_of_the_seed_and_the_server_last() -> None:
    events = [event(""), event("a", step=120, total=500, loss=0.61, eta=33.0), event("b", status="late")]
    lines = shown(fold(events)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["a", "b", "server"]
    assert all(part in lines[2] for part in ("distill", "120/500", "0.610", "33 s"))
    assert "late" in lines[3]
    assert "Seed 1" in shown(fold([*events, event("a", seed=1)]))
    assert "Waiting" in shown(State())


def test_tail_waits_for_whole_lines_and_restarts_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"step": 1}\nnot json\n[1]\n\xff\n{"step": 2}\n{"st')
    assert [e["step"] for e in tail.read()] == [1, 2]
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(b'ep": 3}\n')
    assert [e["step"] for e in tail.read()] == [3]
    path.write_bytes(b'{"step": 4}\n')
    assert [e["step"] for e in tail.read()] == [4]


def run(path: Path, polls: int, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(live, "POLL_SECONDS", 0.001)
    answers = iter([False] * polls + [True] * 1000)
    out = io.StringIO()
    follow(path, lambda: next(answers), Console(file=out, force_terminal=terminal, width=100))
    return out.getvalue()


def write(path: Path, events: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(e) + "\n" for e in events))


def test_plain_view_prints_news_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    events = [event(status="start", t=0)]
    events += [event(t=k, step=k, total=25, loss=0.5, eta=25.0 - k) for k in range(1, 26)]
    write(path, [*events, event(status="done", t=25.5), event("", "evaluate", "note", t=26, message="hello [world]")])
    lines = run(path, 0, False, monkeypatch).splitlines()
    assert lines == [
        "jtsc: distill start",
        "jtsc: distill 10/25, loss 0.500, 15 s left",
        "jtsc: distill 20/25, loss 0.500, 5.0 s left",
        "jtsc: distill done 25/25, loss 0.500",
        "server: evaluate note – hello [world]",
    ]


def test_terminal_view_and_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    assert run(path, 2, False, monkeypatch) == ""
    assert "Waiting" in run(path, 2, True, monkeypatch)
    write(path, [event(step=3, total=9)])
    assert "3/9" in run(path, 2, True, monkeypatch)


def test_a_broken_view_still_lasts_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no view")

    monkeypatch.setattr(live, "describe", broken)
    write(tmp_path / "events.jsonl", [event()])
    assert run(tmp_path / "events.jsonl", 3, False, monkeypatch) == ""
