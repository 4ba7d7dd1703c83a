"""The report of a run: one HTML page that works without a network, for a person who was not there.

Overview first, then each site, the images, the classes, calibration, other architectures, comparisons, and the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedistill.data.dataset import Split
from fedistill.evaluation.intervals import wilson
from fedistill.methods.registry import METHODS
from fedistill.privacy.accounting import upwards
from fedistill.report import tables
from fedistill.report.curves import Curve, arms_chart, highest, loss_chart, recall_chart, reliability_chart, thin
from fedistill.report.images import by_class
from fedistill.synthetic.set import SyntheticSet

TEMPLATE = Path(__file__).with_name("page.html.j2")
STYLE = Path(__file__).with_name("style.css")
OWN_DATA = "the sites’ own data"
TASKS = {
    "multiclass": "one class per image",
    "multilabel": "any number of findings per image",
    "ordinal": "one grade per image",
}
THINGS = {"multiclass": "classes", "multilabel": "findings", "ordinal": "grades"}

Json = dict[str, Any]


def style() -> Markup:
    """The looks that all pages share."""
    return Markup(STYLE.read_text(encoding="utf-8").strip())


def render_report(
    summary: Mapping[str, Any],
    sets: Mapping[str, SyntheticSet],
    curves: Mapping[str, Curve],
    phantoms: Split | None = None,
) -> str:
    """The whole page as text.

    summary: content of `summary.json`; figures that are missing or null are shown as "n/a".
    sets: the synthetic set of each site, curves: (iteration, matching loss) of each site, both of the first seed and
    both allowed to lack sites. phantoms: real images that may be shown, since they are nobody's.
    Names of sites and classes come from other institutions, so all text is escaped.
    """
    # Autoescape is always on; markup is only what this module makes itself.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": tables.score, "number": tables.number, "size": tables.size}
    environment.filters |= {"duration": tables.duration, "arm": tables.arm_name, "between": tables.between}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    arms = dict(tables.arms_in_order(summary.get("arms") or {}))
    config, data = summary.get("config") or {}, summary.get("data") or {}
    class_names, kind = [str(name) for name in data.get("class_names") or []], tables.kind_of(summary)
    found = (summary.get("federated") or {}).get("distilled") or {}
    sites = [_site(site, curves, found, class_names) for site in summary.get("sites") or []]
    told = {str(name): curve for name, curve in curves.items() if curve}
    charted = tables.charted(summary)
    method = METHODS.get(str(config.get("method")))
    simulated = config.get("server_data", "same") == "same"  # else every site has data of its own, whatever `data` says
    procedural = simulated and config.get("data") == "phantom"
    selects = method is not None and method.select is not None
    shown = sets if procedural or not selects else {}  # patients' images are not for a page
    images = by_class(shown, phantoms, class_names, kind == "multilabel") if shown else []
    travelled = any(tables.images_of(key, arm) == "-" for key, arm in arms.items())
    recalls = _recalls(_pooled(found), class_names)
    calibration = _calibration(summary)
    architectures = _architectures(summary, config, charted[0])
    parts = {
        "results": "At a glance",
        "sites": "Sites",
        "images": "Images" if images else "",
        "classes": "Findings" if kind == "multilabel" else "Classes",
        "calibration": "Calibration" if calibration else "",
        "architectures": "Architectures" if architectures["rows"] else "",
        "arms": "Comparisons",
        "again": "Repeat it",
    }
    if not arms:
        parts |= {"classes": "", "arms": ""}
    return page.render(
        style=style(),
        parts=[(name, title) for name, title in parts.items() if title],
        things=THINGS[kind],
        one="finding" if kind == "multilabel" else "class",
        method_reads=method is not None and method.sees_images,
        method_selects=selects,
        networks_travelled=travelled,
        data=data,
        data_name=(data.get("name") or config.get("data") or "an unnamed data set") if simulated else OWN_DATA,
        config=config,
        versions=summary.get("versions") or {},
        command=summary.get("command") or "",
        seeds=summary.get("seeds") or [],
        class_names=class_names,
        phantom=procedural,
        verdict=tables.verdict(summary),
        privacy=summary.get("privacy") or {},
        guarantee=tables.guarantee(summary),
        attacked=tables.attacked(summary),
        records=tables.records(summary),
        troubles=[site for site in sites if site["status"] != "ok"],
        notes=summary.get("notes") or [],
        glance=_glance(summary, sites, class_names, procedural=procedural, selects=selects),
        facts=_facts(summary),
        sites=sites,
        image_counts=_image_counts(sites, class_names),
        images=images,
        strips_real=phantoms is not None,
        recall_rows=recalls,
        recall_chart=Markup(recall_chart(recalls, "Recall of each class")),
        no_intervals=_no_intervals(summary),
        calibration=calibration,
        arms=arms,
        images_of=tables.images_of,
        kind=kind,
        metrics=tables.metrics_of(summary),
        counted=tables.counted(summary),
        headline=tables.METRICS[charted[0]],
        best=tables.best_arm(summary),
        best_mark=tables.BEST,
        below_arms=tables.below_arms(summary),
        deviation=tables.deviation(summary),
        arm_charts=[(tables.METRICS[metric], Markup(arms_chart(summary, metric))) for metric in charted],
        losses=[(name, _milestones(curve)) for name, curve in told.items() if thin(curve)],
        loss_chart=Markup(loss_chart(curves, "Matching loss of every site")),
        federated=_federated(summary),
        architectures=architectures,
    )


def _glance(
    summary: Mapping[str, Any], sites: list[Json], class_names: Sequence[str], *, procedural: bool, selects: bool
) -> list[Json]:
    """The four things to know first: what was made, how good it is, how private, and how much was sent."""
    answered = sum(site["status"] == "ok" for site in sites)
    uploads = [site["upload_bytes"] for site in sites if site["upload_bytes"] is not None]
    arms, data, config = (summary.get(key) or {} for key in ("arms", "data", "config"))
    distilled = arms.get("distilled") or {}
    metric = tables.charted(summary)[0]
    others = [
        f"{tables.arm_name(key).lower()} {tables.score(arms[key].get(metric))}".replace(" ± ", "\N{NBSP}±\N{NBSP}")
        for key in ("random_real", "centralised")
        if arms.get(key)
    ]
    people = "patients with training images" if tables.records(summary) == "patients" else "real training images"
    train, real = tables.number(data.get("train")), (arms.get("centralised") or {}).get("upload_bytes")
    took = str(len(sites)) if answered == len(sites) else f"{answered} of {len(sites)}"
    private = summary.get("privacy") or {}
    epsilon, delta = tables.mean_of(private.get("epsilon")), tables.mean_of(private.get("delta"))
    if epsilon is None or delta is None:
        guard = ("No formal guarantee", " words bad", "Synthetic images can reveal something about the real ones.")
        if procedural:
            guard = ("No formal guarantee", " words", "None was asked for: the images are phantoms, which show nobody.")
        if private:
            guard = ("No guarantee for the union", " words bad", "Not every site promises one.")
    else:
        promise = f"(ε, δ)-differential privacy of the merged set, for every {tables.plain(str(private.get('unit')))}."
        guard = (f"ε {upwards(epsilon)}, δ {delta:g}", "", promise)
    method = tables.plain(str(config.get("method") or "an unknown method"))
    things = THINGS[tables.kind_of(summary)]
    each = f"; {tables.size(sum(uploads) / len(uploads))} by each on average" if len(uploads) > 1 else ""
    instead = f" All real images would be {tables.size(real)}." if real else ""
    return [
        {
            "title": "What was made",
            "figure": f"{tables.number(distilled.get('images'))} {'selected' if selects else 'synthetic'} images",
            "look": " words",
            "more": f"By {took} sites, with {method}, for {len(class_names)} {things}. The {train} {people} stayed at the sites.",
        },
        {
            "title": f"How good: {tables.spoken(metric)}",
            "figure": tables.score(distilled.get(metric)),
            "look": "",
            "more": "Of networks trained on them, on real test images." + (f" Others: {', '.join(others)}." if others else ""),
        },
        {"title": "How private", "figure": guard[0], "look": guard[1], "more": guard[2]},
        {
            "title": "How much was sent",
            "figure": tables.size(sum(uploads) if uploads else None),
            "look": "",
            "more": f"Uploaded by all sites together{each}.{instead}",
        },
    ]  # fmt: skip


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, kind = summary.get("data") or {}, tables.kind_of(summary)
    geometry = data.get("geometry") or []
    size = " × ".join(map(str, geometry)) or tables.MISSING
    patients = " patients" if tables.records(summary) == "patients" else ""
    val = f", {tables.number(data['val'])} validation" if data.get("val") else ""
    return [
        ("Task", TASKS[kind]),
        ("Modality", str(data.get("modality") or tables.MISSING)),
        ("Image size", f"{size} (channels × {'depth × ' if len(geometry) == 4 else ''}height × width)"),
        (
            "Split",
            f"{tables.number(data.get('train'))} training{patients}{val} and {tables.number(data.get('test'))} test images",
        ),
        ("Partition", str(data.get("partition") or tables.MISSING)),
        ("Time", f"{tables.duration(summary.get('seconds'))} from start to end"),
        ("Peak memory", tables.size(summary.get("peak_memory_bytes"))),
    ]


def _site(
    site: Mapping[str, Any], curves: Mapping[str, Curve], found: Mapping[str, Any], class_names: Sequence[str]
) -> Json:
    name = str(site.get("name", ""))
    curve = curves.get(name) if len(curves) > 1 else None  # of a single site the chart of all sites is enough
    chart = loss_chart({name: curve}, f"Matching loss of {name}", highest(curves)) if curve else ""
    return {
        "name": name,
        "status": site.get("status") or "unknown",
        "reason": site.get("reason") or "",
        "images": site.get("images"),
        "total": site.get("train"),
        "phases": dict(sorted((site.get("phases") or {}).items(), reverse=True)),
        "upload_bytes": site.get("upload_bytes"),
        "iterations": tables.iterations(site),
        "final_loss": site.get("final_loss"),
        "synthetic_images": site.get("synthetic_images"),
        "notes": site.get("notes") or [],
        "privacy": site.get("privacy") or {},
        "beside": tables.beside(site.get("suspicion")),
        "odd": bool((site.get("suspicion") or {}).get("reasons")),
        "recalls": _recalls((found.get(name) or {}).get("recognised"), class_names),
        "chart": Markup(chart),
    }


def _image_counts(sites: list[Json], class_names: list[str]) -> list[tuple[str, list[Any], Any]]:
    """(site, images per class, total) of the sites that told, and the sum over them."""
    told = [(site["name"], site["images"], site["total"]) for site in sites if site["images"]]
    if len(told) > 1 and all(len(images) == len(class_names) for _, images, _ in told):
        sums = [sum(column) for column in zip(*(images for _, images, _ in told), strict=True)]
        told.append(("All sites", sums, sum(total or 0 for _, _, total in told)))
    return told


def _milestones(curve: Curve) -> list[float]:
    """The loss at the first and the last iteration and three between, as the chart draws it."""
    line = thin(curve)
    return [line[round(part * (len(line) - 1) / 4)][1] for part in range(5)]


def _pooled(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The counts of all sites for each class; none where a site has none."""
    counts = [(figures or {}).get("recognised") or {} for figures in found.values()]
    if not all(counts):
        return {}
    total: dict[str, dict[str, float]] = {}
    for one in counts:
        for name, count in one.items():
            before = total.get(name, {"right": 0, "of": 0})
            total[name] = {part: before[part] + count[part] for part in before}
    return total


