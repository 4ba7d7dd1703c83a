from __future__ import annotations

import csv
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedistill import memory
from fedistill.config import Config
from fedistill.data.medmnist_source import MEDMNIST
from fedistill.data.sources import load_data, resize
from fedistill.errors import FedistillError

RNG = np.random.default_rng(0)


def arrays(n=20, shape=(8, 8), classes=2, **more):
    """The entries of a sound .npz file; `more` replaces or, with None, removes some."""
    content = {}
    for split, count in (("train", n), ("val", n // 2), ("test", n // 2)):
        content[f"{split}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = (np.arange(count) % classes)[:, None].astype(np.uint8)
    content |= more
    return {key: value for key, value in content.items() if value is not None}


def npz(folder, content, name="toy.npz"):
    np.savez(folder / name, **content)
    return str(folder / name)


def load(source, **settings):
    return load_data(Config(data=str(source), **settings))


def fails(source, text, **settings):
    with pytest.raises(FedistillError, match=text) as caught:
        load(source, **settings)
    assert caught.value.sentence.endswith((".", "?"))
    assert "\n" not in caught.value.sentence
    return caught.value


# --- .npz files -------------------------------------------------------------------------------------------------------


def test_npz_grey_and_colour(tmp_path):
    content = arrays()
    data = load(npz(tmp_path, content))
    assert (data.name, data.modality, data.geometry) == ("toy", "generic", (1, 8, 8))
    assert data.class_names == ("class 0", "class 1")
    assert data.site_names == ("all",)
    assert data.val.labels.tolist() == [0, 1] * 5
    assert np.array_equal(data.test.images[:, 0].numpy(), content["test_images"])
    content = arrays(shape=(8, 8, 3), class_names=np.array(["a", "b"]), modality=np.array("oct"))
    data = load(npz(tmp_path, content))
    assert (data.class_names, data.modality) == (("a", "b"), "oct")
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), content["train_images"])
    assert data.train.images.is_contiguous()


def test_npz_sites(tmp_path):
    sites = {f"{key}_site": np.arange(n)[:, None] % 3 for key, n in (("train", 20), ("val", 10), ("test", 10))}
    data = load(npz(tmp_path, arrays(**sites)))
    assert data.site_names == ("site-0", "site-1", "site-2")
    data = load(npz(tmp_path, arrays(**sites, site_names=np.array(["x", "y", "z"]))))
    assert data.site_names == ("x", "y", "z")
    assert data.train.site.tolist()[:4] == [0, 1, 2, 0]
    fails(npz(tmp_path, arrays(**sites, site_names=np.array(["x", "y"]))), "site_names has 2 names")
    sites.pop("val_site")
    fails(npz(tmp_path, arrays(**sites)), "'val_site' is missing")


def test_npz_floats_become_bytes(tmp_path):
    floats = RNG.random((20, 8, 8)).astype(np.float32)
    data = load(npz(tmp_path, arrays(train_images=floats)))
    assert np.abs(data.train.images[:, 0].numpy() / 255 - floats).max() <= 0.5 / 255 + 1e-6


def test_missing_splits_are_cut_stratified_and_do_not_follow_the_seed(tmp_path):
    none = dict.fromkeys(("val_images", "val_labels", "test_images", "test_labels"))
    path = npz(tmp_path, arrays(200, classes=4, **none))
    data = load(path)
    assert [split.counts(4) for split in data.splits.values()] == [[35] * 4, [5] * 4, [10] * 4]
    assert data.fingerprint == load(path, seed=7).fingerprint
    only_val = npz(tmp_path, arrays(80, val_images=None, val_labels=None), "b.npz")
    assert [len(split) for split in load(only_val).splits.values()] == [70, 10, 40]


def test_groups_stay_together_when_splits_are_cut(tmp_path):
    none = dict.fromkeys(("val_images", "val_labels", "test_images", "test_labels"))
    group = np.arange(200) // 4
    images = np.broadcast_to(group[:, None, None], (200, 8, 8)).astype(np.uint8)
    labels = group % 2
    data = load(
        npz(tmp_path, arrays(200, **none) | {"train_images": images, "train_labels": labels, "train_group": group})
    )
    held = [set(split.images[:, 0, 0, 0].tolist()) for split in data.splits.values()]
    assert sum(map(len, held)) == 50
    assert set.union(*held) == set(range(50))
    assert [len(split) for split in data.splits.values()] == pytest.approx([140, 20, 40], abs=8)
    assert data.train.patient is None  # a group may be less than a patient


def test_npz_patients(tmp_path):
    none = dict.fromkeys(("val_images", "val_labels", "test_images", "test_labels"))
    shade = np.arange(200) // 4
    images = np.broadcast_to(shade[:, None, None], (200, 8, 8)).astype(np.uint8)
    content = arrays(200, **none) | {"train_images": images, "train_labels": shade % 2}
    content["train_site"] = np.arange(200) % 2  # every patient was at both sites
    names = np.array([f"p{s}" for s in shade])[:, None]
    data = load(npz(tmp_path, content | {"train_patient": names}))
    for split in data.splits.values():
        shades = split.images[:, 0, 0, 0]
        assert split.patient.dtype == torch.int64
        assert torch.equal(split.patient[:, None] == split.patient, shades[:, None] == shades)
    held = [set(split.images[:, 0, 0, 0].tolist()) for split in data.splits.values()]
    assert sum(map(len, held)) == 50
    index = torch.tensor([7, 3, 3])
    assert torch.equal(data.train.take(index).patient, data.train.patient[index])
    assert torch.equal(data.at(dict.fromkeys(data.splits, index), "north").train.patient, data.train.patient[index])
    assert torch.equal(load(tmp_path / "toy.npz", image_size=4).train.patient, data.train.patient)
    # Whoever compares what two sites hold must not be told who is whose patient.
    assert data.fingerprint == replace(data, train=replace(data.train, patient=None)).fingerprint
    fails(npz(tmp_path, content | {"train_patient": names[:7]}), "'train_patient' has 7 entries for 200 images")
    both = {"train_patient": names, "train_group": names}
    fails(npz(tmp_path, content | both), "both 'train_patient' and 'train_group' are given")
    lonely = np.where(shade < 9, np.nan, shade)
    fails(npz(tmp_path, content | {"train_patient": lonely}), "'train_patient' holds NaN")
    fails(npz(tmp_path, arrays(200) | {"train_patient": names}), "'val_patient' is missing")


def test_npz_without_patients(tmp_path):
    assert all(split.patient is None for split in load(npz(tmp_path, arrays())).splits.values())
    whole = arrays(train_patient=np.arange(20) // 2, val_patient=np.arange(10)[::-1] + 50, test_patient=np.full(10, 99))
    train, val, test = (split.patient.tolist() for split in load(npz(tmp_path, whole)).splits.values())
    assert train == sorted(train)
    assert (len(set(train)), len(set(val)), len(set(test))) == (10, 10, 1)
    fails(npz(tmp_path, whole | {"test_patient": np.full(10, 3)}), "some patient is in 'train' and in 'test'")


def test_private_work_does_not_tell_which_classes_have_images(tmp_path):
    lacking = arrays(train_labels=np.zeros(20, int), class_names=np.array(["a", "b"]))
    fails(npz(tmp_path, lacking), "no training image of the class 'b'")
    data = load(npz(tmp_path, lacking), privacy="dp", epsilon=1.0)
    assert (data.class_names, data.train.counts(2)) == (("a", "b"), [20, 0])


def several(n, findings=3):
    """Findings `(n, K)`: some images with none, some with more than one, every finding in some image."""
    labels = np.zeros((n, findings), np.int64)
    for i in range(n):
        labels[i, [i % findings, (i + 1) % findings][: i // findings % 3]] = 1
    return labels


def findings(n=20, count=3):
    return {f"{key}_labels": several(m, count) for key, m in (("train", n), ("val", n // 2), ("test", n // 2))}


def test_npz_with_several_findings(tmp_path):
    content = arrays(60, **findings(60))
    data = load(npz(tmp_path, content))
    assert (data.kind, data.class_names) == ("multilabel", ("finding 0", "finding 1", "finding 2"))
    assert np.array_equal(data.train.labels.numpy(), content["train_labels"])
    assert data.train.counts(3) == content["train_labels"].sum(0).tolist()
    first = [(row.tolist().index(1) if row.any() else 3) for row in content["train_labels"]]
    assert data.train.groups.tolist() == first
    assert load(npz(tmp_path, content | {"class_names": np.array(["a", "b", "c"])})).class_names == ("a", "b", "c")
    fails(npz(tmp_path, content | {"class_names": np.array(["a", "b"])}), "3 columns, but class_names has 2")
    nobody = content | {"train_labels": content["train_labels"] * [1, 0, 1]}
    fails(npz(tmp_path, nobody), "no training image of the class 'finding 1'")


def test_missing_splits_of_several_findings_are_cut_by_the_first(tmp_path):
    none = dict.fromkeys(("val_images", "val_labels", "test_images", "test_labels"))
    data = load(npz(tmp_path, arrays(200, train_labels=several(200), **none)))
    assert [len(split) for split in data.splits.values()] == pytest.approx([140, 20, 40], abs=3)
    whole = np.bincount(torch.cat([split.groups for split in data.splits.values()]), minlength=4)
    assert np.abs(np.bincount(data.train.groups, minlength=4) - 0.7 * whole).max() <= 2


def test_task_override(tmp_path):
    grades, chest = npz(tmp_path, arrays()), npz(tmp_path, arrays(60, **findings(60)), "chest.npz")
    assert [load(grades, task=task).kind for task in ("auto", "multiclass", "ordinal")] == [
        "multiclass",
        "multiclass",
        "ordinal",
    ]
    assert load(grades).fingerprint != load(grades, task="ordinal").fingerprint
    assert load(chest, task="multilabel").kind == "multilabel"
    assert fails(grades, "toy has one label per image", task="multilabel").code == "task-unfit"
    fails(chest, "task=ordinal needs one label per image, but chest has several", task="ordinal")
    fails(chest, "task=multiclass needs one label", task="multiclass")


def test_npz_volumes(tmp_path):
    content = arrays(shape=(6, 8, 8))
    data = load(npz(tmp_path, content))
    assert data.geometry == (1, 6, 8, 8)
    assert np.array_equal(data.train.images[:, 0].numpy(), content["train_images"])
    colour = arrays(shape=(6, 8, 8, 3))
    data = load(npz(tmp_path, colour))
    assert data.geometry == (3, 6, 8, 8)
    assert np.array_equal(data.train.images.movedim(1, -1).numpy(), colour["train_images"])
    assert load(npz(tmp_path, content), image_size=5).geometry == (1, 5, 5, 5)
    fails(npz(tmp_path, arrays(shape=(6, 8, 10))), "10x8 pixels: set image_size")


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8)])
def test_images_that_do_not_fit_into_memory_are_not_enlarged(shape, tmp_path, monkeypatch):
    file = npz(tmp_path, arrays(shape=shape))
    images = sum(map(len, load(file).splits.values()))
    size = images * 32 ** len(shape)
    monkeypatch.setattr(memory, "free_memory", lambda: size)
    assert load(file, image_size=32).geometry[1:] == (32,) * len(shape)
    monkeypatch.setattr(memory, "free_memory", lambda: size - 1)
    fails(file, "ask for less", image_size=32)
    assert load(file).geometry[1:] == shape


def test_what_the_system_says_of_its_memory_is_in_bytes():
    if not Path("/proc/meminfo").exists():
        assert memory.free_memory() is None
        return
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * int(lines["MemTotal"].split()[0])
    assert total / 1000 < memory.free_memory() < total


def test_resizing_a_volume_is_resizing_along_every_axis():
    ramp = (torch.arange(12.0)[:, None, None] * 20).expand(1, 1, 12, 8, 8).to(torch.uint8)
    small = resize(ramp, 4)
    assert small.shape == (1, 1, 4, 4, 4)
    assert (small - small[..., :1, :1]).abs().max() == 0  # along the depth alone
    deep = small[0, 0, :, 0, 0].float()
    assert torch.allclose(deep, torch.tensor([20.0, 80, 140, 200]), atol=5)
    turned = resize(ramp.transpose(2, 4), 4).transpose(2, 4)
    assert (turned.float() - small.float()).abs().max() <= 1


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"train_images": None}, "'train_images' is missing"),
        ({"test_labels": None}, "'test_labels' is missing"),
        ({"train_images": np.zeros((20, 8, 8), np.uint16)}, "must be uint8, or floats from 0 to 1, not uint16"),
        ({"train_images": np.zeros((20, 8), np.uint8)}, r"shape \(n, H, W\) or \(n, H, W, 3\), .*not \(20, 8\)"),
        ({"train_images": np.zeros((20, 8, 8, 4), np.uint8)}, r"not \(20, 8, 8, 4\)"),
        ({"train_images": np.zeros((20, 3, 8, 8, 8), np.uint8)}, "channels come last"),
        ({"train_images": np.zeros((20, 8, 8, 8), np.uint8)}, "different shapes"),
        ({"train_images": np.zeros((20, 3, 8, 8), np.uint8)}, "channels come last"),
        ({"train_images": np.zeros((20, 0, 8), np.uint8)}, "without pixels"),
        ({"val_images": np.zeros((0, 8, 8), np.uint8), "val_labels": np.zeros(0, int)}, "val split of toy is empty"),
        ({"val_images": np.zeros((10, 9, 9), np.uint8)}, "different shapes"),
        ({"train_images": np.full((20, 8, 8), np.nan)}, "NaN or infinite"),
        ({"train_images": np.full((20, 8, 8), 255.0)}, "floats from 255 to 255: scale them"),
        ({"train_labels": np.zeros((19, 1), np.uint8)}, "has 19 entries for 20 images"),
        ({"train_labels": np.zeros((20, 14), np.uint8)}, "some splits have several columns"),
        ({"train_labels": np.full((20, 3), 2)}, "3 columns, which must hold 0 or 1"),
        ({"train_labels": np.full((20, 3), 0.5)}, "3 columns, which must hold 0 or 1"),
        ({"train_labels": np.zeros((19, 3), int)}, "has 19 entries for 20 images"),
        ({"train_labels": np.zeros((20, 2, 2), int)}, r"shape \(n, 1\) or \(n,\), not \(20, 2, 2\)"),
        ({"train_labels": np.arange(20) - 1}, "negative value -1"),
        ({"train_labels": np.arange(20) / 2}, "must be integers from 0, not float64"),
        ({"train_labels": np.array([None] * 20)}, "never unpickled"),
        ({"train_labels": np.arange(20) + 1000}, "more than there are images"),
        ({"class_names": np.array(["a"])}, "'train_labels' holds 1, but class_names has 1 names"),
        ({"class_names": np.array(["a", "a"])}, "names something twice"),
        ({"class_names": np.array([1, 2])}, "must be a list of texts"),
        ({"class_names": np.array(["a", "b", "c"])}, "no training image of the class 'c'"),
        ({"modality": np.array("x-ray")}, "did you mean 'xray'"),
        (
            {"train_labels": np.zeros(20, int), "val_labels": np.zeros(10, int), "test_labels": np.zeros(10, int)},
            "class",
        ),
    ],
)
def test_bad_npz(tmp_path, more, text):
    fails(npz(tmp_path, arrays(**more)), text)


