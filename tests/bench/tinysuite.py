"""A suite over phantoms that a second can work off, and an engine without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedistill.bench.schedule import Engine

SUITE = """
title = "Tiny"
ipc = [1, 2]
seeds = 2
[settings]
phantom_images = 90
phantom_classes = 3
phantom_size = 16
width = 4
depth = 2
experts = 1
expert_steps = 20
checkpoint_every = 5
segment = 2
iterations = 2
syn_steps = 2
image_lr = 5.0
skip_above = 1000.0
eval_nets = 2
eval_steps = 4
eval_models = "mlp"
"""


def write_suite(folder: Path, **files: str) -> Path:
    """A suite with the data set `phantom` and the methods `mtt` and `ptm`; files: more of them, as `methods_line="..."`."""
    texts = {
        "suite": SUITE,
        "data_phantom": 'data = "phantom"',
        "methods_mtt": "",
        "methods_ptm": 'against = ["mtt"]',
    } | files
    for name, text in texts.items():
        path = folder / (name.replace("_", "/", 1) + ".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def here(done: list[str] | None = None) -> Engine:
    """Work in this process, when its result is waited for; `done` collects the names of the functions."""
    return Engine(
        submit=lambda function, *arguments: _Call(function, arguments, done),
        wait=lambda handles: handles[0],
        result=lambda call: call(),
    )


class _Call:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], done: list[str] | None) -> None:
        self.function, self.arguments, self.done = function, arguments, done

    def __call__(self) -> Any:
        if self.done is not None:
            self.done.append(self.function.__name__)
        return self.function(*self.arguments)
