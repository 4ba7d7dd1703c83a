"""`fedistill ledger`: tables for people, JSON for programs, and exit code 1 where a ledger does not hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ledgers import mechanism, spend, tamper

from fedistill import cli
from fedistill.privacy.ledger import Ledger


@pytest.fixture
def fedistill(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedistill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def two(ledger: Ledger) -> Ledger:
    spend(ledger, "a", mechanism(2.5, 50, 0.2), mechanism(20.0), unit="patient")
    spend(ledger, "b", mechanism(steps=3), data="derma", what="counts", note="round [bold]2[/bold]", delta=1e-4)
    spend(ledger, "c", mechanism(2.5, 50, 0.2), what="sketch")
    return ledger


def test_show_is_a_table(fedistill, two: Ledger) -> None:
    code, out, err = fedistill("ledger", "show", two.path)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert lines[0] == "time (UTC) data what unit mechanisms epsilon so far delta"
    first = two.entries()[0]
    words = "sum: 50 sums over 20 % of the records, noise 2.5, clip 1"
    assert lines[1].startswith(f"{first.time[:10]} {first.time[11:16]} chest experts patient {words} 2.6")
    assert lines[1].endswith(" 1e-05")
    assert lines[2] == "sum: 1 sum over all records, noise 20, clip 1"
    assert "derma counts image sum: 3 sums over all records, noise 5, clip 1 1.1" in lines[3]
    total = two.spent("chest", 1e-5).epsilon
    assert lines[4].endswith(f"chest sketch image {words} {total:.3f} 1e-05")


def test_show_json(fedistill, two: Ledger) -> None:
    code, out, _ = fedistill("ledger", "show", two.path, "--json")
    shown = json.loads(out)
    assert code == 0
    assert [{k: v for k, v in e.items() if k != "epsilon_so_far"} for e in shown["entries"]] == [
        e.to_dict() for e in two.entries()
    ]
    assert shown["entries"][2]["epsilon_so_far"] == shown["spent"]["chest"]["epsilon"]
    assert shown["spent"]["chest"]["epsilon"] == two.spent("chest", 1e-5).epsilon
    assert {data: (spent["unit"], spent["delta"]) for data, spent in shown["spent"].items()} == {
        "chest": ("image", 1e-5),
        "derma": ("image", 1e-4),
    }


def test_verify_a_ledger_that_holds(fedistill, two: Ledger) -> None:
    before = two.path.read_bytes()
    last = two.entries()[-1].hash
    code, out, err = fedistill("ledger", "verify", two.path)
    assert (code, out, err) == (0, f"{two.path} holds: 3 entries, head {last}.\n", "")
    code, out, _ = fedistill("ledger", "verify", two.path, "--json")
    assert (code, json.loads(out)) == (0, {"holds": True, "count": 3, "hash": last})
    assert two.path.read_bytes() == before


def test_a_broken_ledger_has_exit_code_1(fedistill, two: Ledger) -> None:
    tamper(two, "UPDATE entries SET delta = 0.5 WHERE position = 2")
    code, out, err = fedistill("ledger", "verify", two.path)
    assert (code, out) == (1, "")
    assert "does not hold: entry 2 was changed" in err
    code, out, err = fedistill("ledger", "verify", two.path, "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["holds"] is False
    assert "entry 2 was changed" in json.loads(out)["why"]
    code, out, err = fedistill("ledger", "show", two.path)
    assert (code, out) == (2, "")
    assert err.startswith("Error: The ledger")


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_path_without_a_ledger(fedistill, tmp_path: Path, command: str) -> None:
    code, out, err = fedistill("ledger", command, tmp_path / "none")
    assert (code, out) == (2, "")
    assert err.startswith("Error: There is no ledger ")
    (tmp_path / "text").write_text("hello " * 200)
    code, _, err = fedistill("ledger", command, tmp_path / "text", "--json")
    assert code == (1 if command == "verify" else 2)
    assert "Traceback" not in err
    assert not (tmp_path / "none").exists()


def test_an_empty_ledger(fedistill, ledger: Ledger) -> None:
    assert json.loads(fedistill("ledger", "show", ledger.path, "--json")[1]) == {"entries": [], "spent": {}}
    assert "0 entries" in fedistill("ledger", "verify", ledger.path)[1]
