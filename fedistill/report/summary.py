"""`summary.json`, `report.html` and `results.md` of a run, from the files that its phases left in the run folder.

The format of `summary.json` is stable ("fedistill-summary/1") and documented in docs/summary.md.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedistill.config import Config, make_config
from fedistill.data.dataset import Split, combined
from fedistill.data.sources import load_data
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.calibration import over_seeds
from fedistill.evaluation.comparators import ALONE, comparators
from fedistill.evaluation.intervals import recognised
from fedistill.evaluation.metrics import NAMES, counts_shape, from_counts, images_in, mean_std
from fedistill.events import read_events
from fedistill.files import read_json, write_bytes, write_json
from fedistill.privacy.accounting import in_words
from fedistill.release.claim import Claim, SiteClaim, read_claim
from fedistill.report.page import render_report
from fedistill.report.tables import arms_markdown, attacked, guarantee, verdict
from fedistill.site.job import versions
from fedistill.synthetic.store import load_set

FORMAT = "fedistill-summary/1"
FLAGS = (
    "data", "partition", "alpha", "sites", "ipc", "method", "init", "iterations", "experts", "width", "rounds", "seed", "seeds",
    "privacy", "epsilon", "delta", "unit", "preset", "out", "work",
)  # fmt: skip
Json = dict[str, Any]
PHANTOMS = 5  # real images of each class that a report on phantoms shows
ODDITIES = ("copies", "trigger", "excess", "agreement", "rest")  # figures of `synthetic.suspect`
_ENDS = {"late": "answered late"}


def write_summary(config: Config, run: Path) -> Json:
    """Write `summary.json`, `report.html` and `results.md` of the run in folder `run`, and return the summary."""
    folders = [run / f"seed-{seed}" for seed in range(config.seed, config.seed + config.seeds)]
    summary = summarise(config, run, folders)
    write_json(run / "summary.json", summary)
    write_report(run, summary)
    words = [text for text in (verdict(summary), guarantee(summary), attacked(summary)) if text]
    write_bytes(
        run / "results.md",
        "\n".join([arms_markdown(summary), "\n\n".join(words), f"\n    {summary['command']}\n"]).encode(),
    )
    return summary


def write_report(run: Path, summary: Json) -> Path:
    """Write `report.html` from the summary, and the sets and curves of the first seed that are in folder `run`; returns its path.

    No figure is computed anew, so the page of an old run tells what that run found. A copy for others (`results.fetch`) has the
    merged set only, which is divided by site.
    """
    config, folder = summary["config"], run / f"seed-{summary['seed']}"
    rounds = [path for k in range(config["rounds"], 0, -1) if (path := folder / f"round-{k}").exists()]
    sets = {s.sites[0]: s for s in map(load_set, _folders(rounds[0]))} if rounds else {}  # of the last that was run
    if not sets and (folder / "merged").exists():
        merged = load_set(folder / "merged")
        sets = {name: merged.part_of(name) for name in merged.sites}
    curves = read_json(folder / "curves.json") if (folder / "curves.json").exists() else {}
    told = {str(site["name"]): [(k, v) for k, v in curves.get(site["name"], [])] for site in summary["sites"]}
    path = run / "report.html"
    write_bytes(path, render_report(summary, sets, told, _phantoms(summary)).encode())
    return path


def _folders(of_round: Path) -> list[Path]:
    return [path.parent for path in sorted(of_round.glob("*/manifest.json"))]


def _phantoms(summary: Json) -> Split | None:
    """Some of the real images of a simulation on phantoms, the first of every class; None of anybody else's images."""
    known = {f.name for f in fields(Config)}
    config = Config(**{key: value for key, value in summary["config"].items() if key in known})
    if config.data != "phantom" or config.server_data != "same":
        return None
    train = load_data(config.with_seed(summary["seed"])).train
    groups = train.groups
    index = [torch.nonzero(groups == group).flatten()[:PHANTOMS] for group in groups.unique()]
    return train.take(torch.cat(index))


