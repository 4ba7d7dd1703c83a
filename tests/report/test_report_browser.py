"""The pages of a run and of a study in a real browser: on a desk and on a telephone, light and dark, by keyboard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import chromium, show, violations
from pages import CLASSES, arm, make_set, make_summary

from fedistill.data.dataset import Split
from fedistill.report.page import render_report
from fedistill.study.page import page
from fedistill.study.results import FIGURES

SCREENS = [(360, False), (360, True), (1200, False), (1200, True)]
PAGES = ("report", "private", "study")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {"report": report(), "private": private(), "study": study()}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def report() -> str:
    """With long names, odd and failed sites, and phantoms."""
    summary = make_summary()
    summary["config"] |= {"data": "phantom", "fl_rounds": 2}
    summary["arms"] |= {"dp-fedprox-10": arm(0.66), "ensemble": arm(0.6)}
    long = "Universitätsklinikum-mit-einem-sehr-langen-Namen-ohne-ein-einziges-Leerzeichen"
    summary["sites"][0]["name"] = long
    summary["sites"][1] |= {"status": "failed", "reason": "Out of memory."}
    summary["sites"][2]["suspicion"] = {
        "reasons": ["it repeats itself"], "copies": 0.4, "seeds": 1, "suspect_in": 1, "left_out_in": 0,
    }  # fmt: skip
    summary["federated"]["distilled"] = {long: summary["federated"]["distilled"]["jtsc"]}
    summary["notes"] = ["Site bccd failed and is not in every merged set."]
    split = Split(torch.zeros(5, 3, 28, 28, dtype=torch.uint8), torch.arange(5), torch.zeros(5, dtype=torch.int64))
    curves = {name: [(i, 1.2 - i / (600 + 90 * k)) for i in range(0, 500, 5)] for k, name in enumerate((long, "rabin"))}
    return render_report(summary, {name: make_set(name, CLASSES, 12) for name in (long, "rabin")}, curves, split)


def private() -> str:
    """With a promise, and without counts, curves and calibration."""
    summary = make_summary() | {"federated": {}, "calibration": None}
    mechanisms = ["sketch: 1 noisy sum of 256 frequencies over all images of the site", "counts of answers, twice"]
    promise = {"epsilon": 2.981, "delta": 1e-3, "unit": "patient", "accountant": "a", "mechanisms": mechanisms}
    for site in summary["sites"]:
        site |= {"images": None, "privacy": promise}
    summary["privacy"] = {"epsilon": 2.981, "delta": 1e-3, "unit": "patient", "statement": "S", "answers_epsilon": 1.0}
    return render_report(summary, {"jtsc": make_set("jtsc")}, {})


def study() -> str:
    blank = dict.fromkeys((*FIGURES, "reason", "code")) | {"status": "ok", "kind": "multiclass"}
    rows = [
        blank | {
            "cell": f"{method}-{alpha}", "method": method, "alpha": alpha, "seed": seed, "eval_model": model, "trained_on": arm,
            "balanced_accuracy": 0.5 + 0.02 * k + 0.1 * (alpha > 1) + seed / 50 - (arm == "random_real") / 9,
            "upload_bytes": 1_250_000 + 1000 * k,
        }
        for k, method in enumerate(("cf", "mtt", "a method with a name that is long"))
        for alpha in (0.05, 0.3, 10.0) for seed in (0, 1) for model in ("convnet", "mlp") for arm in ("distilled", "random_real")
    ]  # fmt: skip
    failed = {"cell": "x", "method": "dm", "alpha": 0.3, "status": "failed", "reason": "An expert diverged."}
    return page("Methods, and skew", [*rows, blank | failed], ["method", "alpha"], cells=12).decode()


def told(driver: Any) -> list[str]:
    return [f"{line['level']}: {line['message']}" for line in driver.get_log("browser")]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_a_page_fits_asks_for_nothing_and_is_accessible(
    driver: Any, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    show(driver, pages[name], width=width, dark=dark)
    messages = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {pages[name].as_uri()}
    assert told(driver) == []
    assert driver.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") is dark
    # opened details count, too
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert driver.execute_script("return innerWidth") == width
    assert driver.execute_script("return document.scrollingElement.scrollWidth") <= width
    assert driver.execute_script(BEYOND) == []
    assert violations(driver) == []
    assert driver.execute_script(FAINT) == []


# What is drawn beyond the right edge of the page, other than inside a box that scrolls.
BEYOND = """
return [...document.querySelectorAll('main *, header *')]
  .filter(e => !e.closest('.scroll *') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 120));
