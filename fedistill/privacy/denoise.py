"""Private trajectories made easier to match. Whatever is done here is free: it sees only what the noise already protects.

Most of the way between two checkpoints of DP-SGD is noise. Its size is known exactly: each of k steps adds, in every
coordinate, Gaussian noise of deviation lr * sigma * C / B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def denoise(paths: Sequence[Tensor], sizes: Sequence[int], *, how: str, step_noise: float, every: int) -> list[Tensor]:
    """Trajectories `(T+1, P)` of experts that began at the same parameters, with less noise.

    average: checkpoint t becomes the mean of checkpoints t/2 to t, and all experts become their mean.
    shrink: then the way from the start is shortened, layer by layer, by the share of it that is noise (James-Stein):

        s = max(0, 1 - E|noise|^2 / |way|^2)

    Where s is 0 nothing is known of the way, and the checkpoint lies in proportion on the way to the next one that is known.

    sizes: parameters of each layer. step_noise: deviation of one step's noise per coordinate. every: steps per checkpoint.
    """
    if how == "none":
        return list(paths)
    path = torch.stack(list(paths)).mean(0)
    checkpoints = len(path)
    t = torch.arange(checkpoints)
    inside = (t[None, :] >= t[:, None] // 2) & (t[None, :] <= t[:, None])  # (T+1, T+1): what each mean is of
    weights = inside / inside.sum(1, keepdim=True)
    way = weights.to(path) @ (path - path[0])
    if how == "shrink":
        # a step's noise reaches every later checkpoint: the share of each mean that holds it, squared, summed over steps
        reached = weights.flip(1).cumsum(1).flip(1)[:, 1:]
        variance = reached.square().sum(1) * every * step_noise**2 / len(paths)  # (T+1,) per coordinate
        parts = []
        for part in way.split(list(sizes), 1):
            noise = variance.to(part) * part.shape[1]
            part = part * (1 - noise / part.square().sum(1).clamp_min(1e-30)).clamp_min(0)[:, None]
            for k in reversed(range(1, checkpoints - 1)):
                if not part[k].any():
                    part[k] = part[k + 1] * k / (k + 1)
            parts.append(part)
        way = torch.cat(parts, 1)
    return [path[0] + way]
