"""One synthetic set against the data it was made from, without a federation."""

from __future__ import annotations

from typing import Any

import torch

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures, budget_in_whole_images, draw_as_many, figures_of
from fedistill.evaluation.fit import Material, of_split, select_and_test
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import encode, size


def evaluate_set(config: Config, data: Dataset, synthetic: SyntheticSet) -> dict[str, Any]:
    """Arms "distilled" and "random_real" (random real training images of as many bytes, per class where an image has one), in
    the layout of a run's summary.

    Raises `FedistillError` when set and data differ in classes, kind of task, geometry or modality.
    """
    for what in ("class_names", "kind", "geometry", "modality"):
        if getattr(synthetic, what) != getattr(data, what):
            raise FedistillError(
                "unlike-data",
                f"The set and {data.name} do not fit: {what} is {getattr(synthetic, what)} and {getattr(data, what)}.",
            )
    counts = budget_in_whole_images(synthetic, torch.bincount(synthetic.groups, minlength=data.classes))
    rng = generator(config.seed, "random-real", "all")
    random = data.train.take(draw_as_many(data.train.labels, counts, rng))
    materials = {
        "distilled": (Material(synthetic.images, synthetic.labels), size(*encode(synthetic))),
        "random_real": (of_split(random, task_of(data)), random.images.numel()),
    }
    model, task = architectures(config)[0], task_of(data)
    arms = {
        name: figures_of([select_and_test(config, task, model, material, data.val, data.test)])
        | {"images": len(material.images), "upload_bytes": upload, "std_over": "networks"}
        for name, (material, upload) in materials.items()
    }
    return {
        "format": "fedistill-evaluation/1",
        "config": config.to_dict(),
        "seed": config.seed,
        "seeds": [config.seed],
        "data": {"name": data.name, "kind": data.kind},
        "arms": arms,
    }
