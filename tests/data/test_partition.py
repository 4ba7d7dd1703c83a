from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedistill.config import Config
from fedistill.data.assemble import Part, assemble
from fedistill.data.dataset import Dataset, Split
from fedistill.data.partition import _dirichlet, _divide, partition
from fedistill.errors import FedistillError


def make(counts, sites=("all",), seed=0):
    """A data set with `counts[k]` training images of class k, in random order; half as many in val and test."""
    generator = torch.Generator().manual_seed(seed)

    def split(numbers):
        labels = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
        labels = labels[torch.randperm(len(labels), generator=generator)]
        site = torch.arange(len(labels)) % len(sites)
        return Split(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, site)

    half = [n // 2 for n in counts]
    return Dataset("toy", "generic", tuple(map(str, counts)), tuple(sites), split(counts), split(half), split(half))


def check_complete(data, parts, splits=("train", "val", "test")):
    for key in splits:
        held = torch.cat([index[key] for index in parts.index])
        assert held.dtype == torch.int64
        assert held.sort().values.tolist() == list(range(len(data.splits[key])))


def same(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(a.index, b.index, strict=True) for k in ("train", "val", "test"))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "quantity"]),
    counts=st.lists(st.integers(5, 60), min_size=2, max_size=6),
    sites=st.integers(1, 6),
    alpha=st.floats(0.05, 50),
    seed=st.integers(0, 2**31),
)
def test_disjoint_complete_and_seeded(kind, counts, sites, alpha, seed):
    data = make(counts)
    config = Config(partition=kind, sites=sites, alpha=alpha, seed=seed)
    try:
        parts = partition(data, config)
    except FedistillError as error:
        if error.code not in ("empty-site", "too-many-sites"):
            raise
        return
    assert parts.names == tuple(f"site-{i + 1}" for i in range(sites))
    check_complete(data, parts)
    assert min(len(index["train"]) for index in parts.index) >= 2
    assert same(parts, partition(data, config))


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(["iid", "dirichlet", "quantity"]), seed=st.integers(0, 2**31))
def test_another_seed_gives_another_partition(kind, seed):
    data = make([40, 50, 60])
    one, two = (partition(data, Config(partition=kind, sites=3, alpha=1.0, seed=s)) for s in (seed, seed + 1))
    assert not same(one, two)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 80), min_size=1, max_size=6),
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_divide_keeps_the_class_mix(counts, weights, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shares = torch.tensor(weights, dtype=torch.float64)
    owner = _divide(labels, shares, torch.Generator().manual_seed(seed))
    expected = shares / shares.sum()
    for k, n in enumerate(counts):
        got = torch.bincount(owner[labels == k], minlength=len(weights))
        # Each of the other sites may shift a turn by one.
        assert (got - expected * n).abs().max() <= 1 + len(weights)
    assert (torch.bincount(owner, minlength=len(weights)) - expected * len(labels)).abs().max() < 1 + 1e-9


def test_dirichlet_shares_have_the_right_spread():
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.1, 1.0, 10.0):
        draws = torch.stack([_dirichlet(4, alpha, generator) for _ in range(4000)])
        assert torch.allclose(draws.sum(1), torch.ones(4000, dtype=torch.float64))
        assert draws.mean(0) == pytest.approx([0.25] * 4, abs=0.03)
        variance = 0.25 * 0.75 / (4 * alpha + 1)
        assert draws.var(0).mean().item() == pytest.approx(variance, rel=0.08)
    assert _dirichlet(4, 0.001, generator).isfinite().all()


def test_site_follows_the_real_sites():
    data = make([40, 60], ("north", "harbour", "valley"))
    for kind in ("site", "auto"):
        parts = partition(data, Config(partition=kind))
        assert parts.names == ("north", "harbour", "valley")
        check_complete(data, parts)
        held = parts.at(data, 1)
        assert held.name == "harbour"
        assert set(held.train.site.tolist()) == set(held.test.site.tolist()) == {1}


def test_auto_is_iid_without_real_sites_and_when_another_number_is_asked_for():
    assert partition(make([20, 20]), Config()).names == ("site-1", "site-2", "site-3")
    assert len(partition(make([40, 60], ("north", "harbour", "valley")), Config(sites=5))) == 5
    assert partition(make([40, 60], ("north", "harbour", "valley")), Config(sites=3)).names[0] == "north"


def test_quantity_changes_sizes_and_not_the_mix():
    data = make([300, 100])
    parts = partition(data, Config(partition="quantity", sites=3, alpha=0.5, seed=1))
    sizes = [len(index["train"]) for index in parts.index]
    assert max(sizes) > 2 * min(sizes)
    for index in parts.index:
        share = (data.train.labels[index["train"]] == 0).float().mean()
        assert share == pytest.approx(0.75, abs=0.5 / len(index["train"]) ** 0.5)


