"""The report of a run: one HTML page that works without a network, for a person who was not there."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedistill.methods.registry import METHODS
from fedistill.report import tables
from fedistill.report.curves import Curve, arms_chart, highest, loss_chart
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.sheet import sheet_of

TEMPLATE = Path(__file__).with_name("page.html.j2")
TILE_PIXELS = 56  # small images are magnified to about this height


def render_report(summary: Mapping[str, Any], sets: Mapping[str, SyntheticSet], curves: Mapping[str, Curve]) -> str:
    """The whole page as text.

    summary: content of `summary.json`; figures that are missing or null are shown as "n/a".
    sets: the synthetic set of each site, curves: (iteration, matching loss) of each site, both of the first seed and
    both allowed to lack sites. Names of sites and classes come from other institutions, so all text is escaped.
    """
    # Autoescape is always on; markup is only what this module makes itself.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": tables.score, "number": tables.number, "size": tables.size}
    environment.filters |= {"duration": tables.duration, "arm": tables.arm_name}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    arms = dict(tables.arms_in_order(summary.get("arms") or {}))
    config, data = summary.get("config") or {}, summary.get("data") or {}
    sites = [_site(site, sets, curves) for site in summary.get("sites") or []]
    class_names = [str(name) for name in data.get("class_names") or []]
    charted = tables.charted(summary)
    method = METHODS.get(str(config.get("method")))
    return page.render(
        method_reads=method is not None and method.sees_images,
        method_selects=method is not None and method.select is not None,
        data=data,
        data_name=data.get("name") or config.get("data") or "an unnamed data set",
        config=config,
        versions=summary.get("versions") or {},
        command=summary.get("command") or "",
        seeds=summary.get("seeds") or [],
        class_names=class_names,
        phantom=config.get("data") == "phantom",
        verdict=tables.verdict(summary),
        privacy=summary.get("privacy") or {},
        guarantee=tables.guarantee(summary),
        attacked=tables.attacked(summary),
        records=tables.records(summary),
        troubles=[site for site in sites if site["status"] != "ok"],
        notes=summary.get("notes") or [],
        overview=_overview(summary, sites),
        sites=sites,
        image_counts=_image_counts(sites, class_names),
        arms=arms,
        images_of=tables.images_of,
        kind=tables.kind_of(summary),
        metrics=tables.metrics_of(summary),
        counted=tables.counted(summary),
        headline=tables.METRICS[charted[0]],
        best=tables.best_arm(summary),
        best_mark=tables.BEST,
        best_means=tables.best_means(summary),
        deviation=tables.deviation(summary),
        arm_charts=[(tables.METRICS[metric], Markup(arms_chart(summary, metric))) for metric in charted],
        loss_chart=Markup(loss_chart(curves, "Matching loss of every site")) if len(curves) > 1 else "",
        federated=_federated(summary),
        architectures=_architectures(summary, config, charted[0]),
    )


def _site(site: Mapping[str, Any], sets: Mapping[str, SyntheticSet], curves: Mapping[str, Curve]) -> dict[str, Any]:
    name = str(site.get("name", ""))
    made, curve = sets.get(name), curves.get(name)
    chart = loss_chart({name: curve}, f"Matching loss of {name}", highest(curves)) if curve else ""
    return {
        "name": name,
        "status": site.get("status") or "unknown",
        "reason": site.get("reason") or "",
        "images": site.get("images"),
        "total": site.get("train"),
        "phases": site.get("phases") or {},
        "upload_bytes": site.get("upload_bytes"),
        "iterations": tables.iterations(site),
        "final_loss": site.get("final_loss"),
        "synthetic_images": site.get("synthetic_images"),
        "notes": site.get("notes") or [],
        "privacy": site.get("privacy") or {},
        "beside": tables.beside(site.get("suspicion")),
        "odd": bool((site.get("suspicion") or {}).get("reasons")),
        "sheet": _sheet(made) if made is not None and len(made) else None,
        "chart": Markup(chart),
    }


def _sheet(made: SyntheticSet) -> dict[str, Any]:
    """The contact sheet as a `data:` address, with its size in pixels."""
    scale = max(1, round(TILE_PIXELS / made.geometry[-2]))
    image = sheet_of(made, scale)
    file = io.BytesIO()
    image.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return {"src": f"data:image/png;base64,{text}", "width": image.width, "height": image.height, "count": len(made)}


def _overview(summary: Mapping[str, Any], sites: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(figure, what it is), the most telling first."""
    answered = sum(site["status"] == "ok" for site in sites)
    uploads = [site["upload_bytes"] for site in sites if site["upload_bytes"] is not None]
    data, distilled = summary.get("data") or {}, (summary.get("arms") or {}).get("distilled") or {}
    real = ((summary.get("arms") or {}).get("centralised") or {}).get("upload_bytes")
    return [
        (str(len(sites)) if answered == len(sites) else f"{answered} of {len(sites)}", "sites took part"),
        (
            tables.number(data.get("train")),
            "patients with training images, which stayed at the sites"
            if tables.records(summary) == "patients"
            else "real training images, which stayed at the sites",
        ),
        (tables.number(distilled.get("images")), "synthetic images in the merged set"),
        (
            tables.size(sum(uploads) if uploads else None),
            "uploaded by all sites" + (f" ({tables.size(real)} for all real images)" if real else ""),
        ),
        (tables.duration(summary.get("seconds")), "from start to end"),
        (tables.size(summary.get("peak_memory_bytes")), "peak memory"),
    ]


def _image_counts(sites: list[dict[str, Any]], class_names: list[str]) -> list[tuple[str, list[Any], Any]]:
    """(site, images per class, total) of the sites that told, and the sum over them."""
    told = [(site["name"], site["images"], site["total"]) for site in sites if site["images"]]
    if len(told) > 1 and all(len(images) == len(class_names) for _, images, _ in told):
        sums = [sum(column) for column in zip(*(images for _, images, _ in told), strict=True)]
        told.append(("All sites", sums, sum(total or 0 for _, _, total in told)))
    return told


def _federated(summary: Mapping[str, Any]) -> dict[str, Any]:
    """How the global model does at each site: the arms, and a row of figures for every site."""
    arms = {arm: found for arm, found in (summary.get("federated") or {}).items() if found}
    names = list(dict.fromkeys(name for found in arms.values() for name in found))
    rows = []
    for name in names:
        figures = {arm: found.get(name) or {} for arm, found in arms.items()}
        images = next((f["images"] for f in figures.values() if f.get("images") is not None), None)
        rows.append({"site": name, "images": images, "figures": figures})
    return {"arms": list(arms), "rows": rows}


def _architectures(summary: Mapping[str, Any], config: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """`metric` of every arm with other architectures, after the one that the headline figures are from."""
    others = summary.get("cross_architecture") or {}
    if not others:
        return {"arms": [], "rows": []}
    headline = str(config.get("eval_models") or "headline").split(",")[0].strip()
    rows = {headline: summary.get("arms") or {}} | {str(name): arms or {} for name, arms in others.items()}
    keys = dict.fromkeys(key for arms in rows.values() for key, _ in tables.arms_in_order(arms))
    cells = {name: [(arms.get(key) or {}).get(metric) for key in keys] for name, arms in rows.items()}
    return {"arms": list(keys), "rows": list(cells.items())}
