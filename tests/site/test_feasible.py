"""What is said before the work about a budget that cannot be: the advice is the largest that can."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fedistill.config import Config, make_config
from fedistill.data.dataset import Dataset, Split
from fedistill.errors import FedistillError
from fedistill.matching.problem import Bundle, cover
from fedistill.site.describe import task_of
from fedistill.site.feasible import check_budget


def data(n: int, kind: str) -> Dataset:
    """`n` training images of four classes or findings."""
    labels = torch.arange(n) % 4
    if kind == "multilabel":
        labels = torch.nn.functional.one_hot(labels, 4)
    train = Split(torch.zeros(n, 1, 16, 16, dtype=torch.uint8), labels, torch.zeros(n, dtype=torch.int64))
    empty = train.take(torch.empty(0, dtype=torch.int64))
    return Dataset("site-2", "generic", ("a", "b", "c", "d"), ("all",), train, empty, empty, kind)


@pytest.mark.parametrize(("n", "formation"), [(9, 1), (39, 1), (40, 2), (47, 2)])
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_the_advice_is_accepted_and_no_more_is(kind: str, n: int, formation: int) -> None:
    config, site = make_config({"ipc": 50, "formation": formation}), data(n, kind)
    with pytest.raises(FedistillError, match=r"^ipc=50 asks for \d+ synthetic images, but site-2 has only") as caught:
        check_budget(config, site)
    said = re.search(r"use ipc=(\d+) or less", caught.value.sentence)
    assert said
    most = replace(config, ipc=int(said[1]))
    check_budget(most, site)
    with pytest.raises(FedistillError, match="use ipc="):
        check_budget(replace(most, ipc=most.ipc + 1), site)
    if kind == "multilabel":  # and the site itself can make it
        findings = tuple((tuple(int(k == c) for k in range(4)), count) for c, count in enumerate(site.train.counts(4)))
        assert len(cover(findings, Bundle(task_of(site), (), (0,) * 4).size(most))) <= n


@pytest.mark.parametrize(
    ("kind", "n", "formation", "sentence"),
    [
        (
            "multilabel",
            2,
            1,
            "fewer than the 4 findings: add images, or in a simulation take fewer sites or another partition",
        ),
        ("multiclass", 2, 1, "fewer than the 4 classes: add images"),
        (
            "multilabel",
            10,
            2,
            "ipc=1 asks for 16 synthetic images, but .* 10 training images: leave formation at 1, or lower it",
        ),
    ],
)
def test_no_budget_is_advised_where_none_will_do(kind: str, n: int, formation: int, sentence: str) -> None:
    with pytest.raises(FedistillError, match=sentence) as caught:
        check_budget(Config(ipc=1, formation=formation), data(n, kind))
    assert "use ipc" not in caught.value.sentence
