"""What the server asks of the sites in one seed: descriptions, synthetic sets, and the judgement of global models."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.data.public import known_modality
from fedistill.deploy import admitted_file
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures, candidates, global_models
from fedistill.evaluation.fit import LEARNING_RATES, Material, select_and_test
from fedistill.evaluation.metrics import counts_shape, from_counts, merit
from fedistill.events import EventLog
from fedistill.experts.train import Task
from fedistill.files import read_json, write_json, write_tensors
from fedistill.matching.problem import budget_of, formation_of, images_per_class, most_images
from fedistill.methods.registry import method_of
from fedistill.release.claim import check_promise
from fedistill.synthetic.check import check_set
from fedistill.synthetic.merge import merge
from fedistill.synthetic.set import SyntheticSet
from fedistill.synthetic.store import load_set, save_set
from fedistill.synthetic.suspect import influences_of, judge, select
from fedistill.wire import MAX_TEXT
from server.collect import Failure, Receive, converse, job, slice_job, wait_for_nodes, with_arrays
from server.replies import read_confusions, read_description, read_progress, read_reply, read_set

UNELECTED_RATE = 0.01  # of a server that has nothing to choose a learning rate with
WAIT_SECONDS = 300.0  # for sites to connect
WAIT_SIMULATED = 20.0  # virtual nodes are all there before the first message
MOST_POINTS = 10_000  # of a site's curve
DESCRIBE_SECONDS = 900.0  # for a connected site to say what it holds


@dataclass(frozen=True)
class Run:
    """One seed of a run: its configuration, its folder, and the way to the sites. silent: nodes that gave no answer when they
    were last asked."""

    grid: Grid
    config: Config
    folder: Path
    events: EventLog
    silent: set[int] = field(default_factory=set)

    def note(self, site: str, phase: str, status: str, **more: Any) -> None:
        self.events.add(self.config.seed, site, phase, status, **more)

    @contextmanager
    def stage(self, phase: str) -> Iterator[None]:
        """The server's own lines in the event log."""
        self.note("", phase, "start")
        try:
            yield
        except FedistillError as error:
            self.note("", phase, "failed", message=error.sentence)
            raise
        self.note("", phase, "done")

    def sites(self) -> dict[str, dict[str, Any]]:
        """Site name -> what it said of itself, its status, and the figures of its work."""
        return self._read("sites.json")

    @property
    def private(self) -> bool:
        return self.config.privacy == "dp"

    @property
    def may_ask(self) -> bool:
        """Whether sites are asked for their models' answers on private images."""
        return not self.private or self.config.eval_epsilon > 0

    @property
    def word(self) -> str:
        """Tells this run from others that share the sites' work folders."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    @property
    def admitted(self) -> dict[str, str]:
        """The nodes that the run asks: the name under which each was admitted, by number; empty without `fedistill server run`."""
        file = admitted_file(self.folder.parent)
        return dict(read_json(file)) if file.exists() else {}

    def record(self, name: str, **facts: Any) -> None:
        """Add to what is known of a site."""
        sites = self.sites()
        self._write("sites.json", sites, {name: sites.get(name, {}) | facts})

    def curve(self, site: str, points: list[list[float]]) -> None:
        """Add losses to a site's curve; a slice that was worked twice replaces its own points."""
        if points:
            curves = self._read("curves.json")
            known = dict(map(tuple, [*curves.get(site, []), *points][:MOST_POINTS]))
            self._write("curves.json", curves, {site: [[k, known[k]] for k in sorted(known)]})

    def set_folder(self, round: int, site: str) -> Path:
        return self.folder / f"round-{round}" / f"site-{quote(site, safe='')}"

    def merged_folder(self, round: int) -> Path:
        """The merged set of a round; that of the run is in `merged`."""
        return self.folder / f"merged-{round}"

    def _read(self, name: str) -> dict[str, Any]:
        return dict(read_json(self.folder / name)) if (self.folder / name).exists() else {}

    def _write(self, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        write_json(self.folder / name, {**old, **new})


def describe_sites(run: Run, expected: int, simulated: Sequence[str] = ()) -> tuple[dict[int, str], int]:
    """Wait for `expected` nodes and ask what they hold: the site at each node, and how many must finish.

    simulated: the names that the sites of a simulation must have.
    Raises `FedistillError` if too few answer, if two say that they are the same site, or if one is a stranger.
    """
    wait = WAIT_SIMULATED if simulated else WAIT_SECONDS
    admitted = {} if simulated else run.admitted
    nodes = wait_for_nodes(run.grid, expected, run.config.quorum or -(-expected // 2), wait, admitted or None)
    if simulated and len(nodes) != expected:
        raise FedistillError(
            "wrong-nodes", f"The data have {expected} sites, the federation {len(nodes)} SuperNodes: make them equal."
        )
    said: dict[int, dict[str, Any]] = {}

    def receive(node: int, content: RecordDict) -> None:
        about = read_description(read_reply(content), private=run.private)
        if admitted and admitted.get(str(node)) != about["site"]:
            raise FedistillError(
                "other-name",
                f"it says that it is '{about['site']}', and its key was admitted as '{admitted.get(str(node))}'",
            )
        said[node] = about

    first = dict.fromkeys(nodes, job(run.config))
    failures = _ask(run, "query.describe", first, receive, {}, min(DESCRIBE_SECONDS, run.config.deadline))
    names = {node: about["site"] for node, about in said.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise FedistillError("same-site", f"Two sites say that they are '{twice[0]}': each needs a name of its own.")
    if simulated and not set(names.values()) <= set(simulated):
        raise FedistillError(
            "wrong-nodes",
            f"The sites of the data are {', '.join(simulated)}, but the SuperNodes are "
            f"{', '.join(sorted(names.values()))}: set server_data to none for sites with data of their own.",
        )
    needed = run.config.quorum or -(-len(nodes) // 2)
    if len(names) < needed:
        raise _below(needed, len(names), [("a site", f.reason) for f in failures.values()])
    known = run.sites()
    for about in said.values():
        before = known.get(about["site"], about)
        if before["fingerprint"] != about["fingerprint"]:
            raise FedistillError(
                "other-run",
                f"The data of site '{about['site']}' have changed since this run began: choose another folder.",
            )
    for about in said.values():
        run.record(about["site"], **about)
        what = "patients" if run.private and run.config.unit == "patient" else "images"
        run.note(about["site"], "describe", "done", message=f"{about['train']} training {what}")
    return names, needed


def agree(sites: Mapping[str, Mapping[str, Any]]) -> Task:
    """The task that all sites share.

    Raises `FedistillError` naming a site that differs, or a class that nobody has, where the sites tell.
    """
    for what in ("class_names", "kind", "geometry", "modality"):
        common = Counter(str(about[what]) for about in sites.values()).most_common(1)[0][0]
        for name, about in sites.items():
            if str(about[what]) != common:
                raise FedistillError(
                    "sites-differ",
                    f"Site '{name}' differs in {what.replace('_', ' ')}: {about[what]} and not {common}.",
                )
    about = next(iter(sites.values()))
    told = [a["counts"] for a in sites.values() if a["counts"] is not None]
    totals = [sum(counts) for counts in zip(*told, strict=True)]
    absent = [name for name, total in zip(about["class_names"], totals, strict=bool(told)) if total == 0]
    if absent:
        raise FedistillError("absent-class", f"No site has a training image of class {', '.join(absent)}.")
    modality = known_modality(about["modality"])
    return Task(tuple(about["geometry"]), tuple(about["class_names"]), modality, about["kind"])


def collect_sets(run: Run, nodes: Mapping[int, str], task: Task, needed: int, val: Split | None = None) -> SyntheticSet:
    """Every round of distillation: the merged set of the last, or with `patience` of the best on validation. A site that fails
    later keeps its last set in it.

    val: validation images, where the server has some: with merge=robust they help to tell which sets do harm.
    Raises `FedistillError` ("quorum") if fewer than `needed` sites finish a round.
    """
    sets: dict[str, SyntheticSet] = {}
    merged: SyntheticSet | None = None
    several, best = run.config.rounds > 1, 0
    patient = several and run.config.patience > 0
    worth: dict[int, tuple[float, ...]] = {}
    for round in range(1, run.config.rounds + 1):
        there = {site: run.set_folder(round, site) for site in run.sites()}
        finished = {site: load_set(folder) for site, folder in there.items() if folder.exists()}
        if several and run.merged_folder(round).exists():  # a round that was done stays as it was
            sets.update(finished)
            merged = load_set(run.merged_folder(round))
        else:
            content = slice_job(run.config, round, run.word, merged)
            first = {node: content for node, site in nodes.items() if site not in finished}
            failures = _distil(run, nodes, first, round, task, finished)
            sets.update(finished)
            if len(finished) < needed:
                raise _below(needed, len(finished), [(nodes[node], f.reason) for node, f in failures.items()])
            merged = _merged(run, task, sets, val)
            if several:
                save_set(merged, run.merged_folder(round))
        if patient:
            found = _validated(run, nodes, task, merged, val, round)
            if found is None:
                run.note(
                    "", "collect", "note", message="no validation answers: all rounds are done, and the last counts"
                )
                worth.clear()
                patient = False
                continue
            worth[round] = found
            best = max(worth, key=lambda r: worth[r])  # of equal ones the first
            if round - best >= run.config.patience:
                run.note("", "collect", "note", message=f"no better on validation since round {best}: no more rounds")
                break
    assert merged is not None  # there is a round
    return load_set(run.merged_folder(best)) if worth else merged


def merged_sets(run: Run) -> list[SyntheticSet]:
    """The merged set of every round that was done, of several."""
    folders = (run.merged_folder(round) for round in range(1, run.config.rounds + 1))
    return [load_set(folder) for folder in folders if folder.exists()]


def _validated(
    run: Run, nodes: Mapping[int, str], task: Task, merged: SyntheticSet, val: Split | None, round: int
) -> tuple[float, ...] | None:
    """What a network that is trained on the merged set is worth on validation images: the server's own, or those of the sites;
    None where no site answers."""
    file = run.folder / f"validated-{round}.json"
    if not file.exists():
        model = architectures(run.config)[0]
        one = dataclasses.replace(run.config, eval_models=model, eval_nets=1)
        if val is not None:
            found = select_and_test(one, task, model, Material(merged.images, merged.labels), val, val)
            worth = merit(found.val_scores[0], task.kind)
        else:
            each, answered = _worth(run, nodes, task, candidates(one, task, merged))
            if not answered:
                return None
            worth = max(each.values(), default=(0.0,))  # nothing, where every network diverged
        write_json(file, {"merit": list(worth)})
    return tuple(read_json(file)["merit"])


def _merged(run: Run, task: Task, sets: Mapping[str, SyntheticSet], val: Split | None) -> SyntheticSet:
    """The union of the sets that the setting `merge` lets in. What was found about each is in `suspects.json`."""
    config, made, about = run.config, list(sets.values()), run.sites()
    ipc = images_per_class(config, task)
    counts = {site: about[site]["counts"] or [ipc] * task.classes for site in sets}
    budgets = {site: budget_of(counts[site], ipc, config.budget) for site in sets}
    robust = config.merge == "robust"
    seen = influences_of(config, task, made, val) if robust and val is not None else None
    found = judge(made, budgets, seen)
    chosen = select(found, config.merge)
    for one in found:
        if one.reasons:
            what = "left out of the merge" if one.site in chosen.left_out else "suspect, but merged"
            run.note(one.site, "collect", "note", message=f"{what}: its set {'; it '.join(one.reasons)}")
    if robust and chosen.note:
        run.note("", "collect", "note", message=chosen.note)
    sites = {one.site: one.to_dict() | {"left_out": one.site in chosen.left_out} for one in found}
    write_json(run.folder / "suspects.json", {"merge": config.merge, "note": chosen.note, "sites": sites})
    return merge([sets[site] for site in chosen.kept])


def _distil(
    run: Run,
    nodes: Mapping[int, str],
    first: Mapping[int, RecordDict],
    round: int,
    task: Task,
    finished: dict[str, SyntheticSet],
) -> dict[int, Failure]:
    """One round: slices until every site is ready; adds the sets to `finished` and to the run folder."""
    opening = "experts" if method_of(run.config).prepares else "distill"
    phases = dict.fromkeys((nodes[node] for node in first), opening)
    # where counts are private, each class may have its whole budget
    ipc = images_per_class(run.config, task)
    counts = {name: about["counts"] or [ipc] * task.classes for name, about in run.sites().items()}
    for site in phases:
        run.note(site, opening, "start")

    def receive(node: int, content: RecordDict) -> RecordDict | None:
        site, value = nodes[node], read_reply(content)
        now = read_progress(value)
        ready = now["phase"] == "ready"
        phase = {"experts": "experts", "waiting": "release"}.get(now["phase"], "distill")
        if ready and phases[site] == "release":
            phase = "release"
        if phase != phases[site]:
            run.note(site, phases[site], "done")
            run.note(site, phase, "start")
            phases[site] = phase
        if now["phase"] == "waiting":
            run.note(site, phase, "progress", message="waits for a person at the site")
        else:
            run.note(
                site, phase, "done" if ready else "progress", **{k: now[k] for k in ("step", "total", "loss", "eta")}
            )
        run.curve(site, now["curve"])
        if not ready:
            return first[node]
        policy, scale = run.config.budget, formation_of(run.config, task)
        most = most_images(task, ipc=ipc, counts=counts[site], policy=policy)
        made, sent = read_set(content, max_images=most, geometry=task.geometry, classes=task.classes)
        check_set(made, site=site, task=task, ipc=ipc, counts=counts[site], policy=policy, scale=scale)
        if run.private:
            check_promise(made, run.config, records=run.sites()[site]["train"])
        save_set(made, run.set_folder(round, site))
        finished[site] = made
        figures = {k: now[k] for k in ("seconds", "iterations", "skipped", "notes")}
        before = run.sites()[site].get("upload_bytes", 0) if round > 1 else 0
        figures |= {"final_loss": now["loss"], "upload_bytes": before + sent, "synthetic_images": len(made)}
        run.record(site, status="ok", reason="", code="", **figures)
        run.note(site, "collect", "done", message=f"{len(made)} images, {sent / 1000:.0f} kB")
        return None

    failures = _ask(run, "train.distill", first, receive, nodes, run.config.deadline, phases)
    for node, failure in failures.items():
        run.record(nodes[node], status=failure.status, reason=failure.reason, code=failure.code)
    return failures


def evaluate_at_sites(run: Run, nodes: Mapping[int, str], task: Task, merged: SyntheticSet) -> dict[str, Any]:
    """Site -> counts (`evaluation.metrics`) of each global model on its test images; sites that do not answer are left out.

    Where answers on private images are not bought (eval_epsilon=0) no site is asked.
    """
    if run.config.server_data == "same":
        models = global_models(run.config, merged, Path(run.config.work) / "evaluation")
    else:
        models = elect(run, nodes, task, merged)
    return _counts(run, nodes, task, models, "test") if run.may_ask else {}


def elect(run: Run, nodes: Mapping[int, str], task: Task, merged: SyntheticSet) -> dict[str, Tensor]:
    """The global models of a server without data: candidates of every learning rate, of which the sites' validation
    counts elect one per architecture; with no counts, the models of a middle rate. Which it was is in `elected.json`."""
    models = candidates(run.config, task, merged, LEARNING_RATES if run.may_ask else (UNELECTED_RATE,))
    worth, answered = _worth(run, nodes, task, models)
    if not answered:
        models = {name: theta for name, theta in models.items() if name.endswith(f"@{UNELECTED_RATE}")}
        run.note("", "evaluate", "note", message=f"no validation answers: learning rate {UNELECTED_RATE:g}")
    elected, rates = {}, {}
    for model in architectures(run.config):
        names = [name for name in models if name.startswith(f"{model}@")]
        if not names:
            raise FedistillError("diverged", f"Every {model} diverged on the merged set: see its contact sheet.")
        best = max(names, key=lambda name: worth[name])
        elected[model], rates[model] = models[best], float(best.partition("@")[2])
        write_tensors(run.folder / f"model-{model}.safetensors", {"theta": elected[model]}, {"model": model})
    write_json(run.folder / "elected.json", {"learning_rate": rates, "by_answers": answered})
    return elected


def _worth(
    run: Run, nodes: Mapping[int, str], task: Task, models: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[float, ...]], bool]:
    """What each model is worth by the sites' validation counts together, and whether there were any."""
    shape = counts_shape(task.classes, task.kind)
    totals = {name: torch.zeros(shape, dtype=torch.int64) for name in models}
    answers = _counts(run, nodes, task, models, "val") if run.may_ask else {}
    for tables in answers.values():
        for name, table in tables.items():
            totals[name] += torch.tensor(table)
    return {name: merit(from_counts(total, task.kind), task.kind) for name, total in totals.items()}, bool(answers)


def _counts(
    run: Run, nodes: Mapping[int, str], task: Task, models: Mapping[str, Tensor], split: str
) -> dict[str, dict[str, Any]]:
    """Site -> model -> counts (`evaluation.metrics`) on one split of the site's images."""
    results: dict[str, dict[str, Any]] = {}
    shape = counts_shape(task.classes, task.kind)
    longest = max(
        MAX_TEXT, 20 * len(models) * math.prod(shape)
    )  # 20: digits of a count, and what parts it from the next

    def receive(node: int, content: RecordDict) -> None:
        results[nodes[node]] = read_confusions(read_reply(content, longest=longest), set(models), shape)

    arrays = {name: theta.detach().cpu().numpy() for name, theta in models.items()}
    content = with_arrays(job(run.config, split=split), "models", arrays)
    _ask(run, "evaluate.models", dict.fromkeys(nodes, content), receive, nodes, run.config.deadline)
    return results


def _ask(
    run: Run,
    kind: str,
    first: Mapping[int, RecordDict],
    receive: Receive,
    nodes: Mapping[int, str],
    deadline: float,
    phases: Mapping[str, str] | None = None,
) -> dict[int, Failure]:
    """A conversation with every node in `first`, whose crashes and failures go to the event log. A node that was silent before is
    not waited for again where it is not connected."""
    other = {
        "query.describe": "describe",
        "evaluate.models": "evaluate",
        "train.fedavg": "evaluate",
        "train.alone": "evaluate",
    }.get(kind, "collect")

    def tell(node: int, status: str, message: str) -> None:
        site = nodes.get(node, "")
        phase = phases[site] if phases is not None else other
        # a node that never said its name has no line of its own: the server's goes on
        run.note(site, phase, status if site else "note", message=message if site else f"a site: {message}")

    gone = run.silent.intersection(first).difference(run.grid.get_node_ids() if run.silent else ())
    there = {node: content for node, content in first.items() if node not in gone}
    failures = converse(
        run.grid, kind, there, receive, lambda node, why: tell(node, "note", f"{why}; asking again"), deadline=deadline
    )
    failures |= dict.fromkeys(gone, Failure("failed", "it is not connected, and did not answer before"))
    run.silent.difference_update(first)
    run.silent.update(node for node, failure in failures.items() if not failure.code)
    for node, failure in failures.items():
        tell(node, failure.status, failure.reason)
    return failures


def _below(needed: int, finished: int, failures: list[tuple[str, str]]) -> FedistillError:
    sites: dict[str, list[str]] = {}
    for site, reason in sorted(failures):
        if reason:
            sites.setdefault(reason.rstrip("."), []).append(site)
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in sites.items())
    what = f"{finished} site{'s' * (finished != 1)} finished and {needed} {'are' if needed != 1 else 'is'} needed"
    return FedistillError("quorum", f"{what}. {why}." if why else f"{what}.")
