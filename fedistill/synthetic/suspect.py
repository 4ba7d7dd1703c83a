"""Which sites' sets are suspect beside those of the others, and which therefore stay out of a robust merge.

The statistics (`synthetic.oddities`) need the sets alone; the influence of a set needs validation images too. A set is suspect
for plain reasons or not at all. The limits were chosen on other seeds than those that docs/poisoning.md reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.evaluation.fit import Material, fit_all, predict
from fedistill.evaluation.metrics import Spread, score, spread_of
from fedistill.experts.train import Task
from fedistill.synthetic.merge import merge
from fedistill.synthetic.oddities import agreement, copies, excess, features, triggers
from fedistill.synthetic.set import SyntheticSet

FEWEST = 3  # of two sets that differ nobody can say which is odd
ENOUGH = 10  # images whose labels can contradict others' by more than chance
COPIES = 0.5  # share of images with a near-copy
TRIGGER = 0.2  # share of images with the same window, above that of any other set
EXCESS = 0.25  # share of images over the budgets of their classes
OWN, REST = -1.0, 1.0  # deviations above chance: of the set with the others, and of the others without it
GAIN = (
    0.1  # balanced accuracy on validation that leaving a set out must win: honest sites of other scanners come near it
)
ERRORS = 3.0  # and in standard errors over networks
RATE = 0.01  # learning rate of the networks that measure influence: the middle one
NETWORKS = 3  # and how many there are with and without each set


@dataclass(frozen=True)
class Influence:
    """What leaving the set out changes on validation images, over networks of the same seeds: above 0 the set does harm.

    auc is None where it does not exist.
    """

    balanced_accuracy: Spread
    auc: Spread | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One site's set beside the others: shares of its images, agreement in deviations above chance (see `oddities`).

    rest: the mean agreement of the other sets with one another. reasons: why the set is suspect, as clauses of "its set ...".
    A figure is None where it could not be had.
    """

    site: str
    copies: float | None = None
    trigger: float | None = None
    excess: float | None = None
    agreement: float | None = None
    rest: float | None = None
    influence: Influence | None = None
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Selection:
    """The sites whose sets are merged, those that are not, and what a reader must know besides ("": nothing)."""

    kept: tuple[str, ...]
    left_out: tuple[str, ...]
    note: str = ""


def judge(
    sets: Sequence[SyntheticSet],
    budgets: Mapping[str, Sequence[int]],
    influences: Mapping[str, Influence] | None = None,
) -> list[Judgement]:
    """Each site's set beside the others, in the order of the sites' names; figures are None of fewer than `FEWEST` sets.

    budgets: synthetic images per class that each site may send. influences: of `influences_of`, where there are validation images.
    """
    sets = sorted(sets, key=lambda s: s.sites)
    if len(sets) < FEWEST:
        return [Judgement(site=one.sites[0]) for one in sets]
    alone = [
        Judgement(
            site=one.sites[0],
            copies=repeated,
            trigger=pasted,
            excess=excess(one, budgets[one.sites[0]]),
            influence=(influences or {}).get(one.sites[0]),
        )
        for one, repeated, pasted in zip(sets, copies(sets), triggers(sets), strict=True)
    ]
    alone = [dataclasses.replace(j, reasons=tuple(_reasons(j))) for j in alone]
    return _with_agreement(alone, sets)


def select(judgements: Sequence[Judgement], policy: str) -> Selection:
    """What is merged under the setting `merge`. Suspects stay out of a robust merge.

    Unless fewer than half of the sites would remain: then all are merged.
    """
    sites = tuple(j.site for j in judgements)
    suspects = tuple(j.site for j in judgements if j.reasons)
    if len(judgements) < FEWEST:
        return Selection(sites, (), f"{len(sites)} sets are too few to say that one of them is odd: all are merged")
    if policy == "all" or not suspects:
        return Selection(sites, ())
    if 2 * len(suspects) > len(sites):
        return Selection(sites, (), f"{len(suspects)} of {len(sites)} sets are suspect, more than half: all are merged")
    return Selection(tuple(s for s in sites if s not in suspects), suspects)