def summarise(config: Config, run: Path, folders: Sequence[Path]) -> Json:
    """The summary of the seeds in `folders`; deviations are over seeds, or over networks where there is one seed."""
    sites = [read_json(folder / "sites.json") for folder in folders]
    arms = [read_json(folder / "arms.json") for folder in folders if (folder / "arms.json").exists()]
    about = next(iter(sites[0].values()))
    class_names, kind = about["class_names"], about["kind"]
    headline = architectures(config)[0]
    if arms:
        by_model = {model: _arms([a[model] for a in arms], class_names, kind) for model in arms[0]}
    else:  # a server without data knows only what the sites counted
        pooled = [{"distilled": _pooled(folder, headline, kind)} for folder in folders]
        by_model = {headline: _arms(pooled, class_names, kind)}
    federated = _federated(folders, headline, kind, [] if config.privacy == "dp" else class_names)
    reliable = [read_json(f / "calibration.json") for f in folders if (f / "calibration.json").exists()]
    events, _ = read_events(run / "events.jsonl")
    engine = read_json(run / "engine.json") if (run / "engine.json").exists() else {}
    names = sorted({name for seed in sites for name in seed})
    described = [_site(name, [seed[name] for seed in sites if name in seed], class_names) for name in names]
    promises = _promises(folders) if config.privacy == "dp" else {}
    judged = [_suspects(folder) for folder in folders]
    for one in described:
        one["privacy"] = _promise(promises[one["name"]]) if one["name"] in promises else None
        one["suspicion"] = _suspicion(one["name"], judged)
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "versions": versions() | _versions("flwr", "numpy", "medmnist"),
        "seed": config.seed,
        "seeds": list(range(config.seed, config.seed + config.seeds)),
        "command": command_of(config),
        "data": {
            "name": Path(config.data).stem if config.server_data == "same" else None,
            "kind": kind,
            "modality": about["modality"],
            "class_names": class_names,
            "geometry": about["geometry"],
            "partition": config.partition,
            "train": sum(a["train"] for a in sites[0].values()),
            "test": sum(a["images"] for a in federated.get("distilled", {}).values()) or None,
            "fingerprint": combined(a["fingerprint"] for a in sites[0].values()),
        },
        "sites": described,
        "arms": by_model.get(headline, {}),
        "cross_architecture": {model: figures for model, figures in by_model.items() if model != headline},
        "federated": federated,
        "calibration": over_seeds(reliable) if len(reliable) == len(folders) else None,
        "privacy": _union(config, promises) if config.privacy == "dp" else None,
        "audit": _audit(run / "audit" / "audit.json"),
        "peak_memory_bytes": engine.get("peak_memory_bytes"),
        "seconds": engine.get("seconds") or (events[-1].t - events[0].t if events else None),
        "notes": [
            f"Site {s['name']} {_ENDS.get(s['status'], 'failed')} and is not in every merged set: {s['reason']}"
            for s in described
            if s["status"] != "ok"
        ]
        + _odd(described)
        + [
            f"Merge: {note}."
            for note in dict.fromkeys(j["note"] for j in judged if j.get("merge") == "robust" and j["note"])
        ]
        + _unasked(config, folders),
    }


def _promises(folders: Sequence[Path]) -> dict[str, SiteClaim]:
    """What each site promises in its sets: of several seeds the weakest."""
    found: dict[str, SiteClaim] = {}
    for folder in folders:
        for claim in read_claim(load_set(folder / "merged")).sites:
            before = found.get(claim.site, claim)
            found[claim.site] = max(before, claim, key=lambda c: math.inf if c.epsilon is None else c.epsilon)
    return found


def _promise(claim: SiteClaim) -> Json:
    return {
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "unit": claim.unit or None,
        "accountant": claim.accountant,
        "mechanisms": [in_words(m) for m in claim.mechanisms],
    }


def _union(config: Config, promises: Mapping[str, SiteClaim]) -> Json:
    """The guarantee of the union for somebody whose data are at one site: the largest epsilon and delta of the sites."""
    claim = Claim(tuple(promises.values()))
    return {
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "unit": claim.unit or None,
        "statement": claim.sentence,
        "averaging_epsilon": config.epsilon if config.fl_rounds else None,
        "alone_epsilon": config.epsilon if set(ALONE) & set(comparators(config)) else None,
        "central_epsilon": config.epsilon if "central-distilled" in comparators(config) else None,
        "answers_epsilon": config.eval_epsilon or None,
        "simulated": config.server_data == "same",
    }