def test_dirichlet_with_small_alpha_skews_classes():
    data = make([200, 200, 200])
    parts = partition(data, Config(partition="dirichlet", sites=3, alpha=0.1))
    shares = torch.tensor([data.at(i, "x").train.counts(3) for i in parts.index]) / 200
    assert shares.max() > 0.8


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"partition": "dirichlett"}, "did you mean 'dirichlet'"),
        ({"partition": "iid", "sites": 21}, "sites=21 is too many for 40 training images"),
        ({"partition": "site"}, "has one: choose iid"),
        ({"partition": "dirichlet", "sites": 15, "alpha": 0.01}, "larger alpha or fewer sites"),
        ({"partition": "quantity", "sites": 15, "alpha": 0.01}, "larger alpha or fewer sites"),
    ],
)
def test_impossible_partitions(values, text):
    with pytest.raises(FedistillError, match=text):
        partition(make([20, 20]), Config(**values))


def test_site_errors():
    with pytest.raises(FedistillError, match="has 2 real sites \\(a, b\\)"):
        partition(make([20, 20], ("a", "b")), Config(partition="site", sites=3))
    data = make([20, 20], ("a", "b", "c"))
    data.train.site[data.train.site == 2] = 0
    with pytest.raises(FedistillError, match="'c' of toy has no training image"):
        partition(data, Config(partition="site"))


def write(tmp_path, content):
    path = tmp_path / "parts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_training_indices_from_a_file(tmp_path):
    data = make([6, 6])
    parts = partition(data, Config(partition=write(tmp_path, {"north": [0, 1, 2], "south": [11, 4]})))
    assert parts.names == ("north", "south")
    assert [index["train"].tolist() for index in parts.index] == [[0, 1, 2], [4, 11]]
    check_complete(data, parts, ("val", "test"))
    assert [len(index["test"]) for index in parts.index] == [3, 3]


def test_all_splits_from_a_file(tmp_path):
    content = {"n": {"train": [0, 1], "val": [2], "test": []}, "s": {"train": [2, 3], "val": [], "test": [0]}}
    parts = partition(make([6, 6]), Config(partition=write(tmp_path, content)))
    assert [index["val"].tolist() for index in parts.index] == [[2], []]
    assert [index["test"].tolist() for index in parts.index] == [[], [0]]


def cut(classes, **given):
    """A data set without val and test, or with those of `given`: image i is of one colour, i."""

    def part(labels, first=0):
        colours = np.arange(first, first + len(labels), dtype=np.uint8)[:, None, None, None]
        return Part(colours, np.array(labels), np.zeros(len(labels), dtype=np.int64))

    parts = {"train": part(classes)} | {key: part(labels, 100) for key, labels in given.items()}
    return assemble("toy", "generic", ["a", "b"], ["all"], parts)


def colours(site):
    return sorted(int(image) for split in site.splits.values() for image in split.images.flatten())


def test_indices_count_the_images_as_they_lie_in_the_file_where_the_splits_are_ours(tmp_path):
    data = cut([0, 1] * 20)
    north, south = list(range(25)), list(range(25, 39))  # the last one is nobody's
    parts = partition(data, Config(partition=write(tmp_path, {"north": north, "south": south})))
    sites = [parts.at(data, place) for place in range(2)]
    assert [colours(site) for site in sites] == [north, south]
    assert all(len(site.train) for site in sites)
    assert [len(split) for split in data.splits.values()] == [28, 4, 8]
    smaller = replace(data, train=data.train.take(torch.arange(0, len(data.train), 2)))
    held = partition(smaller, Config(partition=write(tmp_path, {"north": north, "south": south}))).at(smaller, 0)
    assert set(colours(held)) < set(north)


def test_indices_and_a_given_test_split(tmp_path):
    data = cut([0, 1] * 20, test=[0, 1] * 4)
    content = {"n": {"train": list(range(30)), "test": [0]}, "s": {"train": list(range(30, 40)), "test": [7]}}
    parts = partition(data, Config(partition=write(tmp_path, content)))
    assert [colours(parts.at(data, place)) for place in range(2)] == [[*range(30), 100], [*range(30, 40), 107]]


