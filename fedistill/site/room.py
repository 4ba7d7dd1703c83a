"""Whether there is room for a site's work on its disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedistill.config import make_config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.experts.train import architectures_of
from fedistill.matching.problem import horizon
from fedistill.methods.registry import METHODS, method_of
from fedistill.site.describe import task_of
from fedistill.site.policy import Choice, Policy

LEAST = 10**9  # bytes
SPARE = 10**8  # of a job besides its experts


def free(work: Path) -> int:
    """Bytes that are free where `work` is, or will be. Raises `FedistillError` ("no-room") on less than a GB."""
    there = next(path for path in (work, *work.parents) if path.exists())
    found = shutil.disk_usage(there).free
    if found < LEAST:
        raise FedistillError("no-room", f"{work} has {found / 1e9:.1f} GB of free disk: a site needs 1 GB at least.")
    return found


def needed(policy: Policy, data: Dataset) -> int:
    """About how many bytes one job takes, of those methods that the policy allows, with the usual settings: its experts' ways."""
    allowed = policy.jobs.get("method")
    largest = 0
    for method in allowed.values if isinstance(allowed, Choice) else METHODS:
        config = make_config({"method": method}).resolved()
        found = method_of(config)
        if not found.experts:
            continue
        size = max(task_of(data).network(name, config).size for name in architectures_of(config))
        largest = max(largest, 4 * size * config.experts * (horizon(config, found) + 2))
    return largest + SPARE