def _suspects(folder: Path) -> Json:
    """What one seed's sets looked like beside each other; {} of a run from before they were compared."""
    return dict(read_json(folder / "suspects.json")) if (folder / "suspects.json").exists() else {}


def _suspicion(name: str, judged: Sequence[Json]) -> Json | None:
    """What is odd about a site's sets: figures are means over the seeds in which they are known."""
    found = [j["sites"][name] for j in judged if name in j.get("sites", {})]
    if not found:
        return None
    return {
        "reasons": list(dict.fromkeys(reason for one in found for reason in one["reasons"])),
        "seeds": len(found),
        "suspect_in": sum(bool(one["reasons"]) for one in found),
        "left_out_in": sum(one["left_out"] for one in found),
        **{key: mean_std([one[key] for one in found])["mean"] for key in ODDITIES},
    }


def _odd(described: Sequence[Json]) -> list[str]:
    """A sentence for every site whose set is suspect."""
    notes = []
    for site in described:
        odd = site["suspicion"] or {"reasons": []}
        if odd["reasons"]:
            seeds = f" in {odd['suspect_in']} of {odd['seeds']} seeds" if odd["seeds"] > 1 else ""
            times = f" in {odd['left_out_in']} of them" if odd["seeds"] > 1 else ""
            done = f"was left out of the merged set{times}" if odd["left_out_in"] else "was merged all the same"
            notes.append(
                f"The set of site {site['name']} is suspect{seeds} and {done}: it {'; it '.join(odd['reasons'])}."
            )
    return notes


def _audit(file: Path) -> Json | None:
    """What an attack on the largest site showed, where there was one."""
    if not file.exists():
        return None
    found = read_json(file)
    shown = ("claimed_epsilon", "epsilon_lower", "ceiling", "confidence", "delta", "contradicts", "power")
    keys = ("site", "canaries", "shadows", *shown)
    return {key: found[key] for key in keys} | {key: found["copies"][key] for key in ("images", "exact", "red_flag")}


def _unasked(config: Config, folders: Sequence[Path]) -> list[str]:
    """What is not known because it was not paid for."""
    notes = []
    if config.privacy == "dp" and not config.eval_epsilon:
        notes.append(
            "How the global models do on the sites' own images is not known: answers on private images cost privacy, and "
            "eval_epsilon=0 buys none."
        )
    chosen = [read_json(folder / "elected.json") for folder in folders if (folder / "elected.json").exists()]
    if any(not c["by_answers"] for c in chosen):
        notes.append(
            "No site sent answers on validation images: the learning rate of the global models is 0.01, unchosen."
        )
    return notes


def command_of(config: Config) -> str:
    """The command that makes this run again: every setting that is not the default of its preset."""
    plain = make_config({"preset": config.preset}).resolved().to_dict()
    if config.server_data != "same":  # with real sites a job file says what the settings are
        own = {k: v for k, v in config.to_dict().items() if v != plain[k] and k not in ("out", "server_data")}
        return "fedistill server run FOLDER JOB.toml  # " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in own.items())
    parts = ["fedistill", "simulate"]
    for key, value in config.to_dict().items():
        if value != plain[key] or key == "preset":
            parts += [f"--{key.replace('_', '-')}", str(value)] if key in FLAGS else ["--set", f"{key}={value}"]
    return shlex.join(parts)


