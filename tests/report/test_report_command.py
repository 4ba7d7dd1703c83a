"""`fedistill report`: the page again, from a run, a copy of it, or a study; and folders that are none."""

from __future__ import annotations

import json
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from pages import make_set, make_summary

from fedistill import cli
from fedistill.files import write_json
from fedistill.synthetic.merge import merge
from fedistill.synthetic.store import save_set


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with two sets."""
    folder, summary = tmp_path / "my run", make_summary()
    summary["config"] |= {"rounds": 1}
    sets = [make_set("jtsc"), make_set("bccd")]
    for made in sets:
        save_set(made, folder / "seed-0/round-1" / f"site-{made.sites[0]}")
    save_set(merge(sets), folder / "seed-0/merged")
    write_json(folder / "seed-0/curves.json", {"jtsc": [[0, 1.0], [10, 0.5]]})
    write_json(folder / "summary.json", summary)
    return folder


def command(*arguments: Any) -> int:
    """The exit code of `fedistill report`."""
    before, sys.argv = sys.argv, ["fedistill", "report", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def test_the_page_is_written_and_its_path_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "summary.json").read_bytes()
    assert command(run, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(run / "report.html")}
    page = (run / "report.html").read_text()
    assert "2 synthetic images of jtsc, monocyte" in page
    assert "2 synthetic images of bccd, monocyte" in page
    assert "Matching loss of every site" in page
    assert (run / "summary.json").read_bytes() == before


def test_a_copy_for_others_gives_the_same_images(run: Path) -> None:
    assert command(run) == 0
    images = (run / "report.html").read_text().split('<h2 id="images">')[1].split('<h2 id="classes">')[0]
    shutil.rmtree(run / "seed-0/round-1")
    (run / "seed-0/curves.json").unlink()
    assert command(run) == 0
    assert images in (run / "report.html").read_text()


def test_the_page_is_opened(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not opened.append(address))
    assert command(run, "--open") == 0
    assert opened == [(run / "report.html").as_uri()]
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert command(run, "--open") == 2
    told = capsys.readouterr().err
    assert f"There is no web browser to open here: open {run / 'report.html'} in one." in told
    assert (run / "report.html").exists()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (None, "There is no folder"),
        ({}, "is the folder of neither a run nor a study"),
        ({"config.json": "{}"}, "has not finished"),
        ({"summary.json": "[]"}, "is not of the format fedistill-summary/1"),
        ({"summary.json": '{"format": "fedistill-summary/9"}'}, "is not of the format fedistill-summary/1"),
        ({"summary.json": "{"}, "is not as it was written"),
        ({"study.json": "{}"}, "run the study first"),
    ],
)
def test_folders_without_anything_to_report(
    files: dict[str, str] | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if files is not None:
        folder.mkdir(exist_ok=True)
    assert command(folder) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (folder / "report.html").exists()
