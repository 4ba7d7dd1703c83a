"""What can be checked before hours of work: settings against the task, the budget against the data."""

from __future__ import annotations

from fedistill.config import Config
from fedistill.data.dataset import Dataset
from fedistill.errors import FedistillError
from fedistill.evaluation.arms import architectures
from fedistill.evaluation.average import shown_rounds
from fedistill.evaluation.comparators import comparators
from fedistill.experts.train import Task, architectures_of
from fedistill.matching.problem import check_segment, formation_of, per_place
from fedistill.methods.registry import method_of
from fedistill.models.augment import parse_operations
from fedistill.models.flat import device_of
from fedistill.privacy.rules import check_private
from fedistill.site.describe import task_of


def check_words(config: Config) -> None:
    """Raise `FedistillError` where a setting names nothing, or does not go with another, whatever the images are."""
    method = method_of(config)
    check_private(config)
    check_segment(config, method)
    if method.experts and config.checkpoint_every > config.expert_steps:
        raise FedistillError(
            "no-checkpoint",
            f"checkpoint_every={config.checkpoint_every} is more than expert_steps={config.expert_steps}: lower it.",
        )
    if config.rounds > 1 and method.schedule is None and not method.meets_others:
        raise FedistillError(
            "not-for-method",
            f"rounds={config.rounds} needs cf or trajectory matching, and method={config.method} is neither: use cf, or one round.",
        )
    if config.patience and config.privacy == "dp":
        raise FedistillError(
            "not-private",
            f"patience={config.patience} would choose on private validation images: leave it out with privacy=dp.",
        )
    for key, value in (("fl_rounds", config.fl_rounds), ("compare", config.compare)):
        if value and config.server_data == "none":
            raise FedistillError(
                "no-comparison",
                f"{key}={value} is for comparison, on data that the server has: leave it out, or use server_data=same.",
            )
    if config.sites:
        check_quorum(config, config.sites)
    comparators(config)
    shown_rounds(config)
    if config.augment != "auto":
        parse_operations(config.augment)
    architectures_of(config)
    architectures(config)


def check_quorum(config: Config, sites: int) -> None:
    """Raise `FedistillError` where more sites must answer than take part."""
    if config.quorum > sites:
        part = "site that takes" if sites == 1 else "sites that take"
        raise FedistillError(
            "bad-value", f"quorum={config.quorum} is more than the {sites} {part} part: it can never be met."
        )


def check_settings(config: Config, task: Task) -> None:
    """`check_words`, and raise `FedistillError` where a setting cannot work here, or on images like these."""
    check_words(config)
    device_of(config.device)
    task.operations(config)
    if task.kind == "multilabel" and config.budget != "equal":
        raise FedistillError(
            "not-for-task",
            f"budget={config.budget} is by class, but here an image may have several findings: use equal.",
        )
    sides, formation = task.geometry[1:], formation_of(config, task)
    if any(side % formation for side in sides):
        raise FedistillError(
            "not-for-size",
            f"formation={formation} does not divide images of {' x '.join(map(str, sides))} pixels: leave it at 1.",
        )
    for name in (*architectures_of(config), *architectures(config)):
        task.network(name, config)


def check_budget(config: Config, data: Dataset) -> None:
    """Raise `FedistillError` when the budget asks for more synthetic images than there are real ones.

    Nothing is said where patients are protected: how many images they have is private.
    """
    if config.privacy == "dp" and config.unit == "patient":
        return
    each = data.classes  # synthetic images for each of ipc
    if data.kind == "multilabel":  # no class is cut to what it has
        each = per_place(config, task_of(data)) * data.classes
    have = len(data.train)
    if config.ipc * each <= have:
        return
    what = f"ipc={config.ipc} asks for {config.ipc * each} synthetic images, but {data.name} has only {have} training images"
    if most := have // each:
        raise FedistillError("budget", f"{what}: use ipc={most} or less.")
    if have >= data.classes:  # without formation one of each would do
        raise FedistillError("budget", f"{what}: leave formation at 1, or lower it.")
    fewer = "findings" if data.kind == "multilabel" else "classes"
    raise FedistillError(
        "budget",
        f"{what}, fewer than the {data.classes} {fewer}: add images, or in a simulation take fewer sites or another partition.",
    )
