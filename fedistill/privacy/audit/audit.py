"""The audit of a configuration at one site: rehearsals with canaries, attacks, a bound, and a control that must be caught.

Everything lies in the site's own folder, readable by its owner only; a killed audit goes on where it stopped:

    <work>/<data, settings and canaries>/<arm>/run-000/   inclusion.json (secret), set/, views.json
    <work>/copies.png                                     patients' images: never leaves the site
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.api import distill_site
from fedistill.config import Config
from fedistill.data.dataset import Dataset, Split
from fedistill.errors import FedistillError
from fedistill.files import read_json
from fedistill.memory import one_thread
from fedistill.privacy.accounting import auto_delta
from fedistill.privacy.audit.attack import VIEWS, guesses, offline, online, views
from fedistill.privacy.audit.canaries import Canaries, choose, toss, with_canaries, write_secret
from fedistill.privacy.audit.copies import FEWEST, PICTURE_NOTE, copies
from fedistill.privacy.audit.onerun import CONFIDENCE, ceiling, epsilon_lower
from fedistill.privacy.audit.rates import FALSE_ALARMS, rates
from fedistill.privacy.plan import records_of
from fedistill.processes import alone
from fedistill.site.describe import task_of
from fedistill.site.job import Progress
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set, save_set

ARMS = ("configured", "broken")
FEWEST_RUNS = 4
ATTACKS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {  # name: (view, calibration)
    "lira-online": ("confidence", online),
    "lira-offline": ("confidence", offline),
    "nearest": ("distance", offline),
    "correlation": ("correlation", offline),
}
# The attacks that the bound rests on, chosen before any audit was run; they share the confidence (Bonferroni).
BOUND = ("lira-offline", "nearest")


@dataclass(frozen=True)
class Step:
    """Where an audit is: rehearsal `run` of `runs` of an arm ("configured" or "broken"), and how far its job is."""

    arm: str
    run: int
    runs: int
    job: Progress | None = None


@dataclass(frozen=True)
class _Arm:
    """Coins `(K, m)` bool, what each view saw `(K, m)`, the set of the first run, and the seconds of all runs."""

    inside: Tensor
    seen: dict[str, Tensor]
    first: SyntheticSet
    seconds: float


def rehearse(
    config: Config, data: Dataset, name: str, folder: Path, on_progress: Callable[[Progress], None] | None = None
) -> SyntheticSet:
    """What real work does, on data with canaries; nothing of it is released, so nothing is booked."""
    return distill_site(config, data, name, folder, on_progress=on_progress)


@one_thread()
def audit(
    config: Config,
    data: Dataset,
    site: str,
    work: Path,
    *,
    canaries: int = 64,
    shadows: int = 8,
    source: str = "own",
    on_progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Attack what `config` would release of `data`, and say what the attack shows and what it could have shown.

    canaries: m images with wrong labels, each in a rehearsal by a coin of its own. shadows: K rehearsals, each the target once
    and a shadow of the others. source: of the canaries, see `canaries.choose`.
    The bound rests on the first rehearsal alone, on a third of its canaries guessed "in" and a third "out", and on the attacks in
    `BOUND`; a bound of the best run of several would need a correction. It speaks of one image added or removed.
    Returns a JSON-compatible result; `contradicts` says that the bound is above the claim, `power` that the control (as many
    random real training images as the budget can hold) was caught by the same attack. Raises `FedistillError` on
    settings that cannot work, and ("busy") where another audit works in the same folder.
    """
    if shadows < FEWEST_RUNS:
        raise FedistillError("few-shadows", f"shadows={shadows} is too few to compare: use {FEWEST_RUNS} or more.")
    config = config.resolved()
    chosen = choose(data, canaries, source, config.seed)
    key = f"{data.fingerprint_by(config.unit)}-{config.key('data', 'experts', 'distill', 'eval')}-{source}-{canaries}"
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = work / key
    folder.mkdir(exist_ok=True, mode=0o700)
    configs = {"configured": config, "broken": broken(config, data, canaries)}
    with alone(folder):
        arms = {
            arm: _rehearse_all(configs[arm], data, chosen, site, folder / arm, shadows, arm, on_progress)
            for arm in ARMS
        }
        began, shown = time.monotonic(), arms["configured"]
        copied = copies(
            config,
            task_of(data),
            shown.first,
            with_canaries(data, chosen, shown.inside[0]).train,
            _unseen(data, chosen, shown.inside[0]),
            folder=work,
        )
    claimed, delta = claim_of(config, records_of(data.train, config.unit))
    result = judged(shown, delta) | {"claimed_epsilon": claimed, "confidence": CONFIDENCE, "delta": delta}
    result["contradicts"] = claimed is not None and result["epsilon_lower"] > claimed
    control = judged(arms["broken"], delta)
    result["broken_arm"] = control | {"method": configs["broken"].method, "ipc": configs["broken"].ipc}
    result["broken_arm"]["caught"] = result["power"] = control["epsilon_lower"] > 0
    seconds = sum(arm.seconds for arm in arms.values()) + time.monotonic() - began
    about = {"site": site, "method": config.method, "canary_source": source, "canaries": canaries, "shadows": shadows}
    result |= about | {"copies": copied, "seconds": round(seconds, 1)}
    return result | {"notes": _notes(result, int((~shown.inside).sum()))}


def claim_of(config: Config, records: int) -> tuple[float | None, float]:
    """The epsilon that the configuration promises (None: no promise), and the delta at which it is attacked."""
    return (config.epsilon if config.privacy == "dp" else None), config.delta or auto_delta(records)


