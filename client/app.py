"""Flower ClientApp: what runs inside a hospital. Each handler decodes, makes one library call, and encodes.

A SuperNode's `--node-config 'site-config="/etc/fedistill/site.toml"'` names a file with the site's name, its data, and what it
allows (`fedistill.site.policy`). In a simulation the partition id takes its place.
Nothing leaves but JSON that the library made for release, a released synthetic set, and counts of right and wrong answers;
of an unexpected error only the fact. With privacy=dp all of that is public, or was paid for on the site's ledger.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

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
from fedistill.site.average import Local, train_alone, train_round
from fedistill.site.describe import describe, describe_privately, task_of
from fedistill.site.feasible import check_settings
from fedistill.site.folder import site_folder
from fedistill.site.gate import may_leave
from fedistill.site.job import advance, released_set
from fedistill.site.policy import Policy, read_policy
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import Arrays, decode, encode, read_arrays, strict_json

app = ClientApp()
log = logging.getLogger(__name__)

HELD_OUT = ("val", "test")
# Errors whose sentences name a site's own files.
OWN_FILES = (
    "site-config", "broken-log", "not-allowed", "bad-set", "no-set",
    "broken-ledger", "unusable-ledger", "other-format", "other-work", "broken-file",
)  # fmt: skip

LONGEST_CONFIG = 2**16  # characters
LONGEST_NAME = 100  # characters of the name of a model
MOST_SECONDS = 1e6  # of one slice
MOST_PROXIMAL = 1e6
LARGEST_LOG = 2**24  # bytes of errors.log: a server must not fill a site's disk
_RUN = re.compile(r"[A-Za-z0-9_-]{0,64}")

_loaded: dict[
    tuple[str, str, bool], tuple[Dataset, Partition | None]
] = {}  # the last data, for this process's next message


@dataclass(frozen=True)
class Site:
    name: str
    data: Dataset
    work: Path
    policy: Policy | None = None  # None: simulated

    @property
    def simulated(self) -> bool:
        return self.policy is None

    @property
    def cap(self) -> Cap | None:
        return None if self.policy is None else self.policy.cap


def refuse_real_images(config: Config) -> None:
    """Raise `FedistillError` where the server's settings would have a real site send patients' images, or start from them."""
    if config.init == "real" or method_of(config).select is not None:
        raise FedistillError(
            "real-images", f"method={config.method} with init={config.init} would send real images: no site does that."
        )


def find_site(config: Config, node: dict[str, Any], policy: Policy | None) -> Site:
    """The site that this node is, with its data. policy: None in a simulation.

    Raises `FedistillError` ("node-config") on a node that the partition has no part for, ("policy") on a job that the site refuses.
    """
    if policy is None:
        torch.set_num_threads(1)  # simulated sites share the machine: one core each
        data, parts = _load(config, config.data, split=True)
        number = int(node["partition-id"])
        if parts is None or number >= len(parts.names):
            raise FedistillError("node-config", f"The partition has no site number {number + 1}.")
        name = parts.names[number]
        return Site(name, parts.at(data, number), Path(config.work))
    policy.check_job(config)
    name = policy.name
    try:
        data, _ = _load(config, policy.data, split=False)
    except FedistillError as error:  # its sentence may name files, and files are named after patients
        _keep(error.sentence, policy.work)
        code = error.code if config.privacy == "none" else "bad-data"  # what is wrong with private data is private
        raise FedistillError(code, f"The data of site '{name}' cannot be used: errors.log there says why.") from None
    data = policy.check_data(config, dataclasses.replace(data, name=name))
    check_settings(config, task_of(data))  # before anything is spent on what cannot be done, or is not private
    return Site(name, data, policy.work, policy)


def policy_of(node: dict[str, Any]) -> Policy | None:
    """The policy of a real site, None in a simulation.

    Raises `FedistillError` where a SuperNode was started without a policy, or its policy is not understood.
    """
    if "partition-id" in node:
        return None
    if set(node) != {"site-config"} or not Path(str(node["site-config"])).is_absolute():
        raise FedistillError(
            "node-config",
            "A SuperNode of fedistill needs --node-config 'site-config=\"...\"', an absolute path, and no more.",
        )
    return read_policy(Path(str(node["site-config"])))


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
            policy = policy_of(node)
            folder = None if policy is None else policy.work
            config = _config(_job(msg))
            if policy is None:
                folder = Path(config.work)
                config = dataclasses.replace(config, workers=1)
            else:  # the data and the machine are the site's
                config = policy.at_site(config)
                config = dataclasses.replace(config, workers=min(config.worker_count(), os.cpu_count() or 1))
            content = work(msg, find_site(config, node, policy), config)
        except FedistillError as error:
            sentence = error.sentence
            if error.code in OWN_FILES and "partition-id" not in node:
                _keep(sentence, folder)
                sentence = (
                    "A file of this site's own cannot be used: errors.log there, or its SuperNode's output, says why."
                )
            content = _error(error.code, sentence)
        except Exception as error:
            _keep(traceback.format_exc(), folder)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                content = _error("disk-full", "The disk of this site is full; what was done before is kept.")
            else:
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
    number, run, seconds = _round(job, config.rounds), _run(job), _seconds(job)
    context = _context(msg, site.data) if "context" in msg.content else None
    progress = advance(
        config,
        site.data,
        site.name,
        site.work,
        seconds=seconds,
        round=number,
        context=context,
        run=run,
        cap=site.cap,
    )
    made = released_set(config, site.data, site.name, site.work, round=number, run=run) if progress.done else None
    if made is not None and site.policy is not None:
        made = may_leave(site.policy, made, config, run=run, round=number, seconds=seconds)
        if made is None:
            progress = dataclasses.replace(progress, phase="waiting", done=False)
    content = _reply(dataclasses.asdict(progress))
    if made is not None:
        arrays, text = encode(made)
        content["set"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
        content["text"] = ConfigRecord({"set": text})
    return content


@app.train("fedavg")
@answers
def average(msg: Message, site: Site, config: Config) -> RecordDict:
    """A round of federated averaging, the comparison in simulations."""
    _refuse_parameters(site, config)
    job = _job(msg)
    local = train_round(
        config,
        site.data,
        site.name,
        site.work,
        round=_round(job, config.fl_rounds),
        thetas=_models(msg),
        mu=_proximal(job),
        run=_run(job),
        cap=site.cap,
    )
    return _parameters(local)


@app.train("alone")
@answers
def alone(msg: Message, site: Site, config: Config) -> RecordDict:
    """Networks that the site trains by itself, for one-shot comparisons in simulations."""
    _refuse_parameters(site, config)
    job = _job(msg)
    names, run = _networks(job), _run(job)
    return _parameters(train_alone(config, site.data, site.name, site.work, names=names, run=run, cap=site.cap))


def _refuse_parameters(site: Site, config: Config) -> None:
    """A real site sends parameters of no network."""
    if site.simulated:
        return
    if config.privacy != "dp":
        raise FedistillError("bare-parameters", "privacy=none would send parameters as they are: no site does that.")
    raise FedistillError(
        "only-simulated", "Federated averaging is a comparison in simulations: no real site takes part."
    )


def _parameters(local: Local) -> RecordDict:
    content = _reply(local.records)
    content["models"] = ArrayRecord({name: Array(theta.numpy()) for name, theta in local.thetas.items()})
    return content


@app.evaluate("models")
@answers
def evaluate(msg: Message, site: Site, config: Config) -> RecordDict:
    """How often each global model takes one class of this site's held-out images for another, or a finding for none."""
    split = _job(msg).get("split")
    if split not in HELD_OUT:
        _bad_job(f"models are tested on {' or '.join(HELD_OUT)}")
    if site.policy is not None:
        site.policy.check_answers(config, site.data, split)
    models = _models(msg)
    if config.privacy == "dp":
        return _reply(private_answers(config, site.data, site.name, site.work, models, split, cap=site.cap))
    return _reply({
        name: confusion_at(config, site.data, name.partition("@")[0], theta, split).tolist()
        for name, theta in models.items()
    })  # fmt: skip


