"""Counts of a model's right and wrong answers on a site's held-out images, with noise that is paid for.

The counts of M models on one split are one Gaussian mechanism over the split's records. A record adds 1 to one cell of every
model's table (of K tables per model where an image may have several findings), so that it changes all of them together by at
most sqrt(M), or sqrt(M K), in L2 norm. With unit=patient a patient's images share that 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import confusion_at, fitting_network
from fedistill.evaluation.metrics import counts_shape
from fedistill.experts.train import Task
from fedistill.files import read_json, write_once
from fedistill.privacy.accounting import Mechanism, auto_delta, calibrate
from fedistill.privacy.ledger import Cap, Ledger
from fedistill.privacy.noise import noisy
from fedistill.privacy.once import begin, drop, may_have_been_used, nonce_of, use
from fedistill.privacy.plan import records_by_unit
from fedistill.processes import alone
from fedistill.site.describe import task_of
from fedistill.site.folder import ledger_file, make_site_folder


def private_answers(
    config: Config,
    data: Dataset,
    site: str,
    work: Path,
    models: Mapping[str, Tensor],
    split: str,
    *,
    cap: Cap | None = None,
) -> dict[str, Any]:
    """Noisy counts (`evaluation.metrics`) of each model's answers on one split, as nested lists of whole numbers from 0.

    models: parameters `(P,)` by "architecture" or "architecture@anything". They are paid for, by `config.eval_epsilon`, before
    an image is read. Each split has an account of its own (within one state of the data, people in one split are in no other),
    and `cap` is over all of them: a split that is cut anew when data grow has other people in it. The same question is
    answered from what was stored the first time, and costs nothing more; where that is gone, it is another spend.
    Raises `FedistillError` where nothing may be spent, or more than `cap` has left, and on models that do not fit.
    """
    if not config.eval_epsilon:
        raise FedistillError("no-budget", "eval_epsilon=0 buys no answers on private images.")
    task = task_of(data)
    for name, theta in models.items():
        fitting_network(config, task, _architecture(name), theta)
    records = records_by_unit(data.splits[split], config.unit)
    if not models or not len(records):  # both are public
        return {name: torch.zeros(counts_shape(task.classes, task.kind), dtype=torch.int64).tolist() for name in models}
    key = _key(config, data, models, split)
    folder = make_site_folder(work, site) / "answers"
    file, plan = folder / f"{key}.json", folder / f"{key}.plan.json"
    with alone(folder, wait=True):
        if not file.exists():
            if may_have_been_used(plan, file):
                drop(plan, [])
            if not plan.exists():
                begin(plan, {})
            delta = auto_delta(len(records))
            mechanism = answers_mechanism(config.eval_epsilon, delta, task, len(models))
            Ledger(ledger_file(work, site)).spend(
                key=f"answers/{key}/{nonce_of(plan)}",
                data=f"{site}/{split}",
                unit=config.unit,
                what="answers",
                delta=delta,
                mechanisms=[mechanism],
                cap=cap,
            )
            write_once(file, json.dumps(_told(config, data, models, split, records, mechanism)).encode())
        use(plan, file)
        # Of two processes that were asked the same where there are no locks, the first one's noise is what both send.
        return dict(read_json(file))


def _told(
    config: Config, data: Dataset, models: Mapping[str, Tensor], split: str, records: Records, mechanism: Mechanism
) -> dict[str, Any]:
    names = sorted(models)
    exact = [confusion_at(config, data, _architecture(n), models[n], split, records.share) for n in names]
    counts = noisy(torch.stack(exact), mechanism).round().clamp_min(0).long()
    return dict(zip(names, counts.tolist(), strict=True))


def answers_mechanism(epsilon: float, delta: float, task: Task, models: int) -> Mechanism:
    """The noise of the tables of so many models, all of which together cost `epsilon`."""
    tables = models * (task.classes if task.kind == "multilabel" else 1)
    sigma = calibrate(epsilon, delta, sample_rate=1.0, steps=1)
    return Mechanism(name="answers", sample_rate=1.0, noise_multiplier=sigma, steps=1, clip_norm=math.sqrt(tables))


def _architecture(name: str) -> str:
    return name.partition("@")[0]


def _key(config: Config, data: Dataset, models: Mapping[str, Tensor], split: str) -> str:
    """One word for one question."""
    data_word = data.fingerprint_by(config.unit)
    about = (data_word, split, config.unit, config.eval_epsilon, config.width, config.depth, sorted(models))
    digest = hashlib.sha256(repr(about).encode())
    for name in sorted(models):
        digest.update(models[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
