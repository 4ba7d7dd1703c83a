"""The figures of a run (`summary.json`) in words and tables for people."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from fedistill.evaluation.comparators import OF_PARAMETERS, PRIVATE
from fedistill.privacy.accounting import upwards

ARM_NAMES = {
    "distilled": "Distilled union",
    "random_real": "Random real images",
    "local_only": "Local only",
    "fedavg": "Federated averaging",
    "fedprox": "Federated averaging with a proximal term",
    "fedavg-distilled": "Way of federated averaging, distilled",
    "one-shot": "One averaging of local networks",
    "ensemble": "Ensemble of local networks",
    "ensemble-distilled": "Ensemble, distilled on phantoms",
    "central-distilled": "Distilled from all images together",
    "centralised": "Centralised",
}
METRICS = {
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "auc": "AUC",
    "map": "mAP",
    "qwk": "QWK",
    "mae": "MAE (grades)",
}
# What is shown of each kind of task; the first is the headline, on which arms are compared.
SHOWN = {
    "multiclass": ("balanced_accuracy", "accuracy", "macro_f1", "auc"),
    "multilabel": ("auc", "map", "balanced_accuracy", "accuracy", "macro_f1"),
    "ordinal": ("qwk", "mae", "balanced_accuracy", "accuracy", "macro_f1", "auc"),
}
EQUAL_BUDGET = ("distilled", "random_real")
MISSING = "n/a"
BEST = "★"
YARDSTICKS = ("random_real", "local_only", "centralised")  # on real images as they are, whatever `privacy` says


def arm_name(arm: str, last: int | None = None) -> str:
    """`dp-fedavg-10`: Private federated averaging, 10 rounds. last: the rounds of an arm whose key says none."""
    name, rounds = without_rounds(arm)
    rounds = rounds or (last if last and last > 1 else 0)
    known = ARM_NAMES.get(name.removeprefix(PRIVATE))
    if known is None:
        return plain(arm)
    if name.startswith(PRIVATE):
        known = f"Private {known[0].lower()}{known[1:]}"
    return known + (f", {rounds} round{'s' * (rounds > 1)}" if rounds else "")


def without_rounds(arm: str) -> tuple[str, int]:
    """The name of an arm, and the number of its round; 0 where it is the last."""
    name, _, last = arm.rpartition("-")
    return (name, int(last)) if name and last.isdecimal() else (arm, 0)


def kind_of(summary: Mapping[str, Any]) -> str:
    """The kind of task; that of one class per image where the summary does not say."""
    kind = (summary.get("data") or {}).get("kind")
    return kind if kind in SHOWN else "multiclass"


def metrics_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """Name and title of the figures that are shown, the headline first."""
    return {name: METRICS[name] for name in SHOWN[kind_of(summary)]}


def charted(summary: Mapping[str, Any]) -> list[str]:
    """The first two figures on a scale from 0 to 1."""
    return [name for name in metrics_of(summary) if name != "mae"][:2]


def counted(summary: Mapping[str, Any]) -> dict[str, str]:
    """Name and title of the first two figures that counts of answers determine."""
    return dict([(name, title) for name, title in metrics_of(summary).items() if name not in ("auc", "map")][:2])


def spoken(metric: str) -> str:
    """The title of a figure within a sentence."""
    title = METRICS[metric]
    return title if title.isupper() else title.lower()


def best_means(summary: Mapping[str, Any]) -> str:
    return f"{BEST} higher {spoken(charted(summary)[0])} of the two arms with the same budget"


def yardsticks(arms: Collection[str]) -> str:
    """Which of the arms no privacy protects, for below a table; empty where there is none."""
    found = [arm_name(arm) for arm in YARDSTICKS if arm in arms]
    return f"Yardsticks on real images, not private and never sent: {', '.join(found)}." if found else ""


def images_of(key: str, arm: Mapping[str, Any]) -> str:
    """How many images an arm is made of; "-" where parameters travel and no images."""
    name, _ = without_rounds(key)
    return "-" if name.removeprefix(PRIVATE) in OF_PARAMETERS else number(arm.get("images"))


def arms_in_order(arms: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key, arm) of every arm: the known ones in the order of `ARM_NAMES`, earlier rounds first, then the others."""
    known = list(ARM_NAMES)

    def place(key: str) -> tuple[int, float]:
        name, rounds = without_rounds(key)
        name = name.removeprefix(PRIVATE)
        return (known.index(name), rounds or math.inf) if name in known else (len(known), 0)

    for key in sorted(arms, key=place):
        yield key, arms[key] or {}


