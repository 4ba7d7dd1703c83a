"""One site's work as a resumable job: experts, then distillation, in slices of a few seconds.

Everything lives in the site's work folder, keyed by the site's data and the settings that matter, so a killed process loses
at most one slice, and runs that differ only after the experts share them:

    <work>/<site>/ledger.db                              what was spent on this site's records, over all work
    <work>/<site>/<data and expert settings>/            experts or sketch, facts.json
    <work>/<site>/<data and expert settings>/<settings>/ state.safetensors, progress-<r>.json, round-<r>/ (the released set),
                                                         experts-<r>/ of a later round, where the method trains any
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

import fedistill
from fedistill.config import Config
from fedistill.data.dataset import Dataset, Split
from fedistill.data.public import NORMALISATION, normalise
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.experts.train import Task, architectures_of, load_trajectory, steps_done, train_experts
from fedistill.files import read_json, read_tensors, write_json, write_tensors
from fedistill.matching.distil import check_finite, check_skips, distil, finished, start, warnings
from fedistill.matching.overlap import overlap_limit
from fedistill.matching.problem import Bundle, Matching, Real, horizon, images_per_class, membership, one_each, prepare
from fedistill.matching.state import State, load_state, save_state
from fedistill.memory import one_thread
from fedistill.methods import sketch
from fedistill.methods.registry import Method, method_of
from fedistill.models.flat import device_of
from fedistill.models.loss import targets_of
from fedistill.privacy.learn import denoised, learn, learned, plan_nonce, private_counts, private_sketch, read_plan
from fedistill.privacy.ledger import Cap
from fedistill.privacy.rules import statement_of
from fedistill.site.describe import task_of
from fedistill.site.feasible import check_budget
from fedistill.site.folder import ledger_file, make_site_folder, site_folder
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set, save_set
from fedistill.wire import quantise

CURVE_EVERY = 10  # iterations per point of the loss curve
REAL_IMAGES = "These are real patients' images, selected for comparison: never send them."
PHASES = ("experts", "distill")
PRIVACY = (
    "No formal guarantee: it was made without differential privacy, and a distilled set can reveal facts about the images it "
    "was made from."
)


@dataclass(frozen=True)
class Progress:
    """How far a site is. `seconds` per phase; `curve` holds (iteration, matching loss) since the last slice."""

    phase: str
    step: int
    total: int
    loss: float | None = None
    eta: float | None = None
    seconds: dict[str, float] | None = None
    iterations: int = 0
    skipped: int = 0
    notes: tuple[str, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    done: bool = False


@one_thread()
def advance(
    config: Config,
    data: Dataset,
    site: str,
    work: Path,
    *,
    seconds: float,
    round: int = 1,
    context: SyntheticSet | None = None,
    run: str = "",
    cap: Cap | None = None,
) -> Progress:
    """Work for about `seconds`, then say how far it got; its phase is "ready" once the set of this round can be released.

    data: the site's own part. context: the merged set of the round before, of which the other sites' images are used.
    run: a word for the federated run; runs of several rounds must differ in it, since what a site does in a later round
    depends on the other sites of the run.
    cap: the most that may ever be spent on the site's records.
    Raises `FedistillError` where data or settings make the work impossible, or `cap` forbids it.
    """
    if cap is not None and config.privacy != "dp":
        raise FedistillError(
            "over-budget",
            f"privacy={config.privacy} has no epsilon, and this site has a cap of {cap.epsilon:g}: use dp.",
        )
    folders, method = _Folders.of(config, data, site, work, run), method_of(config)
    if folders.released(round):
        return Progress(**_tupled(read_json(folders.progress(round))))
    if data.kind == "multilabel":  # there is no budget per class that could be cut to what the site has
        check_budget(config, data)
    make_site_folder(work, site)
    began, until = time.monotonic(), time.monotonic() + seconds
    phases = PHASES if method.prepares else PHASES[1:]  # others may have trained experts here
    spent = {phase: read_json(file) for phase in phases if (file := folders.seconds(phase)).exists()}
    if not folders.ready(config):
        task, checkpoints, done, total = task_of(data), folders.checkpoints, 0, 0
        if config.privacy == "dp":
            done, total = learn(
                config,
                task,
                data.train,
                folders.experts,
                site=site,
                ledger=ledger_file(work, site),
                cap=cap,
                until=until,
            )
        elif method.experts:
            done, total = train_experts(
                config, task, data.train, folders.experts, site=site, checkpoints=checkpoints, until=until
            )
        if done == total:
            write_json(folders.facts, _facts(config, data, folders))
        if method.prepares:
            _spend(folders, spent, "experts", began)
        if done < total or time.monotonic() >= until:
            eta = spent.get("experts", 0.0) * (total - done) / max(done, 1)
            return Progress("experts", done, total, eta=eta, seconds=spent)
        began = time.monotonic()
    others = None if context is None else _of_others(context, site)
    if others is not None and method.meets_others:
        done, total = _meet(others, config, data, site, folders, round, until)
        if done < total or time.monotonic() >= until:
            _spend(folders, spent, "distill", began)  # these experts are of no use to other work
            return Progress("experts", done, total, seconds=spent)
    return _distil_slice(config, method, data, site, folders, spent, round, others, began, until)


def _of_others(merged: SyntheticSet, site: str) -> SyntheticSet | None:
    """The images of `merged` that other sites made; None where there are none."""
    pick = merged.site != (merged.sites.index(site) if site in merged.sites else -1)
    return merged.take(pick) if pick.any() else None


def _meet(
    others: SyntheticSet, config: Config, data: Dataset, site: str, folders: _Folders, round: int, until: float
) -> tuple[int, int]:
    """Train the experts of a later round on the site's images and on those that the other sites made. As `train_experts`."""
    images = torch.cat([data.train.images, others.in_bytes])
    labels = torch.cat([data.train.labels, others.labels_of_data])
    train = Split(images, labels, torch.zeros(len(images), dtype=torch.int64))
    word = f"{site} in round {round}"
    return train_experts(
        config, task_of(data), train, folders.met(round), site=word, checkpoints=folders.checkpoints, until=until
    )


