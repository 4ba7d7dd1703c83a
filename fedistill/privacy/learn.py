"""The private part of a site's work: everything here is planned, paid for on the ledger, and only then done.

What it leaves behind in the folder (noisy counts, private experts or a noisy sketch) is all that distillation is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedistill.config import Config
from fedistill.data.dataset import Split
from fedistill.data.records import Records
from fedistill.errors import FedistillError
from fedistill.experts.train import Task, expert_file, steps_done
from fedistill.files import read_json, read_tensors, write_tensors
from fedistill.matching.problem import membership
from fedistill.methods import sketch
from fedistill.methods.registry import method_of
from fedistill.models.loss import targets_of
from fedistill.privacy.accounting import Accounted, Mechanism
from fedistill.privacy.denoise import denoise
from fedistill.privacy.dpsgd import train_private_experts
from fedistill.privacy.ledger import Cap, Ledger
from fedistill.privacy.noise import noisy
from fedistill.privacy.once import begin, drop, may_have_been_used, nonce_of, use
from fedistill.privacy.plan import Plan, expert_steps, plan_of, records_by_unit, records_of
from fedistill.processes import alone

HEAVIEST = 10.0  # class weight


def learn(
    config: Config, task: Task, train: Split, folder: Path, *, site: str, ledger: Path, cap: Cap | None, until: float
) -> tuple[int, int]:
    """Work until the clock says `until`: (steps done, steps in total). A call goes on where the last one stopped.

    The whole plan is on the ledger, durably, before a record is read. Work that a kill interrupts is done again with fresh
    noise, and only what is finished is ever used: the plan covers one use of each mechanism. What was finished once and is
    gone is planned, and paid for, anew (`privacy.once`).
    Raises `FedistillError` where the plan is impossible, or more than the ledger's `cap` has left.
    """
    with alone(folder, wait=True):  # of two processes each would release a noisy result of its own
        return _learn(config, task, train, folder, site=site, ledger=ledger, cap=cap, until=until)


def _learn(
    config: Config, task: Task, train: Split, folder: Path, *, site: str, ledger: Path, cap: Cap | None, until: float
) -> tuple[int, int]:
    _forget(config, folder)
    plan_file = _plan(config, train, folder)
    plan = pay(plan_file, ledger, what=_word(config), site=site, cap=cap)
    if method_of(config).sketch:
        file = sketch_file(folder)
        if not file.exists():
            records = records_by_unit(train, plan.unit)
            sums = sketch.sketch(config, task, train.images, _targets(train, task), records)
            write_tensors(file, {"sums": noisy(sums, plan["sketch"])}, {})
        use(plan_file, file)
        return 1, 1
    weights = private_weights(config, task, train, folder, plan["counts"])
    done, total = train_private_experts(
        config, task, train, folder, mechanism=plan["dp-sgd"], weights=weights, until=until
    )
    if done == total:
        use(plan_file, *_results(config, folder))
    return done, total


def _forget(config: Config, folder: Path) -> None:
    """Remove what must not be mixed with noise that is drawn from now on."""
    plan_file, results = _plan_file(config, folder), _results(config, folder)
    if may_have_been_used(plan_file, results[0]) and not learned(config, folder):
        drop(plan_file, results)
    elif not results[0].exists():  # experts of an interrupted job learned with counts that are gone
        for result in results:
            result.unlink(missing_ok=True)


def learned(config: Config, folder: Path) -> bool:
    """Whether everything that a plan pays for is there."""
    if method_of(config).sketch:
        return sketch_file(folder).exists()
    goal = expert_steps(config)
    return counts_file(folder).exists() and all(steps_done(folder, e) >= goal for e in range(config.experts))


def plan_nonce(config: Config, folder: Path) -> str:
    """A word for the noise in `folder`: another one where it was drawn anew. Empty where there is no plan."""
    return nonce_of(_plan_file(config, folder))


def read_plan(config: Config, folder: Path) -> Plan:
    """The plan that was carried out in `folder`."""
    return load_plan(_plan_file(config, folder))


def load_plan(file: Path) -> Plan:
    """A plan that `store_plan` left."""
    stored = read_json(file)
    return Plan(
        unit=stored["unit"],
        records=stored["records"],
        mechanisms=tuple(Mechanism(**m) for m in stored["mechanisms"]),
        first=Accounted(**stored["first"]),
        second=Accounted(**stored["second"]) if stored["second"] else None,
    )


def store_plan(file: Path, plan: Plan) -> None:
    """With a nonce, which makes another spend of what is done again because it was deleted."""
    first, second = (vars(a) if a is not None else None for a in (plan.first, plan.second))
    stored = {"unit": plan.unit, "records": plan.records, "first": first, "second": second}
    begin(file, stored | {"mechanisms": [m.to_dict() for m in plan.mechanisms]})


def pay(plan_file: Path, ledger: Path, *, what: str, site: str, cap: Cap | None) -> Plan:
    """The plan in a file, once it is on the ledger. Raises `FedistillError` where `cap` forbids it."""
    plan, nonce = load_plan(plan_file), nonce_of(plan_file)
    Ledger(ledger).spend(
        key=f"{plan_file.parent.name}/{what}/{nonce}",
        data=site,
        unit=plan.unit,
        what=what,
        delta=plan.first.delta,
        mechanisms=plan.mechanisms,
        cap=cap,
    )
    return plan


def private_counts(config: Config, folder: Path) -> list[int]:
    """Images per class as far as they were paid for; 0 where the noise is larger than the count."""
    plan = read_plan(config, folder)
    if method_of(config).sketch:
        counts = read_tensors(sketch_file(folder))[0]["sums"][:, -1] / sketch.COUNT_WEIGHT
        noise = plan["sketch"].noise_multiplier * sketch.NORM / sketch.COUNT_WEIGHT
    else:
        counts = read_tensors(counts_file(folder))[0]["counts"]
        noise = plan["counts"].noise_multiplier
    return [round(n) if n > noise else 0 for n in counts.tolist()]


def denoised(config: Config, task: Task, folder: Path, paths: Sequence[Tensor]) -> list[Tensor]:
    """The trajectories `(T+1, P)` of the private experts in `folder` as matching sees them: after `config.denoise`.

    Raises `FedistillError` where nothing but noise can be told from them.
    """
    plan = read_plan(config, folder)
    sgd = plan["dp-sgd"]
    made = denoise(
        paths,
        task.network(config.model, config).sizes,
        how=config.denoise,
        step_noise=config.dp_lr * sgd.noise_multiplier * sgd.clip_norm / (sgd.sample_rate * plan.records),
        every=config.checkpoint_every,
    )
    if any(torch.equal(path[0], path[-1]) for path in made):
        raise FedistillError(
            "all-noise",
            f"What private experts learn at epsilon={config.epsilon:g} is smaller than their noise: use method=sketch, a larger "
            "epsilon, or a smaller width.",
        )
    return made


def private_sketch(folder: Path) -> Tensor:
    return read_tensors(sketch_file(folder))[0]["sums"]


def sketch_file(folder: Path) -> Path:
    return folder / "private-sketch.safetensors"


def counts_file(folder: Path) -> Path:
    return folder / "private-counts.safetensors"


def private_weights(config: Config, task: Task, train: Split, folder: Path, mechanism: Mechanism) -> Tensor:
    """Class weights `(K,)` out of the noisy counts in `folder`, which are made with `mechanism` where there are none yet."""
    records = records_by_unit(train, config.unit)
    counts = _counts(task, train, folder, records, mechanism)
    return weights_of(counts, len(records), task.kind) if config.class_weights else torch.ones(task.classes)


def weights_of(counts: Tensor, records: int, kind: str) -> Tensor:
    """Weights `(K,)` against imbalance out of noisy counts: at most 10, mean about 1 over the images."""
    n = counts.clamp_min(1.0)
    if kind == "multilabel":
        return ((records - n) / n).clamp(1 / HEAVIEST, HEAVIEST)
    weights = (n.sum() / (len(n) * n)).clamp(max=HEAVIEST)
    return weights / ((weights * n).sum() / n.sum())


def _plan(config: Config, train: Split, folder: Path) -> Path:
    """The file of the plan, which survives a kill."""
    file = _plan_file(config, folder)
    if not file.exists():
        store_plan(file, plan_of(config, records_of(train, config.unit)))
    return file


def _word(config: Config) -> str:
    return "sketch" if method_of(config).sketch else "experts"


def _plan_file(config: Config, folder: Path) -> Path:
    return folder / f"plan-{_word(config)}.json"


def _results(config: Config, folder: Path) -> list[Path]:
    """The files that the plan pays for, in the order in which they are made."""
    if method_of(config).sketch:
        return [sketch_file(folder)]
    return [counts_file(folder), *(expert_file(folder, e) for e in range(config.experts))]


def _counts(task: Task, train: Split, folder: Path, records: Records, mechanism: Mechanism) -> Tensor:
    """Noisy images per class `(K,)`: a record counts 1 in all, spread over the classes of its images."""
    file = counts_file(folder)
    if not file.exists():
        member = torch.nn.functional.normalize(_targets_by_class(train, task), dim=1)
        counts = (member * records.share[:, None]).sum(0)
        write_tensors(file, {"counts": noisy(counts, mechanism)}, {})
    return read_tensors(file)[0]["counts"]


def _targets_by_class(train: Split, task: Task) -> Tensor:
    return membership(_targets(train, task), task.kind)[:, : task.classes]


def _targets(train: Split, task: Task) -> Tensor:
    return targets_of(train.labels, task.classes, task.kind)