def _arms(seeds: Sequence[Json], class_names: Sequence[str], kind: str) -> Json:
    """Arm -> figures over seeds."""
    result = {}
    for arm in seeds[0]:
        if not all(arm in seed for seed in seeds):  # an earlier round of a seed that went on for longer
            continue
        runs = [seed[arm] for seed in seeds]
        figures: Json = {"std_over": "seeds" if len(runs) > 1 else "networks"}
        for name in NAMES[kind]:
            figures[name] = runs[0][name] if len(runs) == 1 else mean_std([r[name]["mean"] for r in runs])
        figures["per_class_recall"] = {
            name: runs[0]["per_class_recall"][c]
            if len(runs) == 1
            else mean_std([r["per_class_recall"][c]["mean"] for r in runs])
            for c, name in enumerate(class_names)
        }
        for name in ("images", "upload_bytes", "seconds"):
            figures[name] = mean_std([r[name] for r in runs])["mean"]
        figures["validation"] = {
            name: mean_std([r["validation"][name] for r in runs])["mean"]
            for name in NAMES[kind]
            if all(name in r.get("validation", {}) for r in runs)
        }
        figures["learning_rate"] = [rate for r in runs for rate in r["learning_rate"]]
        if "rounds" in runs[0]:
            figures["rounds"] = runs[0]["rounds"]
        result[arm] = figures
    return result


def _site(name: str, seeds: Sequence[Json], class_names: Sequence[str]) -> Json:
    """One site over seeds: means of its figures, and the worst of its ends."""
    done = [s for s in seeds if s.get("status") == "ok"]
    bad = [s for s in seeds if s.get("status") != "ok"]

    def mean(key: str) -> float | None:
        return mean_std([s.get(key) for s in done])["mean"]

    phases = sorted({phase for s in done for phase in s["seconds"]})
    return {
        "name": name,
        "status": bad[0].get("status", "failed") if bad else "ok",
        "reason": bad[0].get("reason", "it gave no result") if bad else "",
        "train": seeds[0]["train"],
        "images": seeds[0]["counts"],
        "phases": {phase: mean_std([s["seconds"].get(phase) for s in done])["mean"] for phase in phases},
        "upload_bytes": mean("upload_bytes"),
        "iterations": mean("iterations"),
        "skipped_iterations": mean("skipped"),
        "final_loss": mean("final_loss"),
        "synthetic_images": mean("synthetic_images"),
        "notes": list(dict.fromkeys(note for s in done for note in s["notes"])),
    }


def _federated(folders: Sequence[Path], headline: str, kind: str, class_names: Sequence[str]) -> Json:
    """How the global model does at each site, from the counts that the sites sent; they are summed over seeds.

    class_names: of the classes whose counts are shown, means over seeds; none where the counts are noisy.
    """
    totals: dict[str, torch.Tensor] = {}
    for folder in folders:
        if (folder / "federated.json").exists():
            for site, answer in read_json(folder / "federated.json").items():
                counts = torch.tensor(answer[headline])
                totals[site] = totals.get(site, torch.zeros_like(counts)) + counts
    figures: dict[str, Json] = {}
    for site, counts in totals.items():
        shares = [{"right": right / len(folders), "of": of / len(folders)} for right, of in recognised(counts, kind)]
        figures[site] = from_counts(counts, kind) | {
            "images": images_in(counts) // len(folders),
            "recognised": dict(zip(class_names, shares, strict=True)) if class_names else None,
        }
    return {"distilled": figures} if figures else {}


def _pooled(folder: Path, headline: str, kind: str) -> Json:
    """The distilled arm of one seed from the counts of all sites; there is no AUC and no deviation in counts."""
    answers, sites = read_json(folder / "federated.json"), read_json(folder / "sites.json")
    elected = read_json(folder / "elected.json") if (folder / "elected.json").exists() else {"learning_rate": {}}
    about = next(iter(sites.values()))
    counts = torch.zeros(counts_shape(len(about["class_names"]), kind), dtype=torch.int64)
    for answer in answers.values():
        counts += torch.tensor(answer[headline])
    figures = from_counts(counts, kind)
    spread: Json = {name: {"mean": figures.get(name), "std": None} for name in NAMES[kind]}
    judged = _suspects(folder).get("sites", {})
    out = {name for name, one in judged.items() if one["left_out"]}
    done = [s for name, s in sites.items() if s.get("status") == "ok" and name not in out]
    return spread | {
        "per_class_recall": [{"mean": recall, "std": None} for recall in figures["per_class_recall"]],
        "images": sum(s["synthetic_images"] for s in done),
        "upload_bytes": sum(s["upload_bytes"] for s in done),
        "seconds": None,
        "learning_rate": [rate for model, rate in elected["learning_rate"].items() if model == headline],
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