def arms_table(summary: Mapping[str, Any]) -> Table:
    """One row per arm: the metrics of the kind of task as mean ± deviation, images and upload."""
    table = bare_table("Global model on the pooled test images", caption=below_arms(summary))
    table.add_column("Arm", overflow="fold")
    for title in _arm_columns(summary):
        table.add_column(title, justify="right")
    for name, *cells in _arm_rows(summary):
        table.add_row(Text(name), *map(Text, cells))
    return table


def arms_markdown(summary: Mapping[str, Any]) -> str:
    """The same rows as a GitHub table, with the meaning of ± below it."""
    columns = _arm_columns(summary)
    lines = [["Arm", *columns], ["---"] + ["---:"] * len(columns), *_arm_rows(summary)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table}\n\n{below_arms(summary)}\n"


def below_arms(summary: Mapping[str, Any]) -> str:
    """What ± and the star mean, and which arms are yardsticks."""
    return f"{deviation(summary)} {best_means(summary)}. {yardsticks(summary.get('arms') or {})}".strip()


def bare_table(title: str, **more: Any) -> Table:
    """Without lines, so that a terminal of 80 columns is wide enough."""
    return Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0), **more)


def sites_table(summary: Mapping[str, Any]) -> Table:
    """One row per site: how it ended, its images, seconds per phase and upload."""
    table = bare_table("Sites")
    table.add_column("Site", overflow="fold")
    table.add_column("Status", overflow="fold")
    phases = sorted({str(p) for site in summary.get("sites") or [] for p in site.get("phases") or {}}, reverse=True)
    seconds = [f"{plain(p).capitalize()} s" for p in phases]
    real = "Patients" if records(summary) == "patients" else "Real"
    for title in (real, "Synthetic", *seconds, "Iterations", "Loss", "Upload"):
        table.add_column(title, justify="right")
    for site in summary.get("sites") or []:
        status = str(site.get("status", ""))
        reason = f": {plain(str(site['reason']))}" if site.get("reason") else ""
        table.add_row(
            Text(plain(str(site.get("name", "")))),
            Text(plain(status) + reason, style="green" if status == "ok" else "bold red"),
            number(site.get("train")),
            number(site.get("synthetic_images")),
            *(number((site.get("phases") or {}).get(p)) for p in phases),
            iterations(site),
            score(site.get("final_loss")),
            size(site.get("upload_bytes")),
        )
    return table


def verdict(summary: Mapping[str, Any]) -> str:
    """One or two plain sentences: did distillation beat real images of the same budget, and what does it cost?

    A difference within `sqrt(s₁² + s₂²)`, with `s` the standard deviations of the two arms, is called a draw.
    """
    arms, metric = summary.get("arms") or {}, charted(summary)[0]
    rival = _compare(arms, "random_real", metric)
    if rival is None:
        return (
            f"There is no verdict: {spoken(metric)} is not known for both the distilled union and random real images."
        )
    difference, noise = rival
    points = f"{abs(difference):.1f} points"
    budget = _budget(arms)
    if noise is not None and abs(difference) <= noise:
        first = (
            f"On {spoken(metric)} the distilled union and random real images {budget} cannot be told apart: "
            f"the difference of {difference:+.1f} points is within one standard deviation ({noise:.1f} points)."
        )
    elif difference > 0:
        first = f"On {spoken(metric)} the distilled union beats random real images {budget} by {points}."
    elif difference < 0:
        first = (
            f"On {spoken(metric)} the distilled union loses to random real images {budget} by {points}: "
            "in this run distillation did not pay off."
        )
    else:
        first = f"On {spoken(metric)} the distilled union is level with random real images {budget}."
    averaging = next((arm for arm in ("fedavg", "dp-fedavg") if arm in arms), "")
    others = [
        _standing(arms, averaging, arm_name(averaging).lower(), metric),
        _standing(arms, "centralised", "centralised training on all real images", metric),
        _standing(arms, "local_only", "training at each site alone", metric),
    ]
    second = " and ".join(text for text in others if text)
    doubt = "" if noise is not None else " The spread of these figures is not known, so chance is not ruled out."
    return first + (f" The distilled union is {second}." if second else "") + doubt


