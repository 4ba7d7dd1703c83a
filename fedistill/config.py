"""The one configuration schema: command line, presets, Flower's run_config and studies all fill this record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fedistill.errors import FedistillError, unknown

# Part of every key of stored work: raise it when the same settings no longer give the same result.
ALGORITHM = 4

BUDGETS = ("equal", "proportional", "sqrt")


def _key(
    default: Any,
    help: str,
    *,
    scope: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    limits = {"low": low, "high": high}
    return field(default=default, metadata={"help": help, "scope": scope, "choices": choices} | limits)


# scope of a key: what has to be computed again when it changes.
#   data    every phase          experts  experts and what follows      distill  the synthetic set and what follows
#   eval    training on the set  run      nothing: it changes how the work is carried out, never its result
#   merge   which sets are merged: part of no key, since what is trained on a merged set is stored under the set itself
@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run. A value of 0 in the keys that a preset fills means "as the preset says"."""

    data: str = _key(
        "phantom", "phantom, a MedMNIST flag, an .npz file, an image folder or a .csv manifest", scope="data"
    )
    partition: str = _key("auto", "auto, site, iid, dirichlet, quantity or a .json file of indices", scope="data")
    sites: int = _key(0, "number of sites; 0: the real sites of the data, else 3", scope="data", low=0)
    alpha: float = _key(0.3, "concentration of the dirichlet and quantity partitions", scope="data", low=1e-3)
    seed: int = _key(0, "seed of everything that is not a privacy mechanism", scope="data", low=0)
    modality: str = _key("auto", "sets normalisation and safe augmentations; auto: what the source says", scope="data")
    image_size: int = _key(0, "resize images to this many pixels; 0: as stored", scope="data", low=0, high=4096)
    task: str = _key(
        "auto",
        "multiclass, multilabel, ordinal, or auto (as the source says)",
        scope="data",
        choices=("auto", "multiclass", "multilabel", "ordinal"),
    )
    phantom_images: int = _key(900, "training images of the built-in phantoms", scope="data", low=1, high=500_000)
    phantom_classes: int = _key(4, "classes of the built-in phantoms (2 to 6)", scope="data", low=2)
    phantom_channels: int = _key(1, "1: grey, 3: colour", scope="data", low=1)
    phantom_size: int = _key(28, "pixels per side of the built-in phantoms", scope="data", low=16, high=1024)
    phantom_depth: int = _key(0, "slices of the built-in phantoms; 0: plain images", scope="data", low=0, high=1024)

    model: str = _key("convnet", "architectures of the experts, a comma list: experts take turns", scope="experts")
    width: int = _key(32, "channels of the ConvNet", scope="experts", low=1, high=1024)
    depth: int = _key(3, "blocks of the ConvNet", scope="experts", low=1, high=12)
    augment: str = _key("auto", "auto (safe for the modality), none, or a comma list of operations", scope="experts")
    class_weights: bool = _key(
        True, "class-weighted loss (weights at most 10) in every training on real images", scope="experts"
    )
    experts: int = _key(0, "expert networks per site", scope="experts", low=0, high=10000)
    expert_steps: int = _key(0, "SGD steps of an expert", scope="experts", low=0)
    expert_batch: int = _key(64, "images per expert step", scope="experts", low=1, high=65536)
    expert_lr: float = _key(0.03, "learning rate of the experts", scope="experts", low=0.0)
    checkpoint_every: int = _key(10, "expert steps between checkpoints", scope="experts", low=1)

    sketch_networks: int = _key(
        8, "public random networks whose features a sketch is made of", scope="experts", low=1, high=1000
    )
    sketch_frequencies: int = _key(256, "frequencies per network of a sketch", scope="experts", low=1, high=65536)
    sketch_scale: float = _key(0.5, "deviation of the frequencies of a sketch", scope="experts", low=1e-3, high=100.0)
    sketch_augmentations: int = _key(
        4, "versions of each real image that a sketch averages", scope="experts", low=1, high=1000
    )

    privacy: str = _key(
        "none",
        "dp: all that is made of a site's images is differentially private; needs epsilon",
        scope="experts",
        choices=("none", "dp"),
    )
    epsilon: float = _key(0.0, "privacy budget of a site's release, over all rounds", scope="experts", low=0.0)
    delta: float = _key(
        0.0, "probability left to a failure of epsilon; 0: the power of ten below 1 / records", scope="experts", low=0.0
    )
    unit: str = _key(
        "image", "whom epsilon protects: one image, or one patient", scope="experts", choices=("image", "patient")
    )
    sample_rate: float = _key(
        0.2, "chance of a record to be in a step of a private expert", scope="experts", low=1e-4, high=1.0
    )
    clip_norm: float = _key(
        1.0, "largest gradient of one record in a private expert", scope="experts", low=1e-6, high=1e6
    )
    dp_lr: float = _key(0.5, "learning rate of private experts", scope="experts", low=0.0)
    denoise: str = _key(
        "none",
        "private experts before they are matched: none, average (of checkpoints) or shrink (average, then less by the noise)",
        scope="distill",
        choices=("none", "average", "shrink"),
    )

    preset: str = _key("standard", "amount of work: quick, standard or thorough", scope="run")
    method: str = _key(
        "auto", "distillation method (see `fedistill methods`); auto: what the benchmark recommends", scope="distill"
    )
    ipc: int = _key(10, "synthetic images per class and site", scope="distill", low=1, high=100000)
    budget: str = _key(
        "equal",
        "how ipc is spread over classes: equal, or proportional to their images (proportional) or the root (sqrt)",
        scope="distill",
        choices=BUDGETS,
    )
    formation: int = _key(
        0,
        "2: keep four images of half the size (volumes: eight) in the place of one, enlarged where they are used; 3: nine of a "
        "third; 1: whole images; ipc counts places, so the bytes stay as they are; 0: 2 for dm where an image has one "
        "class and even sides of 28 pixels or more, else 1",
        scope="distill",
        low=0,
        high=8,
    )
    init: str = _key("noise", "start of the synthetic images", scope="distill", choices=("noise", "real", "phantom"))
    labels: str = _key(
        "auto",
        "hard or soft (learned) labels; auto: as the method says",
        scope="distill",
        choices=("auto", "hard", "soft"),
    )
    mask: str = _key(
        "auto",
        "parameters that are matched: none, prune, grow, drop-easy, or auto (as the method says)",
        scope="distill",
    )
    mask_keep: float = _key(
        0.9, "share of the parameters that a mask keeps (grow: to begin with)", scope="distill", low=0.01, high=1.0
    )
    overlap: str = _key(
        "auto",
        "dynamic overlap mitigation: on, off, or auto (as the method says)",
        scope="distill",
        choices=("auto", "on", "off"),
    )
    rounds: int = _key(
        1,
        "federated rounds; later rounds complement what the other sites teach, which paid little in the comparison, and with "
        "privacy lost to one",
        scope="distill",
        low=1,
    )
    iterations: int = _key(0, "outer iterations per round", scope="distill", low=0)
    syn_steps: int = _key(0, "student steps per outer iteration", scope="distill", low=0)
    syn_batch: int = _key(50, "synthetic images per student step", scope="distill", low=1, high=65536)
    segment: int = _key(4, "length of a matched segment, in checkpoints", scope="distill", low=1)
    window: float = _key(
        0.0, "share of the trajectory in which segments may start; 0: by ipc", scope="distill", low=0.0, high=1.0
    )
    image_lr: float = _key(
        50.0, "learning rate of the images, times the images per student step", scope="distill", low=0.0
    )
    label_lr: float = _key(
        0.2, "learning rate of soft labels, times the images per student step", scope="distill", low=0.0
    )
    pixel_lr: float = _key(
        0.05, "learning rate (Adam) of the images of methods that read real images", scope="distill", low=0.0
    )
    real_batch: int = _key(
        32, "real images per class and iteration of methods that read them", scope="distill", low=1, high=65536
    )
    shape_weight: float = _key(0.5, "weight of the path's shape in hop", scope="distill", low=0.0)
    compile: str = _key(
        "auto",
        "compile the student's derivatives: on, off, or auto (where it is expected to pay)",
        scope="distill",
        choices=("auto", "on", "off"),
    )
    step_lr: float = _key(0.1, "learning rate of the logarithm of the student's step size", scope="distill", low=0.0)
    skip_above: float = _key(1.5, "an iteration with a larger matching loss takes no step", scope="distill", low=0.0)

    patience: int = _key(
        0,
        "rounds that may follow the best one on validation; then no more are done, and that one counts; 0: all rounds, the last",
        scope="merge",
        low=0,
    )
    merge: str = _key(
        "all",
        "sets that are merged: all, or robust (without those that are suspect beside the others)",
        scope="merge",
        choices=("all", "robust"),
    )

    eval_models: str = _key(
        "convnet,mlp", "architectures of the global models; the first gives the headline", scope="eval"
    )
    eval_nets: int = _key(0, "global networks per arm and seed", scope="eval", low=0, high=10000)
    eval_steps: int = _key(0, "SGD steps of a global network", scope="eval", low=0)
    eval_batch: int = _key(64, "images per step of a global network", scope="eval", low=1, high=65536)

    fl_rounds: int = _key(0, "rounds of federated averaging, an arm of comparison; 0: no such arm", scope="eval", low=0)
    fl_steps: int = _key(20, "SGD steps per site and round of federated averaging", scope="eval", low=1)
    fl_lr: float = _key(
        0.0,
        "learning rate of federated averaging; 0: chosen on validation, or dp_lr with privacy=dp, where every try costs",
        scope="eval",
        low=0.0,
    )
    fl_shown: str = _key(
        "",
        "earlier rounds of federated averaging that are judged too, a comma list such as 1,10; from a tenth of fl_rounds on, the "
        "better half of the learning rates goes on",
        scope="eval",
    )
    fl_mu: float = _key(0.1, "weight of the proximal term of compare=fedprox", scope="eval", low=0.0, high=1e3)
    compare: str = _key(
        "",
        "further arms of comparison, a comma list of fedprox, ensemble, one-shot, ensemble-distilled, fedavg-distilled, "
        "central-distilled; or all",
        scope="eval",
    )
    eval_epsilon: float = _key(
        0.0,
        "with privacy=dp: what each site pays, beyond epsilon, for noisy counts of right answers; 0: it sends none",
        scope="eval",
        low=0.0,
    )
    server_data: str = _key(
        "same",
        "same: a simulation, the server may use the run's data for validation, test and comparison arms; none",
        scope="eval",
        choices=("same", "none"),
    )

    seeds: int = _key(1, "runs, with seeds seed, seed+1, ...", scope="run", low=1)
    quorum: int = _key(0, "smallest number of sites that must answer; 0: half of them", scope="run", low=0)
    deadline: float = _key(86400.0, "seconds that a site may take for one phase", scope="run", low=0.0)
    slice_seconds: float = _key(10.0, "seconds of work per message to a site", scope="run", low=0.0)
    workers: int = _key(0, "processes that train at the same time; 0: one per core", scope="run", low=0)
    device: str = _key("auto", "auto, cpu, cuda or mps", scope="run", choices=("auto", "cpu", "cuda", "mps"))
    out: str = _key("", "folder of the run", scope="run")
    work: str = _key(
        "", "folder of the sites' work, which runs may share; empty: inside the folder of the run", scope="run"
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            choices = item.metadata["choices"]
            if choices and value not in choices:
                raise unknown(f"value of {item.name}", str(value), choices)
            if low is not None and value < low:
                raise FedistillError("bad-value", f"{item.name}={value} is too small: it must be at least {low:g}.")
            if high is not None and value > high:
                raise FedistillError("bad-value", f"{item.name}={value} is too large: it must be at most {high:g}.")
        if self.preset not in PRESETS:
            raise unknown("preset", self.preset, PRESETS)
        if self.seed + self.seeds > 2**63:  # the last seed has to fit into 64 bits, as every whole number that is sent
            raise FedistillError(
                "bad-value", f"seed={self.seed} is too large for seeds={self.seeds}: the last one must be below 2^63."
            )

    def resolved(self) -> Config:
        """The recommended method for "auto", and every 0 that the preset governs replaced by the preset's amount of work."""
        method = self.method
        if method == "auto":
            method = recommended_method(self.ipc, self.rounds)
            if self.privacy == "dp":  # of what can be private, only trajectory matching has a use for what others teach
                method = "sketch" if self.rounds == 1 else "ptm"
        preset = PRESETS[self.preset] | (PRIVATE if self.privacy == "dp" else {})
        filled = {k: v for k, v in preset.items() if getattr(self, k) == 0}
        if "iterations" in filled:
            filled["iterations"] *= lightness(method, self.ipc)
        return Config(**(self.to_dict() | filled | {"method": method}))

    def window_share(self) -> float:
        """Early segments for few images, later ones for more (DATM: easy patterns first, hard ones only where there is room)."""
        return self.window or (0.3 if self.ipc <= 2 else 0.6 if self.ipc <= 20 else 1.0)

    def worker_count(self) -> int:
        """Processes that may train at the same time."""
        return self.workers or os.cpu_count() or 1

    def with_seed(self, seed: int) -> Config:
        return replace(self, seed=seed, seeds=1)

    def key(self, *scopes: str) -> str:
        """A short hash of the settings in `scopes`: results that share it can share their files."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["scope"] in scopes}
        return hashlib.sha256(json.dumps([ALGORITHM, chosen], sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PRESETS: dict[str, dict[str, int]] = {
    "quick": {"experts": 3, "expert_steps": 200, "iterations": 120, "syn_steps": 10, "eval_nets": 2, "eval_steps": 150},
    "standard": {
        "experts": 5,
        "expert_steps": 300,
        "iterations": 250,
        "syn_steps": 10,
        "eval_nets": 3,
        "eval_steps": 300,
    },
    "thorough": {
        "experts": 20,
        "expert_steps": 600,
        "iterations": 2000,
        "syn_steps": 20,
        "eval_nets": 5,
        "eval_steps": 1000,
    },
}

# Every step and every expert of private training costs noise: few of them, whatever the preset.
PRIVATE = {"experts": 1, "expert_steps": 80}

# Iterations of these methods for one of trajectory matching: they cost that much less, so a preset asks for more of them.
LIGHT = {"sketch": 5, "dm": 5, "cf": 5, "dc": 2, "dsa": 2}


def lightness(method: str, ipc: int) -> int:
    """What a preset's iterations are multiplied by: `LIGHT`, and twice that for `dm` above two images per class.

    `dm` saves the experts, and has a use for more iterations there, on validation (docs/benchmark.md, "Over sites").
    """
    return LIGHT.get(method, 1) * (2 if method == "dm" and ipc > 2 else 1)


def recommended_method(ipc: int, rounds: int = 1) -> str:
    """The method that did best on validation over sites (docs/benchmark.md): the same at every `ipc` that was tried.

    It has no use for what other sites teach in later rounds; the best that has is the next in the benchmark.
    """
    return "dm" if rounds == 1 else "cf"


def listed(text: str) -> list[str]:
    """The words of a comma list."""
    return [word.strip() for word in text.split(",") if word.strip()]


TYPES: dict[str, type] = {f.name: type(f.default) for f in fields(Config)}


def make_config(values: Mapping[str, Any]) -> Config:
    """A `Config` from names and values, which may be strings (`--set key=value`) or typed (TOML, JSON).

    Raises `FedistillError` on an unknown key, with the nearest valid one, and on a value of another type.
    """
    clean: dict[str, Any] = {}
    for raw, value in values.items():
        name = raw.replace("-", "_")
        if name not in TYPES:
            raise unknown("option", raw, TYPES)
        clean[name] = _coerce(name, value, TYPES[name])
    return Config(**clean)


def _coerce(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, str) and kind is not str:
        text = value.strip().lower()
        try:
            if kind is bool:
                return {
                    "true": True,
                    "yes": True,
                    "on": True,
                    "1": True,
                    "false": False,
                    "no": False,
                    "off": False,
                    "0": False,
                }[text]
            number = kind(text)
        except (KeyError, ValueError):
            raise FedistillError("bad-value", f"{name}={value} is not {_KINDS[kind]}.") from None
        return _finite(name, number)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(_finite(name, value))
    if type(value) is not kind:
        raise FedistillError("bad-value", f"{name}={value!r} is not {_KINDS[kind]}.")
    return int(_finite(name, value)) if isinstance(value, int) and kind is int else value


def _finite(name: str, number: float) -> float:
    if number != number or number in (float("inf"), float("-inf")):
        raise FedistillError("bad-value", f"{name}={number} is not a finite number.")
    if isinstance(number, int) and abs(number) >= 2**63:
        raise FedistillError("bad-value", f"{name} is a whole number of more than 64 bits.")
    return number


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