def _job(msg: Message) -> ConfigRecord:
    records = msg.content.config_records
    return records["job"] if "job" in records else _bad_job("it holds none")


def _config(job: ConfigRecord) -> Config:
    values = _json(job, "config")
    return make_config(values) if isinstance(values, dict) else _bad_job("its configuration is none")


def _json(job: ConfigRecord, name: str) -> Any:
    """A value of the job that travels as JSON; None where it is none."""
    text = job.get(name)
    try:
        return strict_json(text if isinstance(text, str) else "", most=LONGEST_CONFIG)
    except ValueError:
        return None


def _round(job: ConfigRecord, most: int) -> int:
    number = job.get("round")
    if type(number) is not int or not 1 <= number <= most:
        _bad_job(f"its round is not one of {most}")
    return number


def _run(job: ConfigRecord) -> str:
    word = job.get("run")
    return word if isinstance(word, str) and _RUN.fullmatch(word) else _bad_job("it has no word for the run")


def _seconds(job: ConfigRecord) -> float:
    seconds = job.get("seconds")
    if not isinstance(seconds, int | float) or not (math.isfinite(seconds) and 0 <= seconds <= MOST_SECONDS):
        _bad_job("its time is no number of seconds")
    return float(seconds)


def _proximal(job: ConfigRecord) -> float:
    mu = job.get("proximal-mu", 0.0)
    if not isinstance(mu, float) or not 0 <= mu <= MOST_PROXIMAL:
        _bad_job("its proximal-mu is no weight")
    return mu