def _distil_slice(
    config: Config,
    method: Method,
    data: Dataset,
    site: str,
    folders: _Folders,
    spent: dict[str, float],
    round: int,
    others: SyntheticSet | None,
    began: float,
    until: float,
) -> Progress:
    bundle = load_bundle(config, task_of(data), folders)
    real = None
    if config.privacy == "none" and (config.init == "real" or method.sees_images):
        real = Real(data.train.images, targets_of(data.train.labels, data.classes, data.kind), task_of(data))
    context = None
    if others is not None:
        device = device_of(config.device)
        context = (others.stored.to(device), others.labels.to(device))
        if method.meets_others:
            bundle = replace(bundle, trajectories=folders.trajectories(config, folders.met(round)))
    matching = prepare(config, method, bundle, real=real, context=context, round=round)
    made_of = folders.made_of(config)
    state = load_state(folders.state, device_of(config.device)) if folders.state.exists() else start(matching, site)
    if state.made_of != made_of:  # of noise that was drawn before: one set is made under one plan
        state = start(matching, site)
        state.made_of = made_of
    before, total = state.iteration, matching.goal
    distil(matching, state, until=until)
    check_finite(matching, state)
    save_state(state, folders.state)
    ready = finished(matching, state)
    if ready:
        check_skips(matching, state)
    _spend(folders, spent, "distill", began)
    distilling = spent["distill"]
    progress = Progress(
        phase="ready" if ready else "distill",
        step=total if ready else state.iteration,
        total=total,
        loss=_mean(state.losses[-CURVE_EVERY:]),
        eta=distilling * (total - state.iteration) / max(state.iteration, 1),
        seconds={"experts": spent.get("experts", 0.0), "distill": distilling},
        iterations=state.iteration,
        skipped=state.skipped,
        notes=(*bundle.notes(config), *warnings(matching, state)),
        curve=_curve(state.losses, before),
        done=ready,
    )
    if ready:
        write_json(folders.progress(round), progress.__dict__)
        save_set(quantise(_as_set(config, data, site, matching, state, folders)), folders.release(round))
    return progress


def released_set(
    config: Config, data: Dataset, site: str, work: Path, *, round: int = 1, run: str = ""
) -> SyntheticSet:
    """The set of a round that `advance` reported ready, exactly as it travels."""
    return load_set(_Folders.of(config, data, site, work, run).release(round))


def has_experts(config: Config, data: Dataset, site: str, work: Path) -> bool:
    """Whether `advance` has no more experts to train before it distils."""
    return _Folders.of(config, data, site, work, "").ready(config)


