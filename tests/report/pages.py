"""A made-up summary with everything that a report can show, and its page."""

from __future__ import annotations

from typing import Any

import torch

from fedistill.report.page import render_report
from fedistill.synthetic.set import SyntheticSet, one_hot

CLASSES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")


def arm(mean: float, std: float | None = 0.02, images: int = 150) -> dict[str, Any]:
    metrics = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
    figures = {name: {"mean": mean + 0.013 * k, "std": std} for k, name in enumerate(metrics)}
    recall = {name: {"mean": max(0.0, mean - 0.031 * k), "std": std} for k, name in enumerate(CLASSES)}
    return {
        **figures,
        "per_class_recall": recall,
        "images": images,
        "upload_bytes": 2352 * images,
        "seconds": 12.0,
        "std_over": "seeds",
        "learning_rate": [0.03, 0.1, 0.03],
    }


def counted(right: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Recognised images of each class, of 10, 8, 6, 4 and 3."""
    return {name: {"right": r, "of": n} for name, r, n in zip(CLASSES, right, (10, 8, 6, 4, 3), strict=True)}


def make_summary() -> dict[str, Any]:
    def site(name: str, images: list[int]) -> dict[str, Any]:
        return {
            "name": name,
            "status": "ok",
            "reason": "",
            "train": sum(images),
            "images": images,
            "phases": {"experts": 12.3, "distill": 140.1},
            "upload_bytes": 117000,
            "iterations": 500,
            "skipped_iterations": 3,
            "final_loss": 0.41,
            "synthetic_images": 50,
            "notes": [],
        }

    arms = {
        "distilled": arm(0.71),
        "random_real": arm(0.587, 0.03),
        "local_only": arm(0.64, 0.05, 50),
        "centralised": arm(0.751, 0.01, 524),
    }
    return {
        "format": "fedistill-summary/1",
        "config": {"data": "wbc_sites", "method": "datm", "init": "noise", "ipc": 10, "eval_models": "convnet,mlp"},
        "versions": {"fedistill": "0.1.0", "torch": "2.6.0", "flwr": "1.41.0", "python": "3.11.9"},
        "seed": 0,
        "seeds": [0, 1, 2],
        "command": "fedistill simulate --data wbc_sites --set ipc=10 --seeds 3",
        "data": {
            "name": "wbc_sites",
            "fingerprint": "ab12cd34ef56",
            "modality": "generic",
            "class_names": list(CLASSES),
            "geometry": [3, 28, 28],
            "train": 524,
            "val": 74,
            "test": 153,
            "partition": "site",
        },
        "sites": [
            site("jtsc", [123, 37, 33, 15, 1]),
            site("bccd", [60, 22, 9, 40, 2]),
            site("rabin", [80, 50, 30, 20, 2]),
        ],
        "arms": arms,
        "cross_architecture": {"mlp": {"distilled": arm(0.55), "random_real": arm(0.51)}},
        "federated": {
            "distilled": {
                "jtsc": {
                    "accuracy": 0.7,
                    "balanced_accuracy": 0.66,
                    "images": 31,
                    "recognised": counted((9, 7, 3, 2, 0)),
                },
                "bccd": {
                    "accuracy": 0.6,
                    "balanced_accuracy": 0.56,
                    "images": 29,
                    "recognised": counted((8, 5, 2, 2, 1)),
                },
            }
        },
        "calibration": {
            "model": "convnet",
            "expected_error": {"mean": 0.081, "std": 0.011},
            "bins": [
                {
                    "from": b / 10,
                    "to": (b + 1) / 10,
                    "count": 6 * (b - 2),
                    "confidence": b / 10 + 0.05,
                    "accuracy": b / 10,
                }
                if b > 2
                else {"from": b / 10, "to": (b + 1) / 10, "count": 0, "confidence": None, "accuracy": None}
                for b in range(10)
            ],
        },
        "peak_memory_bytes": 2.1e9,
        "seconds": 412.0,
        "notes": [],
    }


def make_set(site: str, classes: tuple[str, ...] = CLASSES, per_class: int = 2) -> SyntheticSet:
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    images = torch.randn(len(labels), 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(
        images=images,
        labels=one_hot(labels, len(classes)),
        site=torch.zeros(len(labels), dtype=torch.int64),
        sites=(site,),
        class_names=classes,
        mean=0.5,
        std=0.25,
        modality="generic",
        step_size=(0.02,),
        manifest={},
    )


def render(summary: dict[str, Any]) -> str:
    names = [site["name"] for site in summary["sites"] if site["status"] == "ok"]
    curves = {name: [(i, 1.2 - i / (600 + 90 * k)) for i in range(0, 500, 5)] for k, name in enumerate(names)}
    return render_report(summary, {name: make_set(name) for name in names}, curves)
