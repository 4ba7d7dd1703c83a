"""The documentation as a site: it builds without a warning, its links lead somewhere, and it loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import fields
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import typer
from blocks import PAGES, ROOT

from fedistill import cli
from fedistill.config import Config
from fedistill.methods.registry import METHODS

PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.html"))
LOADED = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}


class Page(HTMLParser):
    """ids: what anchors can lead to. links: what readers may follow. loads: what a browser fetches by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads, self.text = set[str](), list[str](), list[str](), ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.add(str(found["id"]))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in LOADED and found.get(LOADED[tag]):
            self.loads.append(str(found[LOADED[tag]]))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(name) is None:
            pytest.skip(f"the site is not built: {name} is not installed (pip install '.[docs]')")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the root of a server
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            place, _, anchor = unquote(link).partition("#")
            target = (path.parent / place).resolve() if place else path
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    outside = {load for page in pages.values() for load in page.loads if re.match(r"(?:[a-z]+:)?//", load)}
    assert not outside
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//|@import\s+['\"](?:https?:)?//", path.read_text()), path


def test_the_reference_has_every_command_option_setting_and_method(site: Path, pages: dict[Path, Page]) -> None:
    words = pages[site / "reference" / "command-line.html"].text

    def walk(name: str, command: click.Command) -> None:
        assert name in words
        if isinstance(command, click.Group):
            for below, one in command.commands.items():
                walk(f"{name} {below}", one)
            return
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "help":
                assert parameter.opts[0] in words

    root = typer.main.get_command(cli.app)
    assert isinstance(root, click.Group)
    for name, command in root.commands.items():
        walk(f"fedistill {name}", command)
    settings = pages[site / "reference" / "settings.html"].text.split()
    assert {f.name for f in fields(Config)} <= set(settings)
    methods = pages[site / "reference" / "methods.html"].text.split()
    assert set(METHODS) <= set(methods)
    python = pages[site / "reference" / "python.html"].ids
    for name in (
        "api.distill",
        "synthetic.store.load_set",
        "synthetic.set.SyntheticSet",
        "wire.decode",
        "release.verify.verify",
    ):
        assert f"fedistill.{name}" in python


def test_every_page_is_in_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    front = {unquote(link).partition("#")[0] for link in pages[site / "index.html"].links}
    written = {str(p.relative_to(ROOT / "docs").with_suffix(".html")) for p in PAGES if p.parts[-2] != ROOT.name}
    assert {page for page in written - {"index.html"} if page not in front} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)).replace("/", "-"))
def test_links_lead_to_files(page: Path) -> None:
    """As they are read in the repository, where the pages are not built."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place = link.partition("#")[0]
        if place and not re.match(r"[a-z]+:", place):
            assert (page.parent / place).exists(), link


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.stem)
def test_a_picture_says_what_it_shows_and_has_no_colour_of_text(picture: Path) -> None:
    root = ET.fromstring(picture.read_text())
    svg = next(iter(root))
    space = "{http://www.w3.org/2000/svg}"
    said = {child.get("id"): child.text for child in svg if child.tag in (f"{space}title", f"{space}desc")}
    assert svg.get("role") == "img"
    named = (svg.get("aria-labelledby") or "").split()
    assert len(named) == 2
    assert all(said.get(name) for name in named)
    styles = (ROOT / "docs" / "_assets" / "site.css").read_text()
    for element in svg.iter():
        for name in (element.get("class") or "").split():
            assert f".picture .{name} " in styles
        if element.tag == f"{space}text":  # its colour is the page's, in light and in dark
            assert element.get("fill") is None
    assert any(f'"{picture.name}"' in page.read_text() for page in PAGES)