def _recalls(counts: Mapping[str, Any] | None, class_names: Sequence[str]) -> list[Json]:
    """Recall of each class with its interval; nothing where there are no counts."""
    rows = []
    for name in class_names if counts else ():
        count = (counts or {}).get(name) or {"right": 0, "of": 0}
        share = count["right"] / count["of"] if count["of"] else None
        rows.append({"name": name, **count, "share": share, "interval": wilson(count["right"], count["of"])})
    return rows


def _no_intervals(summary: Mapping[str, Any]) -> str:
    if not (summary.get("federated") or {}).get("distilled"):
        return "There are no intervals: no site counted its answers, so how many images were recognised is not known."
    if summary.get("privacy"):
        return (
            "There are no intervals: the counts of answers that the sites sent are private and have noise of their own, for which "
            "an interval of plain counts would be too narrow."
        )
    return "There are no intervals: the summary of this run has no counts of recognised images."


def _calibration(summary: Mapping[str, Any]) -> Json | None:
    """The reliability table with intervals and its chart; None where the server had no test images."""
    found = summary.get("calibration")
    if not found:
        return None
    bins = [one | {"interval": wilson((one["accuracy"] or 0.0) * one["count"], one["count"])} for one in found["bins"]]
    chart = reliability_chart(bins, f"Reliability of the {tables.plain(str(found['model']))}")
    return {**found, "bins": bins, "chart": Markup(chart)}