def _networks(job: ConfigRecord) -> list[str]:
    names = _json(job, "networks")
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(n, str) and len(n) <= LONGEST_NAME for n in names)
    ):
        _bad_job("it names no networks")
    return names


def _context(msg: Message, data: Dataset) -> SyntheticSet:
    """The merged set of the round before. Raises `FedistillError` ("bad-context") where it is no set of this task."""
    text = _job(msg).get("context")
    try:
        found = decode(_arrays(msg, "context"), text if isinstance(text, str) else "", geometry=data.geometry)
    except FedistillError as error:
        raise FedistillError("bad-context", error.sentence) from None
    for what in ("class_names", "kind", "modality"):
        if getattr(found, what) != getattr(data, what):
            raise FedistillError("bad-context", f"The set of the server differs from the data in {what}.")
    return found


def _models(msg: Message) -> dict[str, torch.Tensor]:
    """Parameters `(P,)` by the name of their network."""
    arrays = _arrays(msg, "models")
    for name, theta in arrays.items():
        if len(name) > LONGEST_NAME or theta.dtype != np.float32 or theta.ndim != 1:
            raise FedistillError("bad-model", "A model of the server is no vector of parameters under a short name.")
    return {name: torch.from_numpy(theta.copy()) for name, theta in arrays.items()}


def _arrays(msg: Message, record: str) -> Arrays:
    records = msg.content.array_records
    if record not in records:
        _bad_job(f"it holds no {record}")
    return read_arrays({str(name): array.data for name, array in records[record].items()})


def _bad_job(why: str) -> NoReturn:
    raise FedistillError("bad-job", f"The job of the server cannot be read: {why}.")


def _reply(value: Any) -> RecordDict:
    return RecordDict({"reply": ConfigRecord({"json": json.dumps(value)})})


def _error(code: str, sentence: str) -> RecordDict:
    return RecordDict({"error": ConfigRecord({"code": code, "sentence": sentence})})


def _keep(text: str, folder: Path | None) -> None:
    """Append to the site's own error log; where it is not known where that is, to what the SuperNode prints."""
    if folder is None:
        log.error(text)
        return
    with suppress(OSError):  # it would leave the site as an exception's text
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "errors.log", "a", encoding="utf-8", errors="backslashreplace") as file:
            if file.tell() < LARGEST_LOG:
                file.write(text + "\n")
