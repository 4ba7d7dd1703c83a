"""Was a canary in the training data? Two views of what was released, each calibrated with other runs as shadows.

- Networks trained from the set: the confidence that they have in the canary's wrong label (LiRA; Carlini, Chien, Nasr, Song,
  Terzis and Tramer, IEEE S&P 2022, arXiv 2112.03570).
- The set itself: how near its nearest image is to the canary.

Of K runs of the same work with coins of their own, each is the target once and a shadow of the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import Config
from fedistill.data.public import normalise
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.fit import Material, fit_all
from fedistill.experts.train import Task
from fedistill.models.loss import groups_of, targets_of
from fedistill.privacy.audit.canaries import Canaries
from fedistill.synthetic.set import SyntheticSet

VIEWS = ("confidence", "distance", "correlation")
LEARNING_RATE = 0.03
NETWORKS = 2  # trained on every set; their confidences are averaged, as LiRA averages over augmentations


def views(config: Config, task: Task, made: SyntheticSet, canaries: Canaries) -> dict[str, Tensor]:
    """What each view says of the canaries: `(m,)` float32 per name in `VIEWS`, higher for a likelier member."""
    images = normalise(canaries.images.images, task.modality)
    targets = targets_of(canaries.images.labels, task.classes, task.kind)
    near = nearest(made, images, groups_of(targets, task.kind))
    return {"confidence": network_confidence(config, task, made, images, targets)} | near


@torch.no_grad()
def network_confidence(config: Config, task: Task, made: SyntheticSet, images: Tensor, targets: Tensor) -> Tensor:
    """Mean logit-scaled confidence `(m,)` of networks trained on the set, without augmentation: an attacker wants them to overfit.

    images `(m, C, H, W)` normalised; targets `(m, K)`, of the label that the canary has in training.
    """
    model, plain = architectures(config)[0], replace(config, augment="none")
    with torch.enable_grad():
        todo = [(LEARNING_RATE, config.seed + 1000 * n) for n in range(NETWORKS)]
        thetas = fit_all(plain, task, model, Material(made.images, made.labels), todo)
    net = task.network(model, plain)
    logits = [torch.cat([net(t.to(net.device), x.to(net.device)).cpu() for x in images.split(256)]) for t in thetas]
    return torch.stack([scaled(out, targets, task.kind) for out in logits]).mean(0)


def scaled(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Logit of the probability of the target, log p / (1 - p), `(n,)`: near Gaussian over shadows (LiRA, section IV-C).

    Of several findings the mean over them. What a diverged network says counts as no opinion.
    """
    if kind == "multilabel":
        found = (logits * (2 * targets - 1)).mean(1)
    else:
        target = F.one_hot(targets.argmax(1), logits.shape[1]).bool()
        found = logits[target] - logits.masked_fill(target, -torch.inf).logsumexp(1)
    return found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def nearest(made: SyntheticSet, images: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Minus the root mean square distance to, and the correlation with, the nearest synthetic image: `(m,)` each.

    images `(m, C, H, W)` normalised with public constants; groups `(m,)`: only synthetic images of the canary's group are
    looked at, where there are any.
    """
    flat, own = images.flatten(1), made.images.flatten(1)
    distance = torch.cdist(flat, own, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    correlation = _centred(flat) @ _centred(own).T
    same = groups[:, None] == made.groups[None]
    same |= ~same.any(1, keepdim=True)
    return {
        "distance": -distance.masked_fill(~same, torch.inf).amin(1),
        "correlation": correlation.masked_fill(~same, -torch.inf).amax(1),
    }


def _centred(flat: Tensor) -> Tensor:
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def online(seen: Tensor, inside: Tensor) -> Tensor:
    """LiRA with both hypotheses: log N(x; mu_in, s_in) - log N(x; mu_out, s_out), for every run and canary.

    seen, inside: `(K, m)`, what a view says and whether the canary was in. For run k the means are those of the canary over
    the other runs; the deviations are pooled over canaries and runs, as LiRA does with few shadows, and widened by the error of
    the mean (x has variance s^2 (1 + 1/n) about a mean of n). A canary that no shadow has, or all have, gets the missing mean
    from the average difference. Returns `(K, m)`, higher for members.
    """
    runs = []
    for k in range(len(seen)):
        mean_in, n_in, var_in = _fit(seen, inside, k)
        mean_out, n_out, var_out = _fit(seen, ~inside, k)
        gap = (mean_in - mean_out)[(n_in > 0) & (n_out > 0)]
        typical = gap.mean() if len(gap) else torch.zeros(())
        mean_in = torch.where(n_in > 0, mean_in, mean_out + typical)
        mean_out = torch.where(n_out > 0, mean_out, mean_in - typical)
        runs.append(_log_normal(seen[k], mean_in, var_in, n_in) - _log_normal(seen[k], mean_out, var_out, n_out))
    return torch.stack(runs)


def offline(seen: Tensor, inside: Tensor) -> Tensor:
    """LiRA that only knows runs without the canary: (x - mu_out) / s_out, `(K, m)`, higher for members.

    A canary that every shadow has is compared with the mean over all canaries.
    """
    runs = []
    for k in range(len(seen)):
        mean, n, var = _fit(seen, ~inside, k)
        mean = torch.where(n > 0, mean, mean[n > 0].mean() if (n > 0).any() else seen.mean())
        runs.append((seen[k] - mean) / (var * (1 + 1 / n.clamp_min(1))).sqrt())
    return torch.stack(runs)


def _fit(seen: Tensor, group: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Over the runs but k of `group`: mean and number `(m,)` of each canary, and the pooled variance within canaries `()`."""
    used = group.clone()
    used[k] = False
    n = used.sum(0)
    mean = (seen * used).sum(0) / n.clamp_min(1)
    within = ((seen - mean).square() * used).sum() / (n - 1).clamp_min(0).sum().clamp_min(1)
    return mean, n, within.clamp_min(1e-12)


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor, n: Tensor) -> Tensor:
    spread = variance * (1 + 1 / n.clamp_min(1))
    return -0.5 * (spread.log() + (x - mean).square() / spread)


def guesses(scores: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """Positions of the `each` canaries that are guessed "in" and "out", of `scores (m,)`; the auditor abstains on the rest."""
    order = scores.argsort(stable=True)
    return order[len(order) - each :], order[:each]