def _federated(summary: Mapping[str, Any]) -> Json:
    """How the global model does at each site: the arms, and a row of figures for every site."""
    arms = {arm: found for arm, found in (summary.get("federated") or {}).items() if found}
    names = list(dict.fromkeys(name for found in arms.values() for name in found))
    rows = []
    for name in names:
        figures = {arm: found.get(name) or {} for arm, found in arms.items()}
        images = next((f["images"] for f in figures.values() if f.get("images") is not None), None)
        rows.append({"site": name, "images": images, "figures": figures})
    return {"arms": list(arms), "rows": rows}


def _architectures(summary: Mapping[str, Any], config: Mapping[str, Any], metric: str) -> Json:
    """`metric` of every arm with other architectures, after the one that the headline figures are from."""
    others = summary.get("cross_architecture") or {}
    if not others:
        return {"arms": [], "rows": []}
    headline = str(config.get("eval_models") or "headline").split(",")[0].strip()
    rows = {headline: summary.get("arms") or {}} | {str(name): arms or {} for name, arms in others.items()}
    keys = dict.fromkeys(key for arms in rows.values() for key, _ in tables.arms_in_order(arms))
    cells = {name: [(arms.get(key) or {}).get(metric) for key in keys] for name, arms in rows.items()}
    return {"arms": list(keys), "rows": list(cells.items())}