def guarantee(summary: Mapping[str, Any]) -> str:
    """What the union of the sets promises to one person; "" where nothing private was asked for."""
    union = summary.get("privacy") or {}
    epsilon, delta = mean_of(union.get("epsilon")), mean_of(union.get("delta"))
    if not union:
        return ""
    if epsilon is None or delta is None:
        return f"{plain(str(union.get('statement') or 'No formal guarantee'))}"
    unit = plain(str(union.get("unit")))
    words = [
        f"Privacy: ({upwards(epsilon)}, {delta:g})-differential privacy of the merged set for every {unit} among the training "
        "images, at worst over the sites, where no patient is at two of them; budgets of a patient at several sites add up."
    ]
    if len(summary.get("seeds") or []) > 1:
        words.append("Each seed is a release of its own: whoever sees all of them sees the sum of their budgets.")
    if union.get("averaging_epsilon"):
        words.append(
            "Federated averaging, run for comparison, cost each site up to another "
            f"epsilon={union['averaging_epsilon']:g} on the same images."
        )
    if union.get("alone_epsilon"):
        words.append(
            f"So did, up to epsilon={union['alone_epsilon']:g}, the networks that sites trained alone for comparison."
        )
    if union.get("central_epsilon"):
        words.append(
            f"So did, up to epsilon={union['central_epsilon']:g}, distilling all images together for comparison."
        )
    if union.get("answers_epsilon"):
        words.append(
            f"Validation and test images are other people's: each site's answers on them cost epsilon={union['answers_epsilon']:g}."
        )
    if union.get("simulated"):
        words.append("Not covered: the figures of the arms, for which the simulation read the data themselves.")
    return " ".join(words)


def attacked(summary: Mapping[str, Any]) -> str:
    """What an attack showed; "" where there was none."""
    found = summary.get("audit")
    if not found:
        return ""
    claimed = found["claimed_epsilon"]
    words = [
        f"Attack on what {plain(str(found['site']))} would send ({found['shadows']} rehearsals with {found['canaries']} "
        f"planted images): it shows epsilon to be at least {found['epsilon_lower']:.2f}, and could have shown at most "
        f"{found['ceiling']:.2f}.",
        f"{found['exact']} of {found['images']} synthetic images are exact copies of training images.",
    ]
    if found["contradicts"]:
        words.insert(0, f"The claim of epsilon={claimed:g} is contradicted: do not release.")
    if found["red_flag"] and not found["exact"]:
        words.append("Some lie nearer to training images than to others.")
    if not found["power"]:
        words.append("It misses even a release of real images, so it says nothing.")
    elif claimed is not None and not found["contradicts"]:
        words.append("That does not contradict the claim, and does not prove it.")
    return " ".join(words)


def beside(suspicion: Mapping[str, Any] | None) -> str:
    """What a site's set looks like beside the others (docs/poisoning.md); "" where they were not compared."""
    if not suspicion:
        return ""
    if suspicion.get("copies") is None:
        return "not judged: too few sites"
    if not suspicion["reasons"]:
        return "nothing odd"
    seeds = f" in {suspicion['suspect_in']} of {suspicion['seeds']} seeds" if suspicion["seeds"] > 1 else ""
    end = "left out of the merge" if suspicion["left_out_in"] else "merged all the same"
    return plain(f"suspect{seeds}, {end}: it {'; it '.join(suspicion['reasons'])}")


def records(summary: Mapping[str, Any]) -> str:
    """What the sites counted when they said how much they have."""
    return "patients" if (summary.get("privacy") or {}).get("unit") == "patient" else "images"


def deviation(summary: Mapping[str, Any]) -> str:
    """What the figure after ± means in this run."""
    over = {str(arm["std_over"]) for _, arm in arms_in_order(summary.get("arms") or {}) if arm.get("std_over")}
    return f"± is the standard deviation over {' or '.join(sorted(map(plain, over))) or 'repetitions'}."