def broken(config: Config, data: Dataset, canaries: int) -> Config:
    """The control: random real images, as many as there are room for, without noise. An attack that misses it sees nothing."""
    values = config.to_dict() | {"method": "random", "ipc": (len(data.train) - canaries) // data.classes}
    values |= dict.fromkeys(("labels", "mask", "overlap"), "auto") | {"budget": "equal", "formation": 1}
    values |= {"privacy": "none", "epsilon": 0.0, "delta": 0.0, "eval_epsilon": 0.0, "unit": "image"}
    return Config(**values)


def judged(arm: _Arm, delta: float) -> dict[str, Any]:
    """The bound with its ceiling, and the rates of every attack on an arm."""
    canaries = arm.inside.shape[1]
    each, confidence = canaries // 3, 1 - (1 - CONFIDENCE) / len(BOUND)
    scores = {name: calibrate(arm.seen[view], arm.inside) for name, (view, calibrate) in ATTACKS.items()}
    bounds: list[dict[str, Any]] = []
    for name in BOUND:
        said_in, said_out = guesses(scores[name][0], each)
        right = int(arm.inside[0, said_in].sum() + (~arm.inside[0, said_out]).sum())
        lower = epsilon_lower(canaries, 2 * each, right, delta=delta, confidence=confidence)
        bounds.append({"attack": name, "guesses": 2 * each, "right": right, "epsilon_lower": lower})
    return {
        "epsilon_lower": max(bound["epsilon_lower"] for bound in bounds),
        "ceiling": ceiling(2 * each, canaries=canaries, delta=delta, confidence=confidence),
        "bounds": bounds,
        "attacks": [rates(name, scored, arm.inside) for name, scored in scores.items()],
    }


def _rehearse_all(
    config: Config,
    data: Dataset,
    canaries: Canaries,
    site: str,
    folder: Path,
    runs: int,
    arm: str,
    on_progress: Callable[[Step], None] | None,
) -> _Arm:
    inside, seen, seconds = [], [], 0.0
    for k in range(runs):
        place = folder / f"run-{k:03d}"
        inside.append(toss(place / "inclusion.json", len(canaries)))
        if on_progress:
            on_progress(Step(arm, k, runs))
        told = None if on_progress is None else _Told(on_progress, Step(arm, k, runs))
        outcome = _rehearse_one(config, data, canaries, inside[-1], site, place, told)
        seen.append(outcome["views"])
        seconds += outcome["seconds"]
    if on_progress:
        on_progress(Step(arm, runs, runs))
    stacked = {name: torch.tensor([one[name] for one in seen], dtype=torch.float64) for name in VIEWS}
    return _Arm(torch.stack(inside), stacked, load_set(folder / "run-000" / "set"), seconds)


def _rehearse_one(
    config: Config,
    data: Dataset,
    canaries: Canaries,
    inside: Tensor,
    site: str,
    place: Path,
    told: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """What the views saw of one rehearsal, from its file if it was done before. Its experts are removed: they are large."""
    outcome, made_at, job = place / "views.json", place / "set", place / "work"
    if not outcome.exists():
        began = time.monotonic()
        if not (made_at / "manifest.json").exists():
            save_set(rehearse(config, with_canaries(data, canaries, inside), site, job, told), made_at)
        found = views(config, task_of(data), load_set(made_at), canaries)
        about = {
            "views": {name: value.tolist() for name, value in found.items()},
            "seconds": time.monotonic() - began,
        }
        write_secret(outcome, json.dumps(about))
    shutil.rmtree(job, ignore_errors=True)
    return dict(read_json(outcome))


@dataclass(frozen=True)
class _Told:
    listener: Callable[[Step], None]
    step: Step

    def __call__(self, job: Progress) -> None:
        self.listener(replace(self.step, job=job))


def _unseen(data: Dataset, canaries: Canaries, inside: Tensor) -> Split:
    """The site's images that the rehearsal did not train on: validation, test, and its own canaries that were left out."""
    left_out = data.train.take(canaries.taken[~inside] if len(canaries.taken) else canaries.taken)
    parts = (data.val, data.test, left_out)
    return Split(*(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "site")))


def _notes(result: dict[str, Any], absent: int) -> list[str]:
    """What a reader has to know to read the result rightly."""
    top, claimed, copied = result["ceiling"], result["claimed_epsilon"], result["copies"]
    notes = [
        f"This audit could not have shown more than epsilon {top:.2f}: a low bound proves little.",
        "The unit is one image, added or removed. Intervals take thresholds as given and pairs as independent.",
    ]
    if claimed is None:
        notes.append(
            "No privacy is claimed, so there is nothing to contradict; the bound says how much leaks at least."
        )
    elif top <= claimed:
        notes.append(f"It could not have contradicted the claim of {claimed:g}: that takes more canaries.")
    if not result["power"]:
        notes.append("The control was not caught, so this audit has no power: use more canaries or shadows.")
    few = [f"{100 * fpr:g} %" for fpr in FALSE_ALARMS if fpr * absent < 1]
    if few:
        notes.append(f"With {absent} absences, {' and '.join(few)} false alarms means none at all.")
    if copied["exact"]:
        notes.append(f"{copied['exact']} of {copied['images']} synthetic images are exact copies of training images.")
    elif copied["red_flag"]:
        notes.append("Synthetic images lie nearer to training images than to images that they were not made from.")
    if copied["compared"] < FEWEST:
        notes.append("Too few images were held out to compare the set with: only exact copies were counted.")
    if result["canary_source"] == "own":
        notes.append(f"Rehearsals do without the true labels of {result['canaries']} images, which are the canaries.")
    return [*notes, PICTURE_NOTE]
