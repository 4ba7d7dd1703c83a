"""The indicator: what random real images reach in seconds, and so what distillation can be expected to reach in hours.

The protocol is the one of every report (`evaluation.fit`), made cheap: batches of 16, two learning rates, and everything is
scored on validation images. The test split is put away before anything else is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from joblib import Parallel, delayed

from fedistill.config import Config, recommended_method
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import partition
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures, draw_of_each
from fedistill.evaluation.cautions import Caution, cautions_of
from fedistill.evaluation.fit import fit, of_split, predict
from fedistill.evaluation.metrics import Spread, noise, score, spread_of
from fedistill.evaluation.predictor import Cell, Prediction, Predictor, load_predictor, unseen
from fedistill.evaluation.predictor import predict as predict_distilled
from fedistill.experts.train import Task
from fedistill.memory import one_thread
from fedistill.seeding import generator
from fedistill.site.describe import task_of

FORMAT = "fedistill-probe/1"
IPCS = (1, 2, 5, 10, 20, 50)
# Measured on wbc_sites and ham10000_sites: small batches get further in the same time than fewer steps of larger ones, and
# all data needs more steps than a subset to come near what the full protocol reaches.
BATCH = 16
STEPS = 300
STEPS_ON_ALL = 600
LEARNING_RATES = (0.003, 0.01)
DRAWS = 3
VALIDATION_SHARE = 0.2  # of the training images, where the data have no validation of their own
VALIDATION_LIMIT = 1000  # images: scoring more takes longer than training

Notify = Callable[[int, int], None]  # (networks trained, networks in total)


@dataclass(frozen=True)
class Measured:
    """Scores on validation images of networks trained on `images` real images each."""

    images: int
    learning_rate: float
    balanced_accuracy: Spread
    auc: Spread


@dataclass(frozen=True)
class Budget:
    """`ipc` images per class: what random real ones reach, and what `method` is predicted to make of the same budget."""

    ipc: int
    share: float
    random: Measured
    method: str
    predicted: Prediction | None
    extrapolated: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteFacts:
    """A site's training images; `smallest` counts those of `smallest_class`, the rarest class that it has."""

    name: str
    images: int
    smallest_class: str
    smallest: int
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What `probe` found out. `train` and `validation_images` are counts per class.

    validation: where the validation images come from, "val" or, for want of them, "train".
    """

    data: str
    modality: str
    class_names: tuple[str, ...]
    train: tuple[int, ...]
    validation: str
    validation_images: tuple[int, ...]
    model: str
    seed: int
    whole: Measured
    budgets: tuple[Budget, ...]
    left_out: tuple[int, ...]
    recommended_ipc: int | None
    predictor: Predictor | None
    sites: tuple[SiteFacts, ...]
    warnings: tuple[Caution, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as docs/probe.md describes them."""
        return {"format": FORMAT} | asdict(self)


