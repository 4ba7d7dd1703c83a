"""Speed and memory as ratios: `python simulations/benchmarks/speed.py matching|experts|private [--json]`.

matching: one outer iteration of a ConvNet of width 128 on 90 RGB images of 32 pixels: the compiled and the plain adjoint
    against one autograd graph through all student steps (what MTT's own code does), and the convolution throughput reached.
experts: images per second of parallel expert training against a single-thread loop times the cores.
private: time of an image in a private expert against one in a plain expert, by Opacus' ways to a gradient per image.

Every variant of `matching` runs in a process of its own, so that its peak of memory is its own. Quote the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleExpandedWeights
from torch import Tensor
from torch.nn import functional as F

from fedistill.config import make_config
from fedistill.data.dataset import Split
from fedistill.experts.train import Task, sgd, train_experts
from fedistill.matching.objective import mismatch
from fedistill.matching.student import Batch, adjoint, student_of, unroll
from fedistill.matching.trajectory import batch_of
from fedistill.memory import one_thread
from fedistill.models.augment import Draw
from fedistill.models.flat import Flat
from fedistill.models.loss import loss_of
from fedistill.models.nets import build
from fedistill.privacy.accounting import Mechanism
from fedistill.privacy.dpsgd import PrivateSGD
from fedistill.seeding import generator

WIDTH, IMAGES, SIZE, CLASSES = 128, 90, 32, 9


def problem(steps: int) -> tuple[Flat, Tensor, Tensor, Tensor, Tensor, list[Batch], Tensor]:
    """Network, start, target, images, labels, batches and step size."""
    rng = generator(0, "speed")
    net = Flat(build("convnet", (3, SIZE, SIZE), CLASSES, width=WIDTH, depth=3))
    start = net.initial(rng)
    target = start + 0.01 * torch.randn(net.size, generator=rng)
    images = torch.randn((IMAGES, 3, SIZE, SIZE), generator=rng)
    labels = F.one_hot(torch.arange(IMAGES) % CLASSES, CLASSES).float()
    batches = [batch_of(torch.arange(IMAGES), Draw("none"))] * steps
    return net, start, target, images, labels, batches, torch.tensor(0.01)


def unrolled(steps: int) -> None:
    """The plain reference: one graph through all steps."""
    net, start, target, images, labels, batches, alpha = problem(steps)
    images.requires_grad_(True)
    alpha.requires_grad_(True)
    theta = start.requires_grad_(True)
    for batch in batches:
        x, y = batch(images, labels)
        (g,) = torch.autograd.grad(loss_of("multiclass", net(theta, x), y), theta, create_graph=True)
        theta = theta - alpha * g
    torch.autograd.grad(mismatch(theta, start, target, torch.ones_like(start)), (images, alpha))


def exact(steps: int, compiled: bool) -> Callable[[], None]:
    """One outer iteration with the adjoint, ready to run."""
    net, start, target, images, labels, batches, alpha = problem(steps)
    student = student_of(lambda theta, x, y: loss_of("multiclass", net(theta, x), y), compiled=compiled)

    def iteration() -> None:
        path = unroll(student, start, images, labels, batches, alpha)
        lam = 2 * (path[-1] - target) / (start - target).square().sum()
        adjoint(student, path, images, labels, batches, alpha, {steps: lam})

    return iteration


@one_thread()
def child(variant: str, steps: int, repeats: int) -> dict[str, float]:
    """One variant in this process: seconds of one iteration (median), bytes at the peak."""
    run = (lambda: unrolled(steps)) if variant == "unrolled" else exact(steps, variant == "compiled")
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": median(seconds), "first": first, "peak": peak}


def base() -> int:
    """Bytes of a process that has only imported everything."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@one_thread()