def best_arm(summary: Mapping[str, Any]) -> str:
    """The arm of equal budget with the higher headline figure; "" for a tie or where one is unknown."""
    compared = _compare(summary.get("arms") or {}, "random_real", charted(summary)[0])
    if compared is None or compared[0] == 0:
        return ""
    return EQUAL_BUDGET[0] if compared[0] > 0 else EQUAL_BUDGET[1]


def mean_of(value: Any) -> float | None:
    """The mean of `{"mean", "std"}`, or the number itself; None where it is unknown or not finite."""
    found = value.get("mean") if isinstance(value, Mapping) else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def std_of(value: Any) -> float | None:
    return mean_of({"mean": value.get("std")}) if isinstance(value, Mapping) else None


def score(value: Any) -> str:
    """`.710 ± .020`; a number without deviation as `.710`."""
    mean, std = mean_of(value), std_of(value)
    if mean is None:
        return MISSING
    return _thousandths(mean) if std is None else f"{_thousandths(mean)} ± {_thousandths(std)}"


def between(ends: Any) -> str:
    """An interval as `.601 to .744`."""
    return f"{_thousandths(ends[0])} to {_thousandths(ends[1])}" if ends else MISSING


def number(value: Any) -> str:
    """A count or seconds, with at most one decimal (a mean over seeds need not be whole)."""
    found = mean_of(value)
    return MISSING if found is None else f"{found:,.1f}".removesuffix(".0")


def size(value: Any) -> str:
    """Bytes for people, in powers of 1000."""
    left = mean_of(value)
    if left is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(left) < 999.5:
            return f"{left:.3g} {unit}"
        left /= 1000
    return f"{left:,.3g} TB"


def duration(value: Any) -> str:
    """Seconds for people: `41 s`, `6 min 52 s`, `2 h 5 min`."""
    found = mean_of(value)
    if found is None:
        return MISSING
    if found < 10:
        return f"{found:.1f} s"
    minutes, seconds = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def iterations(site: Mapping[str, Any]) -> str:
    if mean_of(site.get("iterations")) is None:
        return MISSING
    skipped = f" ({number(site['skipped_iterations'])} skipped)" if site.get("skipped_iterations") else ""
    return number(site["iterations"]) + skipped


def plain(text: str) -> str:
    """`text` without control characters: a name that a site chose must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _arm_columns(summary: Mapping[str, Any]) -> list[str]:
    return [*metrics_of(summary).values(), "Images", "Upload"]


def _arm_rows(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    best, metrics = best_arm(summary), metrics_of(summary)
    for key, arm in arms_in_order(summary.get("arms") or {}):
        name = arm_name(key, arm.get("rounds")) + (f" {BEST}" if key == best else "")
        yield [name, *(score(arm.get(m)) for m in metrics), images_of(key, arm), size(arm.get("upload_bytes"))]


def _compare(arms: Mapping[str, Any], other: str, metric: str) -> tuple[float, float | None] | None:
    """Distilled minus `other` on `metric`, and the combined deviation, in points (hundredths).

    A deviation of exactly 0 comes from a single measurement, so it counts as unknown.
    """
    ours, theirs = ((arms.get(k) or {}).get(metric) for k in ("distilled", other))
    a, b = mean_of(ours), mean_of(theirs)
    if a is None or b is None:
        return None
    spread = [std_of(ours), std_of(theirs)]
    known = [s for s in spread if s is not None]
    noise = math.hypot(*known) if len(known) == 2 else 0.0
    return 100 * (a - b), 100 * noise or None


def _budget(arms: Mapping[str, Any]) -> str:
    ours, theirs = (mean_of((arms.get(k) or {}).get("images")) for k in EQUAL_BUDGET)
    if ours is None or theirs is None or ours == theirs:
        return "of the same budget"
    return f"({number(ours)} against {number(theirs)} images)"


def _standing(arms: Mapping[str, Any], other: str, name: str, metric: str) -> str:
    compared = _compare(arms, other, metric)
    if compared is None:
        return ""
    difference, noise = compared
    if noise is not None and abs(difference) <= noise:
        return f"within one standard deviation of {name} ({difference:+.1f} points)"
    if round(difference, 1) == 0:
        return f"level with {name}"
    return f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'} {name}"


def _thousandths(value: float) -> str:
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0") else text