"""
# Text with less contrast than 4.5 to its background, by the formula of WCAG 2; large text is no exception here.
FAINT = """
const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 && n[3] === 0 ? null : n; };
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c) return c; } };
const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
const found = [];
for (const e of document.body.querySelectorAll('*')) {
  if (!own(e) || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'title'].includes(e.tagName)) continue;
  const style = getComputedStyle(e), svg = e instanceof SVGElement;
  const [a, b] = [rgb(svg ? style.fill : style.color), behind(e)].map(light);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(ratio.toFixed(2) + ' ' + e.outerHTML.slice(0, 80));
}
return found;
"""


def test_the_checks_can_fail(driver: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><html><head><meta name=viewport content='width=device-width'><title>x</title></head>"
        "<body style='background:#fff'><main>"
        "<p style='color:#999'>faint</p><div style='width:900px'>wide</div>"
        "<img src='http://127.0.0.1:9/x.png'></main></body></html>"
    )
    show(driver, bad, width=360)
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
    assert wait(driver, 20).until(told)  # what does not load is told after the page has
    assert driver.execute_script("return document.scrollingElement.scrollWidth") > 360
    assert len(driver.execute_script(BEYOND)) == 1
    assert len(driver.execute_script(FAINT)) == 1
    rules = {line.split(":")[0] for line in violations(driver)}
    assert {"color-contrast", "image-alt", "html-has-lang"} <= rules


@pytest.mark.parametrize("name", PAGES)
def test_structure_is_there_for_a_screen_reader(driver: Any, pages: dict[str, Path], name: str) -> None:
    show(driver, pages[name], width=1200)
    levels = driver.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert driver.execute_script("return document.documentElement.lang") == "en"
    nameless = """
      const name = e => e.getAttribute('aria-label') || e.alt
        || (e.getAttribute('aria-labelledby') && document.getElementById(e.getAttribute('aria-labelledby')).textContent);
      return [...document.querySelectorAll('svg:not([aria-hidden]), img, .scroll, section, form, nav')]
        .filter(e => !name(e) || (e.tagName === 'svg' && e.getAttribute('role') !== 'img')).map(e => e.outerHTML.slice(0, 120));
    """
    assert driver.execute_script(nameless) == []
    tables = """
      return [...document.querySelectorAll('table')].filter(t => !t.caption || !t.closest('.scroll[tabindex="0"]')
        || [...t.querySelectorAll('th')].some(th => !th.scope) || [...t.tBodies[0].rows].some(r => r.cells[0].scope !== 'row'))
        .map(t => t.outerHTML.slice(0, 120));
    """
    assert driver.execute_script(tables) == []
    assert driver.execute_script("return document.querySelectorAll('table').length") >= 2


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_everything_in_order(driver: Any, pages: dict[str, Path], name: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(driver, pages[name], width=360)
    wanted = driver.execute_script(
        "window.wanted = [...document.querySelectorAll('a, summary, select, button, [tabindex=\"0\"]')]"
        ".filter(e => e.checkVisibility()); return wanted.length"
    )
    assert wanted > 5
    for k in range(wanted):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        assert driver.execute_script("return wanted.indexOf(document.activeElement)") == k
        outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "focus is to be seen"
    show(driver, pages[name], width=360)
    ActionChains(driver).send_keys(Keys.TAB).perform()
    left = driver.execute_script("return document.activeElement.getBoundingClientRect().left")
    assert left >= 0, "the skip link comes into sight"
    target = driver.execute_script("return document.activeElement.hash")
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    assert driver.execute_script("return '#' + document.activeElement.id") == target


def test_a_wide_table_scrolls_by_keyboard_and_details_open(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    show(driver, pages["report"], width=360)
    box = driver.find_element("xpath", "//*[@aria-labelledby='table-arms']")
    assert driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)
    for _ in range(5):
        box.send_keys(Keys.ARROW_RIGHT)
    wait_for(driver, "return arguments[0].scrollLeft > 0", box)
    first = "return arguments[0].querySelector('tbody th').getBoundingClientRect().left - arguments[0].getBoundingClientRect().left"
    assert driver.execute_script(first, box) >= 0, "the name of the row stays in sight"
    details = driver.find_element("xpath", "//details[summary[contains(., 'Every setting')]]")
    assert not details.get_property("open")
    details.find_element("tag name", "summary").send_keys(Keys.ENTER)
    assert details.get_property("open")


def wait_for(driver: Any, script: str, *arguments: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 300).until(lambda d: d.execute_script(script, *arguments))


def choose(driver: Any, name: str, text: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("css selector", f"#{name}, [name='{name}']")).select_by_visible_text(text)


def table(driver: Any) -> list[list[str]]:
    script = "return [...document.querySelectorAll('#body tr')].map(r => [...r.cells].map(c => c.textContent))"
    return list(driver.execute_script(script))


def test_the_axes_of_a_study_are_chosen(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["study"], width=1200)
    told_first = driver.find_element("id", "told").text
    assert told_first == "Balanced accuracy over method. 9 points in 3 lines."
    before = driver.execute_script("return document.getElementById('plot').innerHTML")
    assert ["cf", "alpha 10", "0.61", "0.01414", "2"] in table(driver)
    choose(driver, "x", "Concentration of the partition")
    after = driver.execute_script("return document.getElementById('plot').innerHTML")
    assert after != before
    assert (
        driver.find_element("id", "told").text
        == "Balanced accuracy over concentration of the partition. 9 points in 3 lines."
    )
    assert ["10", "cf", "0.61", "0.01414", "2"] in table(driver)
    choose(driver, "trained_on", "Random real images")
    assert ["10", "cf", "0.4989", "0.01414", "2"] in table(driver)
    choose(driver, "y", "Bytes sent by all sites")
    assert ["10", "mtt", "1251000", "0", "2"] in table(driver)
    choose(driver, "by", "Global model")
    assert driver.execute_script("return document.getElementById('legend').innerText.split('\\n')") == [
        "convnet",
        "mlp",
    ]
    assert len(table(driver)) == 6
    assert told(driver) == []


def test_the_points_of_a_study_are_sorted_by_a_heading(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    show(driver, pages["study"], width=360)
    for order in (False, True):
        driver.find_elements("css selector", "#head button")[2].send_keys(Keys.ENTER)
        values = [float(row[2]) for row in table(driver)]
        assert values == sorted(values, reverse=order)
        sort = driver.find_elements("css selector", "#head th")[2].get_attribute("aria-sort")
        assert sort == ("descending" if order else "ascending")
        assert driver.switch_to.active_element.text.startswith("Balanced accuracy"), "focus stays on the heading"
    assert told(driver) == []