def influences_of(config: Config, task: Task, sets: Sequence[SyntheticSet], val: Split) -> dict[str, Influence]:
    """Site -> what leaving its set out changes on `val`; empty for fewer than `FEWEST` sets. Never give it test images.

    Trains `NETWORKS` of the first architecture on the union and on the union without each set, with the same seeds.
    """
    sets = sorted(sets, key=lambda s: s.sites)
    if len(sets) < FEWEST:
        return {}
    whole = _scores(config, task, sets, val)
    found = {}
    for one in sets:
        without = _scores(config, task, [other for other in sets if other is not one], val)
        gains = {
            name: [b[name] - a[name] for a, b in zip(whole, without, strict=True) if None not in (a[name], b[name])]
            for name in ("balanced_accuracy", "auc")
        }
        auc = spread_of(gains["auc"]) if len(gains["auc"]) > 1 else None
        found[one.sites[0]] = Influence(spread_of(gains["balanced_accuracy"]), auc)
    return found


def _scores(config: Config, task: Task, sets: Sequence[SyntheticSet], val: Split) -> list[dict[str, Any]]:
    union, model = merge(sets), config.eval_models.split(",")[0].strip() or "convnet"
    net = task.network(model, config)
    todo = [(RATE, config.seed + 1000 * n) for n in range(NETWORKS)]
    thetas = fit_all(config, task, model, Material(union.images, union.labels), todo)
    return [score(predict(net, theta, val.images, task), val.labels, task.kind) for theta in thetas]


def _with_agreement(judgements: Sequence[Judgement], sets: Sequence[SyntheticSet]) -> list[Judgement]:
    """The judgements with the agreement of those sets that are not suspect already, which would spoil that of the others.

    So does the one that contradicts them: only the set that stands farthest apart is called odd.
    """
    places = [place for place, judged in enumerate(judgements) if not judged.reasons]
    several = [place for place in places if len(sets[place].groups.unique()) > 1]
    if len(places) < FEWEST or len(several) < 2:  # sets of one class have nothing to tell it apart from
        return list(judgements)
    labels = {place: sets[place].groups for place in places}
    found = dict(zip(places, features([sets[place] for place in places]), strict=True))

    def own(left: Sequence[int]) -> dict[int, float | None]:
        return {i: agreement(i, [j for j in left if j != i], found, labels) for i in left}

    result, whole, apart = list(judgements), own(places), {}
    for place in places:
        known = [a for a in own([j for j in places if j != place]).values() if a is not None]
        rest = sum(known) / len(known) if len(known) > 1 else None
        result[place] = dataclasses.replace(judgements[place], agreement=whole[place], rest=rest)
        mine = whole[place]
        if mine is not None and rest is not None and len(sets[place]) >= ENOUGH and mine < OWN and rest > REST:
            apart[place] = rest - mine
    if apart:
        odd = max(apart, key=lambda place: apart[place])
        why = (
            f"contradicts the labels of the others ({whole[odd]:+.1f} deviations from chance; they agree with one another by "
            f"{result[odd].rest:+.1f})"
        )
        result[odd] = dataclasses.replace(result[odd], reasons=(why,))
    return result


def _reasons(judged: Judgement) -> list[str]:
    reasons = []
    if judged.copies is not None and judged.copies > COPIES:
        reasons.append(f"repeats itself: {judged.copies:.0%} of its images have a near-copy")
    if judged.trigger is not None and judged.trigger > TRIGGER:
        reasons.append(f"has one small patch in {judged.trigger:.0%} more of its images than any other set has")
    if judged.excess is not None and judged.excess > EXCESS:
        reasons.append(f"has {judged.excess:.0%} of its images beyond the budgets of their classes")
    gain = judged.influence.balanced_accuracy if judged.influence else None
    if gain is not None and gain.mean > max(GAIN, ERRORS * gain.error):
        reasons.append(f"does harm: without it validation gains {100 * gain.mean:.1f} points")
    return reasons
