"""A study over phantoms whose cells take seconds."""

from __future__ import annotations

from pathlib import Path

SETTINGS = """
partition = "iid"
sites = 2
phantom_images = 90
phantom_classes = 2
phantom_size = 16
width = 4
depth = 2
experts = 1
expert_steps = 60
segment = 2
iterations = 4
syn_steps = 2
eval_nets = 1
eval_steps = 5
eval_models = "mlp"
method = "mtt"
"""
STUDY = f"""
title = "Tiny"
seeds = 2
[settings]{SETTINGS}
[grid]
ipc = [1, 2]
"""


def write_study(folder: Path, text: str = STUDY, name: str = "tiny") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path
