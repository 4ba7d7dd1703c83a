"""What a user should know before hours of distillation: one clear sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedistill.evaluation.metrics import Spread, noise

if TYPE_CHECKING:
    from fedistill.evaluation.probe import Budget, Probe

LARGE_SHARE = 0.25  # of the training images: more is hardly a distillation
IMBALANCE = 10  # class weights in the loss go no further
NEAR_CHANCE = 0.05


@dataclass(frozen=True)
class Caution:
    """`code` is a short stable word for machines."""

    code: str
    sentence: str


def cautions_of(probe: Probe) -> Iterator[Caution]:
    """All that applies, in the order data, sites, scores, prediction."""
    yield from _of_data(probe)
    yield from _of_sites(probe)
    yield from _of_scores(probe)
    yield from _of_predictions(probe)


def _of_data(probe: Probe) -> Iterator[Caution]:
    counts = dict(zip(probe.class_names, probe.train, strict=True))
    if probe.left_out:
        yield Caution(
            "budget-left-out",
            f"{_at(probe.left_out)} left out: there are only {sum(probe.train)} training images.",
        )
    largest = probe.budgets[-1].ipc
    few = {name: n for name, n in counts.items() if n < largest}
    if few:
        listed = _listed(f"{name} ({n})" for name, n in sorted(few.items(), key=lambda item: item[1]))
        yield Caution("few-images", f"Fewer training images than the largest budget of IPC {largest}: {listed}.")
    rarest, commonest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[commonest] > IMBALANCE * counts[rarest]:
        yield Caution(
            "imbalance",
            f"The classes are far from balanced ({commonest} {counts[commonest]}, {rarest} {counts[rarest]} training images): "
            f"class weights stop at {IMBALANCE}, so a network on all data may neglect {rarest}.",
        )
    large = [b.ipc for b in probe.budgets if b.share > LARGE_SHARE]
    if large:
        yield Caution(
            "large-budget",
            f"At {_at(large)} the budget is more than a quarter of the training images: there is little left to save.",
        )
    if probe.validation == "train":
        yield Caution(
            "no-validation",
            f"The data have no usable validation split, so {sum(probe.validation_images)} training images were set aside.",
        )
    unseen = [name for name, n in zip(probe.class_names, probe.validation_images, strict=True) if n == 0]
    if unseen:
        yield Caution("class-not-validated", f"No validation image, so not part of any score here: {_listed(unseen)}.")


def _of_sites(probe: Probe) -> Iterator[Caution]:
    for site in probe.sites:
        if site.missing:
            yield Caution(
                "class-missing-at-site",
                f"Site {site.name} has no training image of {_listed(site.missing)} and will send none.",
            )


def _of_scores(probe: Probe) -> Iterator[Caution]:
    whole = probe.whole.balanced_accuracy
    chance = 1 / sum(n > 0 for n in probe.validation_images)
    if whole.mean < chance + NEAR_CHANCE:
        yield Caution(
            "near-chance",
            f"All data reach a balanced accuracy of only {whole.mean:.3f} in a short training, where chance is {chance:.3f}: "
            "distillation cannot teach what these networks do not learn.",
        )
        return  # that random images are as good is then no news
    near = [b for b in probe.budgets if whole.mean - _random(b).mean <= noise(whole, _random(b))]
    if near:
        first = near[0]
        lead = 100 * (whole.mean - _random(first).mean)
        where = f"within {lead:.1f} points of" if lead > 0 else f"{-lead:.1f} points above"
        yield Caution(
            "nothing-to-win",
            f"At IPC {first.ipc} random real images already reach {_random(first).mean:.3f}, {where} all data: "
            f"distillation has nothing to win {'there' if len(near) == 1 else 'at ' + _at([b.ipc for b in near])}.",
        )


def _of_predictions(probe: Probe) -> Iterator[Caution]:
    if probe.predictor is None:
        return
    absent = [b.ipc for b in probe.budgets if b.predicted is None]
    if absent:
        yield Caution(
            "other-predictor",
            f"No prediction at {_at(absent)}: the predictor was fitted for {_listed(probe.predictor.methods)} with "
            f"{probe.predictor.model}.",
        )
    doubtful = [b.ipc for b in probe.budgets if b.predicted and b.predicted.low <= _random(b).mean]
    if doubtful:
        yield Caution(
            "gain-in-doubt",
            f"At {_at(doubtful)} the predicted gain over random real images is within the error of the prediction.",
        )
    outside = [b for b in probe.budgets if b.extrapolated]
    if outside:
        names = _listed(sorted({name for b in outside for name in b.extrapolated}))
        yield Caution(
            "extrapolates",
            f"At {_at([b.ipc for b in outside])} the data lie outside of the predictor's benchmark ({names}).",
        )


def _random(budget: Budget) -> Spread:
    return budget.random.balanced_accuracy


def _at(ipcs: Sequence[int]) -> str:
    return f"IPC {_listed(map(str, ipcs))}"


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
