"""What a network is asked: the loss and the answers of each kind of task.

| kind         | labels of real images       | target of an image `(K,)`            | loss                                |
|--------------|-----------------------------|--------------------------------------|-------------------------------------|
| multiclass   | class `(n,)`                | a distribution, one-hot when hard    | cross-entropy                       |
| ordinal      | grade `(n,)`                | exp(-|k - y| / TAU), normalised      | cross-entropy                       |
| multilabel   | findings `(n, K)`, 0 or 1   | a probability per finding            | binary cross-entropy, mean over K   |

Ordinal targets are the soft labels of Diaz and Marathe (CVPR 2019, SORD) with absolute distances.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("multiclass", "multilabel", "ordinal")
TAU = 0.5  # grades; the neighbour of the true grade gets e^-2 of its weight


def targets_of(labels: Tensor, classes: int, kind: str) -> Tensor:
    """Targets `(n, K)` float32 of the labels of real images."""
    if kind == "multilabel":
        return labels.float()
    if kind == "ordinal":
        grades = torch.arange(classes, device=labels.device)
        return (-(grades - labels[:, None]).abs() / TAU).softmax(1)
    return F.one_hot(labels, classes).float()


def groups_of(targets: Tensor, kind: str) -> Tensor:
    """The group `(n,)` of each image: its most likely class; for multilabel K where no finding reaches one half."""
    if kind != "multilabel":
        return targets.argmax(1)
    return torch.where(targets.amax(1) >= 0.5, targets.argmax(1), targets.shape[1])


def loss_of(kind: str, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean loss of `logits (b, K)` to `targets (b, K)`.

    weights `(K,)`: of the classes, normalised over the batch; of the positive side of each finding for multilabel.
    """
    if kind == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    if weights is not None:
        share = targets * weights
        targets = share * (len(share) / share.sum())
    return -(targets * F.log_softmax(logits, 1)).sum(1).mean()


def answers_of(kind: str, logits: Tensor) -> Tensor:
    """Probabilities `(n, K)`: a distribution per image, or one probability per finding. Learned labels use the same map."""
    return logits.sigmoid() if kind == "multilabel" else logits.softmax(1)


def class_weights(targets: Tensor, *, kind: str = "multiclass", limit: float = 10.0) -> Tensor:
    """Weights `(K,)` against imbalance, at most `limit`; classes without an image get 1.

    multiclass and ordinal: inverse frequency, mean 1 over the images. multilabel: negatives per positive.
    """
    if kind == "multilabel":
        positive = targets.sum(0)
        weights = ((len(targets) - positive) / positive.clamp_min(1)).clamp(max=limit)
        return torch.where(positive > 0, weights, 1.0)
    counts = torch.bincount(targets.argmax(1), minlength=targets.shape[1]).float()
    present = counts > 0
    weights = torch.ones(len(counts))
    weights[present] = (len(targets) / (present.sum() * counts[present])).clamp(max=limit)
    return weights
