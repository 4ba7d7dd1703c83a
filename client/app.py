"""Flower ClientApp: what runs inside a hospital. Each handler decodes, makes one library call, and encodes.

A site's node configuration (`node.py`) names it, and says what it allows. In a simulation the partition id takes its place.
Nothing leaves but JSON that the library made for release, a released synthetic set, and counts of right and wrong answers;
of an unexpected error only the fact. With privacy=dp all of that is public, or was paid for on the site's ledger.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.node import rules_of
from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset
from fedistill.data.partition import Partition, partition
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import confusion_at
from fedistill.methods.registry import method_of
from fedistill.privacy.answers import private_answers
from fedistill.privacy.ledger import Cap
from fedistill.privacy.plan import delta_of, records_of
from fedistill.site.average import train_round
from fedistill.site.describe import describe, describe_privately
from fedistill.site.folder import site_folder
from fedistill.site.job import advance, released_set
from fedistill.wire import decode, encode

app = ClientApp()

HELD_OUT = ("val", "test")
OWN_FILES = ("broken-ledger", "unusable-ledger", "other-format", "other-work")  # errors whose sentences name them

_loaded: dict[
    tuple[str, str, bool], tuple[Dataset, Partition | None]
] = {}  # the last data, for this process's next message


@dataclass(frozen=True)
class Site:
    name: str
    data: Dataset
    work: Path
    simulated: bool
    cap: Cap | None = None


def refuse_real_images(config: Config) -> None:
    """Raise `FedistillError` where the server's settings would have a real site send patients' images, or start from them."""
    if config.init == "real" or method_of(config).select is not None:
        raise FedistillError(
            "real-images", f"method={config.method} with init={config.init} would send real images: no site does that."
        )


def find_site(config: Config, node: dict[str, Any]) -> Site:
    """The site that this node is, with its data.

    Raises `FedistillError` ("node-config") on a node that names no site, or that the partition has no part for.
    """
    if "partition-id" in node:
        torch.set_num_threads(1)  # simulated sites share the machine: one core each
        data, parts = _load(config, config.data, split=True)
        number = int(node["partition-id"])
        if parts is None or number >= len(parts.names):
            raise FedistillError("node-config", f"The partition has no site number {number + 1}.")
        name = parts.names[number]
        return Site(name, parts.at(data, number), Path(config.work), True)
    rules = rules_of(node)
    rules.check(config)
    name = str(node["site"])
    try:
        data, _ = _load(config, str(node["data"]), split=False)
    except FedistillError as error:  # its sentence may name files, and files are named after patients
        _keep(error.sentence, Path(str(node["work-dir"])))
        code = error.code if config.privacy == "none" else "bad-data"  # what is wrong with private data is private
        raise FedistillError(code, f"The data of site '{name}' cannot be used: errors.log there says why.") from None
    return Site(name, dataclasses.replace(data, name=name), Path(str(node["work-dir"])), False, rules.cap)


def _load(config: Config, source: str, *, split: bool) -> tuple[Dataset, Partition | None]:
    local = dataclasses.replace(config, data=source)
    key = (local.key("data"), local.privacy, split)
    if key not in _loaded:
        _loaded.clear()
        data = load_data(local)
        _loaded[key] = (data, partition(data, local) if split else None)
    return _loaded[key]


def answers(work: Callable[[Message, Site, Config], RecordDict]) -> Callable[[Message, Context], Message]:
    """A Flower handler out of `work`: errors become a code and a sentence, and tracebacks stay in the site's folder."""

    def handler(msg: Message, context: Context) -> Message:
        folder: Path | None = None
        node = dict(context.node_config)
        try:
            folder = Path(str(node["work-dir"])) if "work-dir" in node else None
            config = make_config(json.loads(str(_job(msg)["config"])))
            if "partition-id" in node:
                folder = Path(config.work)
                config = dataclasses.replace(config, workers=1)
            content = work(msg, find_site(config, node), config)
        except FedistillError as error:
            sentence = error.sentence
            if error.code in OWN_FILES and "partition-id" not in node:
                _keep(sentence, folder)
                sentence = "The ledger of this site cannot be used: errors.log there says why."
            content = _error(error.code, sentence)
        except Exception:
            _keep(traceback.format_exc(), folder)
            content = _error("internal", "An unexpected error: see errors.log in the work folder of the site.")
        return Message(content, reply_to=msg)

    return handler