def test_indices_of_splits_that_are_ours(tmp_path):
    data = cut([0, 1] * 20)
    content = {"n": {"train": [0], "val": [1]}, "s": {"train": [2], "val": [3]}}
    with pytest.raises(FedistillError, match="lists images of val, but toy has no such split: list them in train"):
        partition(data, Config(partition=write(tmp_path, content)))
    aside, kept = (split.images.flatten().tolist() for split in (data.test, data.train))
    with pytest.raises(FedistillError, match="site 's', train: all of its images were set aside"):
        partition(data, Config(partition=write(tmp_path, {"n": kept, "s": aside})))
    with pytest.raises(FedistillError, match="index 40 is out of range"):
        partition(data, Config(partition=write(tmp_path, {"n": [40]})))


def test_fedvck_file(tmp_path):
    content = {"client_idx": [[0, 1], [2, 3], [4]], "client_classes": [[0], [1], [0, 1]]}
    parts = partition(make([6, 6]), Config(partition=write(tmp_path, content)))
    assert parts.names == ("site-1", "site-2", "site-3")
    assert parts.index[2]["train"].tolist() == [4]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"north": [0, 12]}, "site 'north', train: index 12 is out of range, the split has 12"),
        ({"north": [0, -1]}, "index -1 is out of range"),
        ({"north": [0, 1], "south": [1]}, "site 'south', train: index 1 is listed also at site 'north'"),
        ({"north": [0, 0]}, "site 'north', train: index 0 is listed twice"),
        ({"north": []}, "site 'north', train: the list is empty"),
        ({"north": [0.5]}, "site 'north', train: the indices must be a list of whole numbers"),
        ({"north": [True]}, "whole numbers"),
        ({"north": "all"}, "whole numbers"),
        ({"north": {"val": [0]}}, "site 'north': there are no training indices"),
        ({"north": {"train": [0], "tset": [1]}}, "did you mean 'test'"),
        ({"n": {"train": [0], "val": [0]}, "s": {"train": [1]}}, "site 's', val: missing"),
        ({"client_idx": 3}, "'client_idx' must be a list"),
        ({}, "must hold"),
        ([[0], [1]], "must hold"),
        ("{", "not a readable JSON"),
        ('{"a": [0], "a": [1]}', "two entries called 'a'"),
    ],
)
def test_bad_files(tmp_path, content, text):
    with pytest.raises(FedistillError, match=text):
        partition(make([6, 6]), Config(partition=write(tmp_path, content)))


def test_missing_file_and_differing_number_of_sites(tmp_path):
    with pytest.raises(FedistillError, match="there is no such file"):
        partition(make([6, 6]), Config(partition=str(tmp_path / "no.json")))
    with pytest.raises(FedistillError, match=r"sites=3, but .* has 1 sites"):
        partition(make([6, 6]), Config(partition=write(tmp_path, {"a": [0]}), sites=3))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "quantity"]),
    n=st.integers(30, 120),
    findings=st.integers(2, 5),
    sites=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_images_with_several_findings_are_divided_whole(kind, n, findings, sites, seed):
    generator = torch.Generator().manual_seed(seed)

    def split(count):
        labels = (torch.rand(count, findings, generator=generator) < 0.3).long()
        return Split(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), labels, torch.arange(count) % 2)

    names = tuple(map(str, range(findings)))
    data = Dataset("toy", "generic", names, ("a", "b"), split(n), split(n // 2), split(n // 2), "multilabel")
    try:
        parts = partition(data, Config(partition=kind, sites=sites, alpha=1.0, seed=seed))
    except FedistillError as error:
        if error.code != "empty-site":
            raise
        return
    check_complete(data, parts)
    held = [parts.at(data, place) for place in range(len(parts))]
    assert {site.kind for site in held} == {"multilabel"}
    total = torch.tensor([site.train.counts(findings) for site in held]).sum(0).tolist()
    assert total == data.train.counts(findings)
    if kind == "iid":  # the same mix of first findings everywhere
        shares = torch.stack([torch.bincount(site.train.groups, minlength=findings + 1) for site in held])
        assert (shares.amax(0) - shares.amin(0)).max() <= 2
    by_site = partition(data, Config(partition="site"))
    assert by_site.names == ("a", "b")


def test_explicit_indices_of_several_findings(tmp_path):
    labels = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).repeat(3, 1)
    split = Split(torch.zeros(12, 1, 2, 2, dtype=torch.uint8), labels, torch.zeros(12, dtype=torch.int64))
    data = Dataset("toy", "generic", ("a", "b"), ("all",), split, split, split, "multilabel")
    (tmp_path / "p.json").write_text(json.dumps({"north": [0, 1, 2], "south": [3, 5]}))
    parts = partition(data, Config(partition=str(tmp_path / "p.json")))
    assert parts.at(data, 1).train.labels.tolist() == [[0, 0], [0, 1]]
    check_complete(data, parts, ("val", "test"))