def test_one_class_and_too_few_images(tmp_path):
    none = dict.fromkeys(("val_images", "val_labels", "test_images", "test_labels"))
    assert fails(npz(tmp_path, arrays(classes=1, **none)), "at least two classes").code == "one-class"
    fails(npz(tmp_path, arrays(1, **none)), "holds 1 image")
    fails(npz(tmp_path, arrays(2, **none)), "2 training images, too few to set some aside")


def test_unreadable_npz(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"nonsense")
    fails(path, "not a complete .npz")
    path.write_bytes(b"")
    fails(path, "not a complete .npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(path)
    fails(path, "a single array")
    whole = (tmp_path / "toy.npz", npz(tmp_path, arrays(shape=(64, 64))))[0].read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "not a complete .npz")
    broken = bytearray(whole)
    broken[2000:2100] = bytes(100)
    path.write_bytes(bytes(broken))
    fails(path, "'train_images' is damaged")


# --- names, modality and size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("phantoms", "did you mean 'phantom'"),
        ("bloodmist", "did you mean 'bloodmnist'"),
        ("", "Unknown data source"),
        ("x" * 5000, "Unknown data source"),
        ("~nobody-here/a.csv", "no file or folder"),
        ("no/such.npz", "no file or folder"),
        ("absent.csv", "no file or folder"),
    ],
)
def test_unknown_sources(source, text):
    fails(source, text)


