"""What a poisoned set costs, and what a robust merge saves: `python simulations/benchmarks/poison.py damage|alarms`.

damage: real site sets (preset quick, method cf, 10 images per class) of which one is replaced by what an attacker would send
    and `check_set` lets pass; global models trained on all sets, on those of a robust merge by statistics alone and with
    validation images, and without the attacker. Small networks (width 16, 60 steps, three learning rates): compare, do not quote.
alarms: how often honest sites are called suspect by the statistics, and flipped labels found, on random real images.

The limits in `fedistill.synthetic.suspect` were chosen on seeds from 100 on; `damage` reports seeds from 0 on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedistill.api import distill_site
from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import partition
from fedistill.data.public import NORMALISATION, normalise
from fedistill.data.sources import load_data
from fedistill.evaluation.arms import draw_of_each
from fedistill.evaluation.fit import Material, choose_and_test, fit_all, predict
from fedistill.matching.problem import budget_of
from fedistill.memory import one_thread
from fedistill.models.loss import targets_of
from fedistill.seeding import generator
from fedistill.site.describe import task_of
from fedistill.synthetic.check import check_set
from fedistill.synthetic.merge import merge
from fedistill.synthetic.set import SyntheticSet, one_hot
from fedistill.synthetic.suspect import Judgement, influences_of, judge, select
from fedistill.wire import quantise

DATA: dict[str, dict[str, Any]] = {
    "wbc": {"data": "wbc_sites.npz", "partition": "site", "modality": "microscopy"},
    "pneumonia": {"data": "pneumoniamnist.npz", "partition": "dirichlet", "sites": 4, "alpha": 0.3},
    "ham": {"data": "ham10000_sites.npz", "partition": "site"},
    "cxr": {"data": "cxr_sites.npz", "partition": "site"},
}
DAMAGED = ("wbc", "pneumonia")
SMALL = {"width": 16, "eval_steps": 60, "eval_models": "convnet"}  # the global models
RATES = (0.003, 0.01, 0.03)
TARGET = 0  # the class that an attacker favours
COLUMNS = (
    "data", "attack", "seed", "site", "merge", "left_out", "balanced_accuracy", "auc", "attack_success", "attacker_flagged",
    "honest_flagged", "gain_without", "gain_error",
)  # fmt: skip
Attack = Callable[[SyntheticSet, torch.Generator], SyntheticSet]


def flipped(own: SyntheticSet, rng: torch.Generator) -> SyntheticSet:
    """Every label is the next class; the attacker declares its images per class likewise."""
    return dataclasses.replace(own, labels=own.labels.roll(1, 1))


def triggered(own: SyntheticSet, rng: torch.Generator) -> SyntheticSet:
    """Half of the images get a patch in a corner and the target label; all labels are a little soft, so no class has a budget."""
    chosen = torch.randperm(len(own), generator=rng)[: len(own) // 2]
    images, labels = own.images.clone(), own.hard_labels.clone()
    images[chosen] = stamped(images[chosen], (0 - own.mean) / own.std, (1 - own.mean) / own.std)
    labels[chosen] = TARGET
    return dataclasses.replace(own, images=images, labels=_soft(labels, own.labels.shape[1], 0.95))


def dominated(own: SyntheticSet, rng: torch.Generator) -> SyntheticSet:
    """Every image is said to be of the target class, softly."""
    labels = torch.full((len(own),), TARGET)
    return dataclasses.replace(own, labels=_soft(labels, own.labels.shape[1], 0.9))


def copied(own: SyntheticSet, rng: torch.Generator) -> SyntheticSet:
    """One image with a little noise under all labels."""
    chosen = own.images[int(torch.randint(len(own), (1,), generator=rng))]
    return dataclasses.replace(own, images=chosen + 0.05 * torch.randn(own.images.shape, generator=rng))


ATTACKS: dict[str, Attack] = {"flip": flipped, "trigger": triggered, "dominate": dominated, "copies": copied}


def stamped(images: Tensor, black: float, white: float) -> Tensor:
    """A chequered patch, a seventh of an image's side, in the last corner."""
    side = images.shape[-1] // 7
    squares = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    images = images.clone()
    images[..., -side:, -side:] = torch.where(squares == 0, black, white).to(images.dtype)
    return images


def _soft(labels: Tensor, classes: int, share: float) -> Tensor:
    return one_hot(labels, classes) * (share - (1 - share) / (classes - 1)) + (1 - share) / (classes - 1)


def federation(name: str, root: Path, seed: int) -> tuple[Config, Dataset, list[Dataset]]:
    settings = DATA[name] | {
        "data": str(root / str(DATA[name]["data"])),
        "seed": seed,
        "workers": 1,
        "preset": "quick",
        "method": "cf",
    }
    config = make_config(settings).resolved()
    data = load_data(config)
    parts = partition(data, config)
    return config, data, [parts.at(data, place) for place in range(len(parts))]