@app.query("describe")
@answers
def describe_site(msg: Message, site: Site, config: Config) -> RecordDict:
    if config.privacy == "none":
        return _reply(describe(site.data, site.name))
    records = records_of(site.data.train, config.unit)
    delta_of(config, records)  # an impossible one is refused before any work
    folder = site_folder(site.work, site.name)
    return _reply(describe_privately(site.data, site.name, folder, records, config.unit))


@app.train("distill")
@answers
def distill(msg: Message, site: Site, config: Config) -> RecordDict:
    """Work for one slice; the answer carries the released set once it is ready."""
    if not site.simulated:
        refuse_real_images(config)
    job = _job(msg)
    number, run = int(job["round"]), str(job["run"])
    context = decode(_arrays(msg, "context"), str(job["context"])) if "context" in msg.content else None
    progress = advance(
        config,
        site.data,
        site.name,
        site.work,
        seconds=float(job["seconds"]),
        round=number,
        context=context,
        run=run,
        cap=site.cap,
    )
    content = _reply(dataclasses.asdict(progress))
    if progress.done:
        arrays, text = encode(released_set(config, site.data, site.name, site.work, round=number, run=run))
        content["set"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
        content["text"] = ConfigRecord({"set": text})
    return content


@app.train("fedavg")
@answers
def average(msg: Message, site: Site, config: Config) -> RecordDict:
    """A round of federated averaging, the comparison in simulations: a real site sends parameters of no network."""
    if not site.simulated and config.privacy != "dp":
        raise FedistillError("bare-parameters", "privacy=none would send parameters as they are: no site does that.")
    if not site.simulated:
        raise FedistillError(
            "only-simulated", "Federated averaging is a comparison in simulations: no real site takes part."
        )
    job = _job(msg)
    thetas = {name: torch.from_numpy(theta.copy()) for name, theta in _arrays(msg, "models").items()}
    local = train_round(
        config,
        site.data,
        site.name,
        site.work,
        round=int(job["round"]),
        thetas=thetas,
        run=str(job["run"]),
        cap=site.cap,
    )
    content = _reply(local.records)
    content["models"] = ArrayRecord({name: Array(theta.numpy()) for name, theta in local.thetas.items()})
    return content


@app.evaluate("models")
@answers
def evaluate(msg: Message, site: Site, config: Config) -> RecordDict:
    """How often each global model takes one class of this site's held-out images for another, or a finding for none."""
    split = str(_job(msg)["split"])
    if split not in HELD_OUT:
        raise FedistillError("bad-job", f"Models are tested on {' or '.join(HELD_OUT)}, not on '{split}'.")
    models = {name: torch.from_numpy(theta.copy()) for name, theta in _arrays(msg, "models").items()}
    if config.privacy == "dp":
        return _reply(private_answers(config, site.data, site.name, site.work, models, split, cap=site.cap))
    return _reply({
        name: confusion_at(config, site.data, name.partition("@")[0], theta, split).tolist()
        for name, theta in models.items()
    })  # fmt: skip


def _job(msg: Message) -> Any:
    return msg.content["job"]


def _arrays(msg: Message, record: str) -> dict[str, Any]:
    return {str(k): array.numpy() for k, array in msg.content.array_records[record].items()}


def _reply(value: Any) -> RecordDict:
    return RecordDict({"reply": ConfigRecord({"json": json.dumps(value)})})


def _error(code: str, sentence: str) -> RecordDict:
    return RecordDict({"error": ConfigRecord({"code": code, "sentence": sentence})})


def _keep(text: str, folder: Path | None) -> None:
    """Append to the site's own error log; where there is none the text goes nowhere, since it may quote private data."""
    if folder is None:
        return
    with suppress(OSError):  # it would leave the site as an exception's text
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "errors.log", "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