@one_thread()
def probe(config: Config, data: Dataset, ipcs: Sequence[int] = IPCS, *, on_progress: Notify | None = None) -> Probe:
    """Measure random subsets of `ipcs` images per class and all data, and predict what distillation would reach.

    config: of the settings for evaluation, `eval_models` (the first), `eval_steps` and `eval_nets` (draws per budget) are used,
    where 0 means the probe's own. Raises `FedistillError` on budgets that make no sense, and on data too small to validate on.
    """
    began = time.monotonic()
    if data.kind == "multilabel":
        raise FedistillError(
            "not-for-findings", f"{data.name} has several findings per image: probe takes one label per image."
        )
    data = _without_test(data)
    todo, left_out = _possible(ipcs, data)
    model, task = architectures(config)[0], task_of(data)
    task.network(model, config), task.operations(config)  # a wrong setting is an error before the work, not in it
    sites = _sites(config, data)
    train, val, source = _validation(data, config.seed)
    draws, steps = config.eval_nets or DRAWS, config.eval_steps or STEPS
    if draws < 2:
        raise FedistillError("bad-value", f"eval_nets={draws} is too small for a probe: it needs two draws or more.")
    seen = config.eval_steps or STEPS_ON_ALL
    plans = [
        *(_Plan(replace(config, eval_steps=steps, eval_batch=BATCH), ipc, draws) for ipc in todo),
        _Plan(replace(config, eval_steps=seen, eval_batch=BATCH), 0, max(2, draws // 2)),
    ]
    *subsets, whole = _measure(plans, task, model, train, val, on_progress or (lambda done, total: None))

    predictor = load_predictor()
    found = Probe(
        data=data.name,
        modality=data.modality,
        class_names=data.class_names,
        train=tuple(data.train.counts(data.classes)),
        validation=source,
        validation_images=tuple(val.counts(data.classes)),
        model=model,
        seed=config.seed,
        whole=whole,
        budgets=tuple(
            _budget(predictor, data.name, model, ipc, random, whole) for ipc, random in zip(todo, subsets, strict=True)
        ),
        left_out=left_out,
        recommended_ipc=None,
        predictor=predictor,
        sites=sites,
        warnings=(),
        seconds=0.0,
    )
    found = replace(found, recommended_ipc=recommend(found.budgets))
    return replace(found, warnings=tuple(cautions_of(found)), seconds=time.monotonic() - began)


def recommend(budgets: Sequence[Budget]) -> int | None:
    """The smallest IPC whose predicted score cannot be told from the best predicted one; None without predictions."""
    predicted = [(b.ipc, b.predicted.mean, b.random.balanced_accuracy) for b in budgets if b.predicted]
    if not predicted:
        return None
    _, best, spread = max(predicted, key=lambda p: p[1])
    return min(ipc for ipc, mean, other in predicted if best - mean <= noise(spread, other))


def _budget(predictor: Predictor | None, name: str, model: str, ipc: int, random: Measured, whole: Measured) -> Budget:
    method, share = recommended_method(ipc), random.images / whole.images
    budget = Budget(ipc, share, random, method, None)
    if predictor is None or predictor.model != model or method not in predictor.methods:
        return budget
    cell = Cell(name, ipc, random.balanced_accuracy.mean, whole.balanced_accuracy.mean, share)
    predicted = predict_distilled(predictor, cell, noise=random.balanced_accuracy.error)
    return replace(budget, predicted=predicted, extrapolated=tuple(unseen(predictor, cell)))


def _without_test(data: Dataset) -> Dataset:
    """The same data with a test split of the same length that holds nothing: dividing data over sites asks for the length."""
    n = len(data.test)
    blank = torch.zeros(n, dtype=torch.int64)
    return replace(data, test=Split(torch.zeros(1, dtype=torch.uint8).expand(n, *data.geometry), blank, blank))


def _possible(ipcs: Sequence[int], data: Dataset) -> tuple[list[int], tuple[int, ...]]:
    """The budgets in order, and those that ask for more images than there are (which distillation refuses)."""
    wanted = sorted(set(ipcs))
    if not wanted or wanted[0] < 1:
        raise FedistillError(
            "bad-value", f"ipc={','.join(map(str, ipcs))} is no list of budgets: write for example 1,5,10."
        )
    most = len(data.train) // data.classes
    if wanted[0] > most:
        raise FedistillError(
            "budget", f"ipc={wanted[0]} asks for more images than {data.name} has: use ipc={most} or less."
        )
    return [ipc for ipc in wanted if ipc <= most], tuple(ipc for ipc in wanted if ipc > most)


def _validation(data: Dataset, seed: int) -> tuple[Split, Split, str]:
    """Images to train on, at most `VALIDATION_LIMIT` to score on (every class in proportion), and where these come from."""
    rng = generator(seed, "probe", "validation")
    counts = data.val.counts(data.classes)
    if sum(n > 0 for n in counts) >= 2:
        share = min(1.0, VALIDATION_LIMIT / len(data.val))
        index = draw_of_each(data.val.labels, [round(n * share) or min(n, 1) for n in counts], rng)
        return data.train, data.val.take(index), "val"
    counts = data.train.counts(data.classes)
    share = min(VALIDATION_SHARE, VALIDATION_LIMIT / len(data.train))
    aside = draw_of_each(data.train.labels, [max(round(n * share), 1) if n > 1 else 0 for n in counts], rng)
    rest = torch.ones(len(data.train), dtype=torch.bool)
    rest[aside] = False
    val = data.train.take(aside)
    if len(val.labels.unique()) < 2:
        raise FedistillError(
            "no-validation", f"{data.name} has too few images to set some aside for validation: add a validation split."
        )
    return data.train.take(torch.nonzero(rest).flatten()), val, "train"


def _sites(config: Config, data: Dataset) -> tuple[SiteFacts, ...]:
    """The sites that the settings ask for or the data have; none for one body of data."""
    if config.partition == "auto" and config.sites < 2 and len(data.site_names) < 2:
        return ()
    parts = partition(data, config)
    facts = []
    for place, name in enumerate(parts.names):
        counts = parts.at(data, place).train.counts(data.classes)
        rarest = min((c for c, n in enumerate(counts) if n), key=counts.__getitem__)
        missing = tuple(data.class_names[c] for c, n in enumerate(counts) if n == 0)
        facts.append(SiteFacts(name, sum(counts), data.class_names[rarest], counts[rarest], missing))
    return tuple(facts)


@dataclass(frozen=True)
class _Plan:
    """Networks to train: on `draws` random subsets of `ipc` images per class, or on all images where `ipc` is 0."""

    config: Config
    ipc: int
    draws: int

    def material(self, train: Split, classes: int, n: int) -> Split:
        """Draw number `n`. Of all images only as many are taken as the steps will use."""
        rng = generator(self.config.seed, "probe", self.ipc, n)
        if self.ipc:
            return train.take(draw_of_each(train.labels, [self.ipc] * classes, rng))
        return train.take(torch.randperm(len(train), generator=rng)[: self.config.eval_steps * BATCH])


def _measure(
    plans: Sequence[_Plan], task: Task, model: str, train: Split, val: Split, notify: Notify
) -> list[Measured]:
    """Draw 0 of every plan chooses its learning rate and is not scored again: the scores are of draws that had no say."""
    total = sum(len(LEARNING_RATES) + plan.draws for plan in plans)
    done = 0

    def run(jobs: list[tuple[_Plan, int, float]]) -> list[tuple[float, float]]:
        nonlocal done
        results = []
        calls = (
            delayed(_train_and_score)(plan.config, task, model, plan.material(train, task.classes, n), val, rate, n)
            for plan, n, rate in jobs
        )
        workers = plans[0].config.worker_count()
        for result in Parallel(n_jobs=workers, backend="loky", return_as="generator")(calls):
            results.append(result)
            done += 1
            notify(done, total)
        return results

    searched = iter(run([(plan, 0, rate) for plan in plans for rate in LEARNING_RATES]))
    rates = [max((next(searched), rate) for rate in LEARNING_RATES)[1] for _ in plans]
    jobs = [(plan, n, rate) for plan, rate in zip(plans, rates, strict=True) for n in range(1, plan.draws + 1)]
    scored = iter(run(jobs))
    measured = []
    for plan, rate in zip(plans, rates, strict=True):
        balanced, auc = zip(*(next(scored) for _ in range(plan.draws)), strict=True)
        images = sum(min(n, plan.ipc) for n in train.counts(task.classes)) if plan.ipc else len(train)
        measured.append(Measured(images, rate, spread_of(list(balanced)), spread_of(list(auc))))
    return measured


@one_thread()
def _train_and_score(
    config: Config, task: Task, model: str, material: Split, val: Split, rate: float, seed: int
) -> tuple[float, float]:
    """(balanced accuracy, AUC) of one fresh network."""
    theta = fit(config, task, model, of_split(material, task), lr=rate, seed=config.seed + 1000 * seed)
    figures = score(predict(task.network(model, config), theta, val.images, task), val.labels, task.kind)
    return figures["balanced_accuracy"], figures["auc"]
