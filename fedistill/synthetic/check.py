"""What the server asks of every set before it is merged. Sets come from outside: nothing about them is taken on trust."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedistill.data.public import NORMALISATION
from fedistill.errors import FedistillError
from fedistill.experts.train import Task
from fedistill.matching.problem import budget_of, most_images
from fedistill.models.loss import targets_of
from fedistill.synthetic.set import SyntheticSet

LARGEST = 100.0  # in units of the public standard deviation; distilled pixels stay far below


def check_set(
    candidate: SyntheticSet,
    *,
    site: str,
    task: Task,
    ipc: int,
    counts: Sequence[int],
    policy: str = "equal",
    scale: int = 1,
) -> None:
    """Raise `FedistillError` ("refused-set") unless `candidate` is what site `site` was asked for.

    ipc: images per class. counts: the images per class that the site declared. policy: the setting `budget`. scale: their
    `formation_of`. Images with hard labels have a budget per
    class; soft labels, which may come to favour another class than the one they began with, and findings only one in all.
    """

    def refuse(why: str) -> FedistillError:
        return FedistillError("refused-set", f"The set of site '{site}' is refused: {why}.")

    if candidate.sites != (site,):
        raise refuse(f"it says that it comes from {', '.join(map(repr, candidate.sites))}")
    if set(candidate.manifest) != {site}:  # it would speak for them in the merged set
        raise refuse("its manifest is not about this site alone")
    if candidate.class_names != task.class_names:
        raise refuse(f"its classes are {', '.join(candidate.class_names)}, not {', '.join(task.class_names)}")
    if candidate.kind != task.kind:
        raise refuse(f"it is made for a {candidate.kind} task, and this one is {task.kind}")
    if candidate.geometry != task.geometry:
        raise refuse(f"its images are {candidate.geometry}, not {task.geometry} (channels, pixels along each axis)")
    if candidate.scale != scale:
        raise refuse(f"its images are enlarged by {candidate.scale}, not {scale}")
    if candidate.modality != task.modality or (candidate.mean, candidate.std) != NORMALISATION[task.modality]:
        raise refuse("its images are normalised with other constants")
    if not torch.isfinite(candidate.images).all() or candidate.images.abs().max() > LARGEST:
        raise refuse(f"it has pixels that are not finite or beyond {LARGEST:g} standard deviations")
    labels = candidate.labels
    if labels.shape != (len(candidate), task.classes) or not torch.isfinite(labels).all():
        raise refuse("its labels are not one finite distribution per image")
    if task.kind == "multilabel" and ((labels < 0).any() or (labels > 1).any()):
        raise refuse("a label has a probability that is not between 0 and 1")
    if task.kind != "multilabel" and ((labels < 0).any() or ((labels.sum(1) - 1).abs() > 0.01).any()):
        raise refuse("a label is not a distribution over the classes")
    if task.kind != "multilabel" and _are_hard(labels, task.kind):
        made = torch.bincount(candidate.hard_labels, minlength=task.classes).tolist()
        for name, m, most in zip(task.class_names, made, budget_of(counts, ipc, policy), strict=True):
            if m > most:
                raise refuse(f"it has {m} images of class {name}, and its budget is {most}")
    most = most_images(task, ipc=ipc, counts=counts, policy=policy)
    if len(candidate) > most:
        raise refuse(f"it has {len(candidate)} images, and its budget is {most}")
    if not all(0 < s <= 1 for s in candidate.step_size):
        raise refuse("its step size is not between 0 and 1")


def _are_hard(labels: Tensor, kind: str) -> bool:
    """Whether `labels (m, K)` are those of single classes, as far as the wire's float16 can tell."""
    return torch.allclose(labels, targets_of(labels.argmax(1), labels.shape[1], kind), atol=1e-3)