def conv_throughput() -> float:
    """FLOP per second of this network's own convolutions, forward and both gradients, alone, in the better memory format."""
    reached = []
    for layout in (torch.contiguous_format, torch.channels_last):
        flop, seconds = 0.0, 0.0
        for inside, size in ((3, SIZE), (WIDTH, SIZE // 2), (WIDTH, SIZE // 4)):
            x = torch.randn((IMAGES, inside, size, size)).to(memory_format=layout).requires_grad_(True)
            w = torch.randn((WIDTH, inside, 3, 3)).to(memory_format=layout).requires_grad_(True)
            back = torch.randn((IMAGES, WIDTH, size, size)).to(memory_format=layout)
            runs = []
            for _ in range(7):
                began = time.perf_counter()
                torch.autograd.grad(F.conv2d(x, w, padding=1), (x, w), back)
                runs.append(time.perf_counter() - began)
            seconds += median(runs)
            flop += 3 * 2 * IMAGES * WIDTH * inside * 9 * size**2
        reached.append(flop / seconds)
    return max(reached)


def flop_of_iteration(steps: int) -> float:
    """FLOP in the convolutions of one outer iteration.

    The student's step takes the forward convolution and its two gradients; the adjoint takes these, two more for each of
    the gradients, and two for the forward one again. The first layer's images need no gradient in the first backward.
    """
    layers = ((3, SIZE, 2 + 6), (WIDTH, SIZE // 2, 3 + 9), (WIDTH, SIZE // 4, 3 + 9))
    return steps * sum(n * 2 * IMAGES * WIDTH * inside * 9 * size**2 for inside, size, n in layers)


def in_child(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words, "--json"], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def matching() -> dict[str, float]:
    empty = in_child("base")["peak"]
    cells = {
        (variant, steps): in_child("child", variant, str(steps), repeats)
        for variant, steps, repeats in (
            ("unrolled", 20, "1"),
            ("compiled", 20, "3"),
            ("plain", 20, "1"),
            ("compiled", 80, "1"),
        )
    }
    reference, fast, plain, long = cells.values()
    reached = flop_of_iteration(20) / fast["seconds"] / conv_throughput()
    return {
        "seconds, unrolled reference": reference["seconds"],
        "seconds, plain adjoint": plain["seconds"],
        "seconds, compiled adjoint": fast["seconds"],
        "seconds, first iteration of the compiled adjoint": fast["first"],
        "times faster than the reference, plain": reference["seconds"] / plain["seconds"],
        "times faster than the reference, compiled": reference["seconds"] / fast["seconds"],
        "peak over the reference's": fast["peak"] / reference["peak"],
        "peak over the reference's, without what imports take": (fast["peak"] - empty) / (reference["peak"] - empty),
        "peak with 80 steps over that with 20": long["peak"] / fast["peak"],
        "share of the machine's convolution throughput": reached,
    }


@one_thread()
def experts() -> dict[str, float]:
    """RGB images of 28 pixels, width 32, batch 64."""
    rng, cores = generator(0), os.cpu_count() or 1
    images = torch.randint(256, (512, 3, 28, 28), generator=rng, dtype=torch.uint8)
    train = Split(images, torch.arange(512) % 5, torch.zeros(512, dtype=torch.int64))
    task = Task((3, 28, 28), tuple("abcde"), "microscopy")

    def seconds(workers: int, each: int) -> float:
        config = make_config(
            {"experts": workers, "workers": workers, "expert_steps": each, "preset": "quick"}
        ).resolved()
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            for until in (60, each):  # the first steps warm the processes up and are not counted
                began = time.perf_counter()
                train_experts(config, task, train, Path(folder), site="a", checkpoints=until // 10, until=float("inf"))
            return time.perf_counter() - began

    alone, together = seconds(1, 460), seconds(cores, 460)
    return {
        "cores": cores,
        "images per second, one process": 400 * 64 / alone,
        "images per second, a process per core": cores * 400 * 64 / together,
        "share of a single-thread loop times cores": alone / together,
    }


@one_thread()
def private() -> dict[str, float]:
    """One thread, grey images of 28 pixels, steps of 256 images; plain and private steps take turns."""
    rng, n = generator(0), 256
    images = torch.randint(256, (n, 1, 28, 28), generator=rng, dtype=torch.uint8)
    train = Split(images, torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64))
    task, weights = Task((1, 28, 28), ("a", "b"), "xray"), torch.ones(2)
    whole = Mechanism(name="dp-sgd", sample_rate=1.0, noise_multiplier=1.0, steps=1, clip_norm=1.0)
    ways = {
        "hooks": GradSampleModule,
        "expanded weights": GradSampleModuleExpandedWeights,
        "functorch": partial(GradSampleModule, force_functorch=True),
    }
    found = {}
    for width in (16, 32):
        config = make_config({"width": width, "expert_batch": n, "privacy": "dp", "epsilon": 1.0}).resolved()
        net = task.network("convnet", config)
        step, theta = sgd(config, task, net, train, 0.01, rng), net.initial(rng)
        steps: dict[str, Callable[[], object]] = {"plain": lambda step=step, theta=theta: step(theta)}  # type: ignore[misc]
        for name, way in ways.items():
            with patch("opacus.GradSampleModule", way):
                steps[name] = PrivateSGD(config, task, "convnet", theta, whole, train, weights).step
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(12):
            for name, take in steps.items():
                began = time.perf_counter()
                take()
                if turn > 1:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - began)
        plain = median(seconds.pop("plain"))
        found[f"width {width}: images per second, plain"] = n / plain
        found |= {f"width {width}: times a plain step, {name}": median(s) / plain for name, s in seconds.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("matching", "experts", "private", "child", "base"))
    parser.add_argument("more", nargs="*")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.what == "child":
        variant, steps, repeats = given.more
        result = child(variant, int(steps), int(repeats))
    elif given.what == "base":
        result = {"peak": base()}
    else:
        result = {"matching": matching, "experts": experts, "private": private}[given.what]()
    if given.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:60s} {value:12.3f}")


if __name__ == "__main__":
    main()
