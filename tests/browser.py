"""A real headless browser, for the tests of pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--force-device-scale-factor=1",
)  # fmt: skip
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
SERIOUS = ("serious", "critical")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A Chromium that can reach nothing; what pages write to the console, and what they ask for, is logged."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[browser]'")
    browser = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    driver_path = shutil.which("chromedriver")
    if browser is None or driver_path is None:
        pytest.skip("There is no Chromium with chromedriver here.")
    os.environ["SE_OFFLINE"] = "true"  # selenium must not look for browsers elsewhere
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
        try:
            driver.execute_cdp_cmd("Network.enable", {})
            driver.set_script_timeout(300)  # of a busy machine
            yield driver
        finally:
            driver.quit()


def show(driver: Any, page: Path, *, width: int, dark: bool = False) -> None:
    """Open `page` on a screen of `width` pixels, in light or dark."""
    height = 800
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(page.as_uri())


def violations(driver: Any) -> list[str]:
    """What axe-core finds to be serious: the rule, where it is broken, and how.

    The package has axe-core 3.1 for Python 3.11, which does not know yet that the terms of a list may be grouped by `div`; for
    later Pythons it has 4.10.
    """
    found = importlib.util.find_spec("axe_selenium_python")
    if found is None or found.origin is None:
        pytest.skip("axe-selenium-python is not installed: pip install '.[browser]'")
    axe = Path(found.origin).parent / "node_modules" / "axe-core" / "axe.min.js"
    driver.execute_script(axe.read_text(encoding="utf-8"))
    results = driver.execute_async_script("""
        const done = arguments[0], off = { enabled: false };
        const rules = axe.version.startsWith("3.") ? { "definition-list": off, dlitem: off } : {};
        axe.run(document, { rules }).then(done, error => done(String(error)));
    """)
    assert isinstance(results, dict), results
    assert results["passes"], "axe has looked at nothing"
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in results["violations"]
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]