def test_another_kind_of_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    fails(path, "neither an .npz file, a .csv manifest nor an image folder")


def test_modality_override():
    assert load("phantom", phantom_images=40, modality="ct").modality == "ct"
    assert load("phantom", phantom_images=40).modality == "phantom"
    fails("phantom", "did you mean 'fundus'", modality="fondus")


def test_resize_is_antialiased_and_square(tmp_path):
    board = (np.indices((20, 16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    data = load(npz(tmp_path, arrays(shape=(16, 16), train_images=board)), image_size=4)
    assert data.geometry == (1, 4, 4)
    assert data.train.images.dtype == torch.uint8
    assert (data.train.images.float() - 127.5).abs().max() < 30  # no aliasing to 0 or 255
    wide = npz(tmp_path, arrays(shape=(8, 10, 3)), "wide.npz")
    fails(wide, "10x8 pixels: set image_size")
    assert load(wide, image_size=12).geometry == (3, 12, 12)


# --- MedMNIST ---------------------------------------------------------------------------------------------------------


def test_medmnist_from_its_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    path = npz(tmp_path, arrays(40, (28, 28, 3), 8), "bloodmnist.npz")
    data = load("bloodmnist")
    assert (data.name, data.modality, data.geometry) == ("bloodmnist", "microscopy", (3, 28, 28))
    assert data.class_names[1] == "eosinophil"
    by_path = load(path)
    assert (by_path.modality, by_path.class_names) == (data.modality, data.class_names)
    assert load("bloodmnist", image_size=32).geometry == (3, 32, 32)
    npz(tmp_path, arrays(40, (64, 64, 3), 8), "bloodmnist_64.npz")
    larger = load("bloodmnist", image_size=64)
    assert (larger.name, larger.geometry) == ("bloodmnist", (3, 64, 64))
    assert larger.fingerprint == load(tmp_path / "bloodmnist_64.npz").fingerprint


def test_medmnist_without_file_and_internet(tmp_path, monkeypatch):
    import socket

    def offline(*args, **kwargs):
        raise socket.gaierror("no internet in tests")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("no_proxy", "*")
    start = time.perf_counter()
    error = fails("breastmnist", "could not be downloaded: fetch it from https://zenodo.org/.*breastmnist.npz and put")
    assert str(tmp_path / "root" / "breastmnist.npz") in error.sentence
    assert time.perf_counter() - start < 15
    assert list((tmp_path / "root").iterdir()) == []
    assert socket.getdefaulttimeout() is None
    fails("breastmnist", "breastmnist_64.npz", image_size=64)


def test_medmnist_table_agrees_with_the_package():
    from medmnist.info import INFO

    assert set(MEDMNIST) == set(INFO)
    kinds = {"multi-label, binary-class": "multilabel", "ordinal-regression": "ordinal"}
    for flag, about in MEDMNIST.items():
        assert about.class_names == tuple(INFO[flag]["label"].values())
        assert about.kind == kinds.get(INFO[flag]["task"], "multiclass")


def test_medmnist_kinds_and_volumes(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    findings = {f"{key}_labels": several(n, 14) for key, n in (("train", 60), ("val", 30), ("test", 30))}
    npz(tmp_path, arrays(60, **findings), "chestmnist.npz")
    npz(tmp_path, arrays(60, (8, 8, 3), 5), "retinamnist.npz")
    npz(tmp_path, arrays(60, (28, 28, 28), 11), "organmnist3d.npz")
    npz(tmp_path, arrays(60, (64, 64, 64), 2), "vesselmnist3d_64.npz")
    chest, retina, organs = load("chestmnist"), load("retinamnist"), load("organmnist3d")
    assert (chest.kind, chest.modality, chest.classes) == ("multilabel", "xray", 14)
    assert (retina.kind, load("retinamnist", task="multiclass").kind) == ("ordinal", "multiclass")
    assert load(tmp_path / "retinamnist.npz").kind == "ordinal"
    assert (organs.geometry, organs.kind, organs.modality) == ((1, 28, 28, 28), "multiclass", "ct")
    assert load("vesselmnist3d", image_size=64).geometry == (1, 64, 64, 64)
    assert load("organmnist3d", image_size=16).geometry == (1, 16, 16, 16)


# --- image folders ----------------------------------------------------------------------------------------------------


def picture(path, size=(8, 8), mode="RGB", value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folder(root, classes=("cat", "dog"), n=10, **how):
    for k, name in enumerate(classes):
        for i in range(n):
            picture(root / name / f"{i}.png", value=20 * k + i, **how)
    return root


def test_folder_of_classes(tmp_path):
    root = folder(tmp_path / "set", ("grade 10", "grade 2"))
    (root / "README.txt").write_text("about")
    (root / "grade 2" / ".hidden").write_text("x")
    data = load(root)
    assert data.class_names == ("grade 2", "grade 10")  # numbers by value
    assert (data.name, data.geometry, data.modality) == ("set", (3, 8, 8), "generic")
    assert [len(split) for split in data.splits.values()] == [14, 2, 4]
    shades = torch.cat([split.images[:, 0, 0, 0] for split in data.splits.values()])
    labels = torch.cat([split.labels for split in data.splits.values()])
    assert sorted(shades.tolist()) == [*range(10), *range(20, 30)]
    assert torch.equal(labels, (shades < 20).long())


def test_folder_with_splits(tmp_path):
    for split, n in (("Training", 4), ("test", 2)):
        folder(tmp_path / split, n=n, mode="L")
    data = load(tmp_path)
    assert data.geometry == (1, 8, 8)
    assert [len(split) for split in data.splits.values()] == [6, 2, 4]
    folder(tmp_path / "validation", n=3, mode="L")
    assert [len(split) for split in load(tmp_path).splits.values()] == [8, 6, 4]
    folder(tmp_path / "train", n=1, mode="L")
    fails(tmp_path, "two folders for train")


def test_bad_folders(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(empty, "has no subfolders")
    (empty / "a").mkdir()
    (empty / "b").mkdir()
    fails(empty, "holds no images")
    one = folder(tmp_path / "one", ("only",))
    fails(one, "at least two classes")
    bare = folder(tmp_path / "bare")
    (bare / "emu").mkdir()
    fails(bare, "no training image of the class 'emu'")
    stray = folder(tmp_path / "stray")
    picture(stray / "x.png")
    fails(stray, "x.png lies outside the class folders")
    deep = folder(tmp_path / "deep")
    (deep / "cat" / "more").mkdir()
    fails(deep, "must hold only images")
    dicom = folder(tmp_path / "dicom")
    (dicom / "cat" / "a.dcm").write_text("x")
    fails(dicom, "a.dcm is no image of a kind that is read")
    beside = folder(tmp_path / "beside" / "train").parent
    folder(beside / "extra")
    fails(beside, "extra lies beside train")
    untrained = folder(tmp_path / "untrained" / "test").parent
    fails(untrained, "has no training images")


def test_mixed_images(tmp_path):
    root = folder(tmp_path / "set")
    picture(root / "dog" / "3.png", size=(9, 8))
    fails(root, r"cat/0.png has 8x8 pixels and .*dog/3.png has 9x8: set image_size")
    assert load(root, image_size=6).geometry == (3, 6, 6)
    picture(root / "dog" / "3.png", mode="L")
    fails(root, r"dog/3.png is grey and .*cat/0.png is colour", image_size=6)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_unreadable_image(tmp_path, content):
    root = folder(tmp_path)
    (root / "dog" / "3.png").write_bytes(content)
    fails(root, "Cannot read .*dog/3.png as an image")


def test_truncated_image(tmp_path):
    root = folder(tmp_path)
    whole = picture(root / "dog" / "3.png", size=(64, 64)).read_bytes()
    (root / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    fails(root, "Cannot read .*dog/3.png", image_size=8)


def test_colour_modes(tmp_path):
    """What can be read without loss is; the rest is refused."""
    colour = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    root = folder(tmp_path)
    spot = root / "dog" / "3.png"
    for image in (colour.convert("RGBA"), colour.quantize(16)):
        image.save(spot)
        assert load(root).geometry == (3, 8, 8)
    clear = colour.convert("RGBA")
    clear.putalpha(100)
    deep = Image.fromarray(RNG.integers(0, 65536, (8, 8), dtype=np.uint16))
    for image, text in ((clear, "transparent pixels"), (deep, "more than 8 bits")):
        image.save(spot)
        fails(root, f"3.png has {text}")
    spot.unlink()
    colour.convert("CMYK").save(spot.with_suffix(".jpg"))
    fails(root, "colour mode CMYK")
    spot.with_suffix(".jpg").unlink()
    colour.save(spot.with_suffix(".tif"), save_all=True, append_images=[colour])
    fails(root, "holds 2 frames")


def test_grey_variants(tmp_path):
    root = folder(tmp_path, mode="L")
    grey = Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8))
    for image in (grey.convert("1"), grey.convert("LA"), grey.convert("P")):
        image.save(root / "dog" / "3.png")
        assert load(root).geometry == (1, 8, 8)


def test_four_thousand_images_are_read_in_seconds(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / name / "0.png", size=(64, 64))
        for i in range(1, 2000):
            os.link(tmp_path / name / "0.png", tmp_path / name / f"{i}.png")
    start = time.perf_counter()
    assert sum(len(split) for split in load(tmp_path, image_size=28).splits.values()) == 4000
    assert time.perf_counter() - start < 8


# --- CSV manifests ----------------------------------------------------------------------------------------------------


def manifest(root, rows, header=("path", "label")):
    path = root / "list.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_manifest_with_splits_and_sites(tmp_path):
    folder(tmp_path)
    rows = []
    for name in ("cat", "dog"):
        for i in range(10):
            rows.append((f"{name}/{i}.png", name.upper(), ("Train", "val", "TEST")[max(0, i - 7)], "xy"[i % 2]))
    data = load(manifest(tmp_path, rows, ("path", "Label", "split", "site")))
    assert (data.name, data.class_names, data.site_names) == ("list", ("CAT", "DOG"), ("x", "y"))
    assert [len(split) for split in data.splits.values()] == [16, 2, 2]
    assert data.val.images[:, 0, 0, 0].tolist() == [8, 28]
    assert data.val.site.tolist() == [0, 0]


def test_manifest_keeps_patients_together(tmp_path):
    folder(tmp_path, n=40)
    rows = [(f"{name}/{i}.png", name, f"p{i // 4}" if i else "") for name in ("cat", "dog") for i in range(40)]
    data = load(manifest(tmp_path, rows, ("path", "label", "patient")))
    assert sum(len(split) for split in data.splits.values()) == 80
    home = {}
    for key, split in data.splits.items():
        for shade in split.images[:, 0, 0, 0].tolist():
            home.setdefault(shade, set()).add(key)
    # Pictures of cats have shades 0..39 and of dogs 20..59: the shades from 40 on are dogs alone.
    for patient in range(5, 10):
        assert len(set.union(*(home[20 + i] for i in range(4 * patient, 4 * patient + 4) if 20 + i >= 40))) == 1
    assert data.train.patient is None  # the first image of each class may show anyone


def test_manifest_patients(tmp_path):
    folder(tmp_path, n=20)
    rows = [(f"cat/{i}.png", "ab"[i % 2], f"p{i // 4}", "xy"[i % 2]) for i in range(20)]
    for split in (None, ["train"] * 12 + ["val"] * 4 + ["test"] * 4):
        header = ("path", "label", "patient", "site") + (() if split is None else ("split",))
        lines = rows if split is None else [(*row, key) for row, key in zip(rows, split, strict=True)]
        data = load(manifest(tmp_path, lines, header))
        for part in data.splits.values():
            who = part.images[:, 0, 0, 0] // 4
            assert torch.equal(part.patient[:, None] == part.patient, who[:, None] == who)
    assert load(manifest(tmp_path, [row[:2] for row in rows])).train.patient is None


def test_manifest_with_several_findings(tmp_path):
    folder(tmp_path, n=40)
    cells = ("mass; nodule", "", "nodule", "mass;", "nodule;mass;nodule")
    rows = [(f"{name}/{i}.png", cells[i % 5]) for name in ("cat", "dog") for i in range(40)]
    path = manifest(tmp_path, rows)
    data = load(path, task="multilabel")
    assert (data.kind, data.class_names) == ("multilabel", ("mass", "nodule"))
    held = torch.cat([split.labels for split in data.splits.values()])
    rows_held = [tuple(row) for row in held.tolist()]
    assert {row: rows_held.count(row) for row in set(rows_held)} == {(1, 1): 32, (0, 0): 16, (0, 1): 16, (1, 0): 16}
    fails(path, "line 2 has ';' in its label: set task=multilabel")
    fails(path, "line 3 has an empty label", task="multiclass")
    lonely = manifest(tmp_path, [(f"cat/{i}.png", "mass") for i in range(40)])
    fails(lonely, "names 1 findings: task=multilabel needs at least two", task="multilabel")


@pytest.mark.parametrize(
    ("rows", "header", "text"),
    [
        ([], ("image", "label"), r"no column 'path' \(its header: image, label\)"),
        ([], ("path;label",), "no column 'path'"),
        ([("cat/0.png", "cat")], ("path", "label"), "holds 1 image"),
        ([], ("path", "label"), "holds 0 image"),
        ([("cat/0.png", "")], ("path", "label"), "line 2 has an empty label"),
        ([("cat/0.png",)], ("path", "label"), "line 2 has not as many cells"),
        ([("cat/0.png", "a", "b")], ("path", "label"), "line 2 has not as many cells"),
        ([("cat/99.png", "cat")], ("path", "label"), "line 2: the image .*99.png does not exist"),
        ([("cat/0.png", "a"), ("cat/0.png", "b")], ("path", "label"), "line 3 lists the same image as line 2"),
        ([("cat/0.png", "a"), ("dog/../cat/0.png", "b")], ("path", "label"), "line 3 lists the same image as line 2"),
        ([("cat/1.png", "a"), ("cat/0.png", "a"), ("link.png", "b")], ("path", "label"), r"line 4 .* image as line 3"),
        ([("cat/0.png", "a", "trian")], ("path", "label", "split"), "line 2: .*did you mean 'train'"),
        ([("cat/0.png", "a", "7")], ("path", "label", "patient_id"), "did you mean 'patient'"),
        (
            [("cat/0.png", "a", "train", "Jane"), ("cat/1.png", "b", "test", "Jane")],
            ("path", "label", "split", "patient"),
            "lines 2 and 3 put one patient into train and test",
        ),
    ],
)
def test_bad_manifests(tmp_path, rows, header, text):
    folder(tmp_path)
    (tmp_path / "link.png").symlink_to("cat/0.png")
    error = fails(manifest(tmp_path, rows, header), text)
    assert "Jane" not in error.sentence


def test_manifest_that_is_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"path,label\n\xff\xfe\x00,x\n")
    fails(path, "UTF-8")
    path.write_text("")
    fails(path, "no column 'path'")


# --- real images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "geometry", "classes", "sites", "modality"),
    [
        ("pneumoniamnist", (4708, 524, 624), (1, 28, 28), 2, 1, "xray"),
        ("ham10000_sites", (4187, 598, 1199), (3, 28, 28), 7, 4, "generic"),
        ("wbc_sites", (524, 74, 153), (3, 28, 28), 5, 3, "generic"),
        ("wbc_sites_64", (524, 74, 153), (3, 64, 64), 5, 3, "generic"),
        ("cxr_sites", (3174, 452, 903), (1, 28, 28), 3, 5, "generic"),
        ("mednist6k", (4200, 600, 1200), (1, 28, 28), 6, 1, "generic"),
    ],
)
def test_real_files(shared_data, name, sizes, geometry, classes, sites, modality):
    data = load(shared_data / f"{name}.npz")
    assert data.name == name
    assert tuple(len(split) for split in data.splits.values()) == sizes
    assert data.geometry == geometry
    assert (data.classes, len(data.site_names), data.modality) == (classes, sites, modality)
    assert min(data.train.counts(classes)) > 0


def test_pneumoniamnist_by_its_flag(shared_data, monkeypatch):
    monkeypatch.setenv("MEDMNIST_ROOT", str(shared_data))
    data = load("pneumoniamnist")
    assert data.class_names == ("normal", "pneumonia")
    assert data.fingerprint == load(shared_data / "pneumoniamnist.npz").fingerprint
