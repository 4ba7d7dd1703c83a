"""What a user installs: one top-level module, with the Flower app and the page template inside it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_adds_fedistill_and_nothing_else(tmp_path: Path) -> None:
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fedistill"}
    for inside in (
        "client/app.py",
        "client/guard.py",
        "pyproject.toml",
        "server/app.py",
        "simulations/engine.py",
        "simulations/bench.py",
        "simulations/studies/privacy-accuracy.toml",
        "simulations/suites/medical/suite.toml",
        "simulations/suites/medical/data/wbc_sites.toml",
        "simulations/suites/medical/methods/mtt.toml",
    ):
        assert f"fedistill/_app/{inside}" in names
    assert "fedistill/report/page.html.j2" in names
    assert "fedistill/study/page.html.j2" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith((".npz", ".png", ".safetensors")) for name in names)