def expert_paths(config: Config, data: Dataset, site: str, work: Path) -> tuple[Tensor, ...]:
    """The trajectories `(T+1, P)` of the experts that `has_experts` says are there, as they were trained."""
    return _Folders.of(config, data, site, work, "").trajectories(config)


def load_bundle(config: Config, task: Task, folders: _Folders) -> Bundle:
    """What the distiller is given: of the site's images only what experts or a sketch, and the facts, left behind."""
    facts, method, sums = read_json(folders.facts), method_of(config), None
    paths = folders.trajectories(config)
    # the answers of an expert need no help: only its way does
    if config.privacy == "dp" and method.schedule is not None:
        paths = tuple(denoised(config, task, folders.experts, paths))
    if method.sketch:
        private = config.privacy == "dp"
        sums = private_sketch(folders.experts) if private else read_tensors(folders.sketch)[0]["sums"]
    return Bundle(
        task=task,
        trajectories=paths,
        counts=tuple(facts["counts"]),
        noisy=config.privacy == "dp",
        overlap_limits=tuple(tuple(row) for row in facts["overlap_limits"]),
        findings=tuple((tuple(row), n) for row, n in facts["findings"]),
        sketch=sums,
    )


def _facts(config: Config, data: Dataset, folders: _Folders) -> dict[str, Any]:
    """All that matching may know about the images besides the experts: class counts, limits of overlap, label vectors.

    In private work only what was paid for: noisy counts.
    """
    task, train, checkpoints = task_of(data), data.train, folders.checkpoints
    if config.privacy == "dp":
        return _private_facts(config, task, folders.experts) | {"plan": folders.made_of(config)}
    targets = targets_of(train.labels, task.classes, task.kind)
    if method_of(config).sketch:
        records = Records.of_images(len(train))
        write_tensors(folders.sketch, {"sums": sketch.sketch(config, task, train.images, targets, records)})
    facts: dict[str, Any] = {"counts": train.counts(task.classes), "overlap_limits": [], "findings": []}
    if task.kind == "multilabel":
        rows, counts = train.labels.unique(dim=0, return_counts=True)
        facts["findings"] = [[row, n] for row, n in zip(rows.tolist(), counts.tolist(), strict=True)]
    if not checkpoints:
        return facts
    net, device = task.network(architectures_of(config)[0], config), device_of(config.device)
    first = range(0, config.experts, len(architectures_of(config)))[:3]  # experts of the first architecture
    paths = [load_trajectory(folders.experts, e, checkpoints).to(device) for e in first]
    for stage in range(5):
        thetas = [p[stage * (len(p) - 1) // 4] for p in paths]
        row = []
        for members in membership(targets, task.kind).T:
            images = train.images[members > 0][:32]
            row.append(overlap_limit(net, thetas, normalise(images, data.modality).to(device)) if len(images) else 2.0)
        facts["overlap_limits"].append(row)
    return facts


def _private_facts(config: Config, task: Task, experts: Path) -> dict[str, Any]:
    counts = private_counts(config, experts)
    if not any(counts):
        raise FedistillError(
            "all-noise",
            f"No class is larger than the noise that epsilon={config.epsilon:g} takes: the site is too small.",
        )
    rows: list[tuple[list[int], int]] = []
    if task.kind == "multilabel":  # which findings occur together is private: one at a time, and none
        rows = [
            (row, images_per_class(config, task) * task.classes)
            for row, n in zip(one_each(task.classes), [*counts[: task.classes], 1], strict=True)
            if n
        ]
        counts = counts[: task.classes]
    return {"counts": counts, "overlap_limits": [], "findings": rows}


def _as_set(
    config: Config, data: Dataset, site: str, matching: Matching, state: State, folders: _Folders
) -> SyntheticSet:
    mean, std = NORMALISATION[data.modality]
    privacy = {"epsilon": None, "delta": None, "statement": REAL_IMAGES if matching.method.select else PRIVACY}
    if config.privacy == "dp":
        privacy = statement_of(config, read_plan(config, folders.experts))
    about = {
        "method": config.method,
        "init": config.init,
        "configuration": config.key("data", "experts", "distill"),
        "iterations": state.iteration,
        "skipped": state.skipped,
        "replaced_for_overlap": state.replaced,
        "versions": versions(),
        "privacy": privacy,
    }
    return SyntheticSet(
        images=matching.shown(state.images).cpu(),
        labels=matching.labels(state).cpu(),
        site=torch.zeros(len(state.images), dtype=torch.int64),
        sites=(site,),
        class_names=data.class_names,
        mean=mean,
        std=std,
        modality=data.modality,
        step_size=(float(state.step_size[0]),),
        manifest={site: about},
        kind=data.kind,
        scale=matching.scale,
    )


def versions() -> dict[str, str]:
    return {"fedistill": fedistill.__version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class _Folders:
    experts: Path
    name: str
    checkpoints: int  # of each expert that are used after the first; 0: the method has no use for experts
    sketched: bool

    @staticmethod
    def of(config: Config, data: Dataset, site: str, work: Path, run: str) -> _Folders:
        experts = site_folder(work, site) / f"{data.fingerprint_by(config.unit)}-{config.key('data', 'experts')}"
        method = method_of(config)
        checkpoints = horizon(config, method) if method.experts else 0
        name = config.key("distill") + (f"-{quote(run, safe='')}" if config.rounds > 1 else "")
        return _Folders(experts, name, checkpoints, method.sketch)

    def trajectories(self, config: Config, experts: Path | None = None) -> tuple[Tensor, ...]:
        """Those of the experts `(T+1, P)`, or of others in `experts`; none where the method has no use for experts."""
        n = config.experts if self.checkpoints else 0
        return tuple(load_trajectory(experts or self.experts, e, self.checkpoints) for e in range(n))

    def met(self, round: int) -> Path:
        """The experts of a later round, which learned from what the other sites made."""
        return self.experts / self.name / f"experts-{round}"

    @property
    def facts(self) -> Path:
        """Written when everything that the method is made of is there: a sketch, experts of so many checkpoints, or both."""
        return self.experts / f"facts-{'sketch-' if self.sketched else ''}{self.checkpoints}.json"

    def ready(self, config: Config) -> bool:
        """Whether the facts are there, and everything that they are said of: files can be removed, or be drawn anew."""
        if not self.facts.exists():
            return False
        if config.privacy == "dp":
            return learned(config, self.experts) and read_json(self.facts).get("plan") == self.made_of(config)
        steps, n = self.checkpoints * config.checkpoint_every, config.experts if self.checkpoints else 0
        trained = all(steps_done(self.experts, e) >= steps for e in range(n))
        return trained and (self.sketch.exists() or not self.sketched)

    def made_of(self, config: Config) -> str:
        return plan_nonce(config, self.experts) if config.privacy == "dp" else ""

    @property
    def sketch(self) -> Path:
        return self.experts / "sketch.safetensors"

    def seconds(self, phase: str) -> Path:
        """A file per phase: jobs that share the experts may distil at the same time."""
        return (self.experts if phase == "experts" else self.experts / self.name) / f"seconds-{phase}.json"

    @property
    def state(self) -> Path:
        return self.experts / self.name / "state.safetensors"

    def progress(self, round: int) -> Path:
        return self.experts / self.name / f"progress-{round}.json"

    def release(self, round: int) -> Path:
        return self.experts / self.name / f"round-{round}"

    def released(self, round: int) -> bool:
        """Whether the set of a round is there, with all that is said of it."""
        folder = self.release(round)
        return all(p.exists() for p in (folder / "manifest.json", folder / "set.safetensors", self.progress(round)))


def _spend(folders: _Folders, spent: dict[str, float], phase: str, began: float) -> None:
    spent[phase] = spent.get(phase, 0.0) + time.monotonic() - began
    write_json(folders.seconds(phase), spent[phase])


def _curve(losses: list[float], before: int) -> tuple[tuple[int, float], ...]:
    blocks = range(before // CURVE_EVERY * CURVE_EVERY, len(losses) - CURVE_EVERY + 1, CURVE_EVERY)
    points = ((i + CURVE_EVERY, _mean(losses[i : i + CURVE_EVERY])) for i in blocks)
    return tuple((k, value) for k, value in points if value is not None)


def _mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


def _tupled(stored: dict[str, Any]) -> dict[str, Any]:
    return stored | {"notes": tuple(stored["notes"]), "curve": tuple((int(k), float(v)) for k, v in stored["curve"])}