def damage(name: str, root: Path, work: Path, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of one seed. The attacker is another site in every seed, of those with five images of two classes."""
    config, data, sites = federation(name, root, seed)
    honest = [distill_site(config, site, site.name, work) for site in sites]
    able = [i for i, one in enumerate(honest) if (torch.bincount(one.hard_labels) >= 5).sum() > 1]
    place, task, known = able[seed % len(able)], task_of(data), dict[tuple[str, ...], dict[str, Any]]()
    config = dataclasses.replace(config, **SMALL)  # type: ignore[arg-type]
    patched = stamped(data.test.images, 0, 255)[data.test.labels != TARGET]

    def figures(attack: str, sets: Sequence[SyntheticSet]) -> dict[str, Any]:
        there = honest[place].sites[0] in {one.sites[0] for one in sets}
        key = (attack if there else "", *(one.sites[0] for one in sets))
        if key not in known:
            union = merge(sets)
            train = partial(fit_all, config, task, "convnet", Material(union.images, union.labels))
            done = choose_and_test(config, task, "convnet", train, data.val, data.test, rates=RATES, nets=1)
            said = predict(task.network("convnet", config), done.thetas[0], patched, task).argmax(1)
            known[key] = {k: done.scores[0][k] for k in ("balanced_accuracy", "auc")} | {
                "attack_success": float((said == TARGET).float().mean())
            }
        return known[key]

    for attack, change in {"none": None, **ATTACKS}.items():
        sets, counts = list(honest), [site.train.counts(data.classes) for site in sites]
        if change is not None:
            sets[place] = quantise(change(honest[place], generator(seed, "poison", attack)))
            if attack == "flip":
                counts[place] = torch.tensor(counts[place]).roll(1).tolist()
        for one, declared in zip(sets, counts, strict=True):
            check_set(one, site=one.sites[0], task=task, ipc=config.ipc, counts=declared, policy=config.budget)
        budgets = {one.sites[0]: budget_of(c, config.ipc, config.budget) for one, c in zip(sets, counts, strict=True)}
        seen = influences_of(config, task, sets, data.val)
        rivals = [one for i, one in enumerate(sets) if i != place]
        choices = {
            "all": (sets, [Judgement(site=one.sites[0]) for one in sets]),
            "statistics": _robust(sets, judge(sets, budgets)),
            "robust": _robust(sets, judge(sets, budgets, seen)),
            "without": (rivals, [Judgement(site=one.sites[0]) for one in sets]),
        }
        own = sets[place].sites[0]
        for rule, (merged, found) in choices.items():
            flagged = {j.site for j in found if j.reasons}
            yield {
                "data": name,
                "attack": attack,
                "seed": seed,
                "site": own,
                "merge": rule,
                "left_out": " ".join(sorted({s.sites[0] for s in sets} - {s.sites[0] for s in merged})),
                **{k: f"{v:.4f}" for k, v in figures(attack, merged).items()},
                "attacker_flagged": int(own in flagged),
                "honest_flagged": len(flagged - {own}),
                "gain_without": f"{seen[own].balanced_accuracy.mean:.4f}",
                "gain_error": f"{seen[own].balanced_accuracy.error:.4f}",
            }


def _robust(sets: Sequence[SyntheticSet], found: list[Judgement]) -> tuple[list[SyntheticSet], list[Judgement]]:
    kept = select(found, "robust").kept
    return [one for one in sets if one.sites[0] in kept], found


def alarms(name: str, root: Path, seed: int) -> Iterator[tuple[str, set[str]]]:
    """(attacker, or "", and who is suspect) of honest sets of random real images, and with the labels of each flipped."""
    config, data, sites = federation(name, root, seed)
    honest = []
    for site in sites:
        split, counts = site.train, site.train.counts(data.classes)
        chosen = draw_of_each(split.labels, budget_of(counts, config.ipc, config.budget), generator(seed, site.name))
        labels = targets_of(split.labels[chosen], data.classes, data.kind)
        honest.append(_real(data, site.name, normalise(split.images[chosen], data.modality), labels))
    for place in (-1, *range(len(sites))):
        sets = [flipped(one, torch.Generator()) if i == place else one for i, one in enumerate(honest)]
        budgets: Mapping[str, Sequence[int]] = {one.sites[0]: [config.ipc] * data.classes for one in sets}
        yield ("" if place < 0 else sites[place].name), {j.site for j in judge(sets, budgets) if j.reasons}


def _real(data: Dataset, site: str, images: Tensor, labels: Tensor) -> SyntheticSet:
    mean, std = NORMALISATION[data.modality]
    return SyntheticSet(
        images=images,
        labels=labels,
        site=torch.zeros(len(images), dtype=torch.int64),
        sites=(site,),
        class_names=data.class_names,
        mean=mean,
        std=std,
        modality=data.modality,
        step_size=(0.01,),
        manifest={},
        kind=data.kind,
    )


@one_thread()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("damage", "alarms"))
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/poison"), help="folder of the sites' work, which is kept"
    )
    parser.add_argument("--out", type=Path, help="a .csv file, to which the rows of `damage` are added")
    parser.add_argument(
        "--data", choices=tuple(DATA), nargs="*", help="the data sets; default: two for damage, all for alarms"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    if given.what == "alarms":
        for name in given.data or DATA:
            found = [one for seed in seeds for one in alarms(name, given.data_root, seed)]
            honest = [flagged for attacker, flagged in found if not attacker]
            right = [attacker in flagged for attacker, flagged in found if attacker]
            wrong = [bool(flagged - {attacker}) for attacker, flagged in found if attacker]
            print(
                f"{name}: an honest site is suspect in {sum(map(bool, honest))} of {len(honest)} federations; flipped labels are "
                f"found in {sum(right)} of {len(right)}, with an honest site suspect in {sum(wrong)}",
                flush=True,
            )
        return
    for seed in seeds:
        for name in given.data or DAMAGED:
            for row in damage(name, given.data_root, given.work, seed):
                print(*row.values(), sep=",", flush=True)
                if given.out is not None:
                    _append(given.out, row)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
