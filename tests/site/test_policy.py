"""What a site allows: read strictly, asked before work, and asked again before anything leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedistill.config import Config, make_config
from fedistill.data.phantoms import phantom_data
from fedistill.errors import FedistillError
from fedistill.privacy.ledger import Cap
from fedistill.privacy.plan import plan_of
from fedistill.privacy.rules import statement_of
from fedistill.site.policy import Policy, read_policy
from fedistill.synthetic.set import SyntheticSet, one_hot

SITE = '[site]\nname = "north"\ndata = "phantom"\nwork = "/srv/f"\n'
CAP = "required = true\nlifetime_epsilon = 10\nlifetime_delta = 1e-4\n"


def made(privacy: dict[str, Any], sites: tuple[str, ...] = ("north",), n: int = 4) -> SyntheticSet:
    return SyntheticSet(
        images=torch.zeros(n, 1, 16, 16),
        labels=one_hot(torch.arange(n) % 2, 2),
        site=torch.zeros(n, dtype=torch.int64),
        sites=sites,
        class_names=("a", "b"),
        mean=0.5,
        std=0.25,
        modality="generic",
        step_size=(0.1,) * len(sites),
        manifest={site: {"init": "noise", "method": "sketch", "privacy": privacy} for site in sites},
    )


def private(epsilon: float = 2.0, unit: str = "image", n: int = 4) -> SyntheticSet:
    config = make_config({"privacy": "dp", "epsilon": epsilon, "method": "sketch", "unit": unit}).resolved()
    return made(statement_of(config, plan_of(config, 500)), n=n)


NOTHING = made({"epsilon": None, "delta": None, "statement": "No formal guarantee."})
POLICY = Policy(name="north", data="phantom", work=Path("/srv/f"))


def read(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "site.toml").write_text(text)
    return read_policy(tmp_path / "site.toml")


def test_a_policy_is_read_as_it_is_written(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        SITE + "[privacy]\n" + CAP + 'unit = "patient"\nmax_epsilon = 3\nmax_delta = 1e-4\n'
        "[release]\nmanual = true\nlargest_set = 500\nsmallest_class = 20\nanswers = false\n"
        '[jobs]\nmethod = ["sketch", "ptm"]\nipc = { from = 1, to = 50 }\n',
    )  # fmt: skip
    assert (found.name, found.data, found.work) == ("north", "phantom", Path("/srv/f"))
    assert (found.required, found.unit, found.max_epsilon, found.max_delta) == (True, "patient", 3, 1e-4)
    assert found.cap == Cap(epsilon=10, delta=1e-4)
    assert (found.manual, found.largest_set, found.smallest_class, found.answers) == (True, 500, 20, False)
    assert read(tmp_path, SITE) == POLICY


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[site\n", "is not a readable TOML file"),
        ('[site]\nname = "n"\n', r"\[site\] lacks data, work"),
        ('[site]\nname = "n"\ndata = "d"\nwork = "w"\n', "work=w must be an absolute path"),
        (SITE + "[privacies]\n", "did you mean 'privacy'"),
        ("privacy = 3\n" + SITE, "privacy is no table"),
        (SITE + "[privacy]\n" + CAP + "max_epsilons = 3\n", "did you mean 'max_epsilon'"),
        (SITE + "[privacy]\n" + CAP + 'max_epsilon = "3"\n', r"max_epsilon='3' is not a number above 0"),
        (SITE + "[privacy]\n" + CAP + "max_epsilon = true\n", "is not a number above 0"),
        (SITE + "[privacy]\n" + CAP + "max_epsilon = nan\n", "is not a number above 0"),
        (SITE + "[privacy]\n" + CAP + 'unit = "ward"\n', "Unknown unit 'ward'"),
        (SITE + "[privacy]\nrequired = 1\n", "is not true or false"),
        (SITE + "[privacy]\nrequired = true\n", "give lifetime_epsilon and lifetime_delta too"),
        (SITE + "[privacy]\nrequired = true\nlifetime_epsilon = 3\n", "belong together"),
        (SITE + "[privacy]\nmax_epsilon = 3\n", "mean nothing for jobs without it: add required = true"),
        (SITE + "[privacy]\n" + CAP.replace("true", "false"), "add required = true"),
        (SITE + "[privacy]\n" + CAP.replace("1e-4", "2.0"), "is no cap"),
        (SITE + "[release]\nlargest_set = 0\n", "is not a whole number above 0"),
        (SITE + "[release]\nlargest_set = 2.5\n", "is not a whole number above 0"),
        (SITE + "[jobs]\nipcs = [1]\n", "did you mean 'ipc'"),
        (SITE + "[jobs]\ndeadline = [1]\n", "Unknown setting of a job 'deadline'"),
        (SITE + '[jobs]\nmodel = ["convnt"]\n', "did you mean 'convnet'"),
        (SITE + '[jobs]\nmodel = ["convnet,mpl"]\n', "did you mean 'mlp'"),
        (SITE + '[jobs]\nmask = ["auto", "pruen"]\n', "did you mean 'prune'"),
        (SITE + '[jobs]\nmodality = ["xrays"]\n', "did you mean 'xray'"),
        (SITE + '[jobs]\naugment = ["flipp"]\n', "did you mean 'flip'"),
        (SITE + '[jobs]\ntask = ["ordinals"]\n', "did you mean 'ordinal'"),
        (SITE + "[jobs]\nimage_size = { from = 0, to = 5000 }\n", "must be at most 4096"),
        (SITE + "[jobs]\nsites = [3]\n", "Unknown setting of a job 'sites'"),
        (SITE + "[jobs]\nipc = 3\n", "is neither a list of values nor"),
        (SITE + '[jobs]\nipc = { from = "a", to = 3 }\n', "is neither a list of values nor"),
    ],
)
def test_what_means_nothing_is_an_error(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match=why) as caught:
        read(tmp_path, text)
    assert caught.value.code == "site-config"
    assert str(tmp_path / "site.toml") in caught.value.sentence


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FedistillError, match="There is no file"):
        read_policy(tmp_path / "site.toml")


def job(**more: Any) -> Config:
    return make_config({"method": "sketch", "privacy": "dp", "epsilon": 2.0} | more).resolved()


def test_settings_of_a_job_stay_in_their_ranges(tmp_path: Path) -> None:
    policy = read(tmp_path, SITE + '[jobs]\nmethod = ["sketch"]\nipc = { from = 2, to = 50 }\n')
    policy.check_job(job(ipc=2))
    policy.check_job(job(ipc=50))
    for ipc in (1, 51):
        with pytest.raises(FedistillError, match=f"ipc={ipc} is not allowed at this site: 2 to 50"):
            policy.check_job(job(ipc=ipc))
    with pytest.raises(FedistillError, match="method=teach is not allowed at this site: sketch"):
        policy.check_job(job(method="teach", ipc=2))


@pytest.mark.parametrize(
    ("text", "fits", "not_so"),
    [
        ("seed = [0]", {}, {"seed": 1}),
        ("image_size = { from = 0, to = 64 }", {"image_size": 64}, {"image_size": 65}),
        ("image_size = { from = 0, to = 2048 }", {"image_size": 2048}, {"image_size": 4096}),
        ("", {"image_size": 512}, {"image_size": 513}),
        ('task = ["auto", "multilabel"]', {"task": "multilabel"}, {"task": "ordinal"}),
        ('modality = ["xray"]', {"modality": "xray"}, {}),
        ("eval_epsilon = { from = 0.0, to = 1.0 }", {"eval_epsilon": 1.0}, {"eval_epsilon": 1.5}),
        ("formation = { from = 1, to = 2 }", {"formation": 2, "method": "dm", "privacy": "none"}, {"formation": 3}),
        ('model = ["convnet", "convnet,mlp"]', {"model": "convnet,mlp"}, {"model": "mlp"}),
        ('mask = ["auto", "none"]', {"mask": "none"}, {"mask": "prune"}),
        ('device = ["cpu"]', {"device": "cpu"}, {}),
    ],
)
def test_every_setting_that_means_something_at_a_site_can_be_bound(
    text: str, fits: dict[str, Any], not_so: dict[str, Any], tmp_path: Path
) -> None:
    policy = read(tmp_path, SITE + f"[jobs]\n{text}\n")
    policy.check_job(job(**fits))
    with pytest.raises(FedistillError, match=f"{text.partition(' ')[0] or 'image_size'}=.* not allow") as caught:
        policy.check_job(job(**not_so))
    assert caught.value.code == "policy"


def test_a_small_class_takes_no_part_without_privacy() -> None:
    config = make_config({"phantom_images": 90, "phantom_classes": 3, "phantom_size": 16}).resolved()
    data = phantom_data(config)
    rest = (data.train.labels != 1) | (torch.arange(len(data.train)) < 12)
    data = dataclasses.replace(data, train=data.train.take(rest.nonzero().flatten()))
    small = int((data.train.labels == 1).sum())
    policy = dataclasses.replace(POLICY, smallest_class=small + 1)
    kept = policy.check_data(config, data)
    assert kept.train.counts(3)[1] == 0
    for split in (kept.val, kept.test):  # counts of answers on them are exact
        assert all(n == 0 or n > small for n in split.counts(3))
    assert len(kept.train) == len(data.train) - small
    assert dataclasses.replace(POLICY, smallest_class=small).check_data(config, data) is not data
    assert len(dataclasses.replace(POLICY, smallest_class=small).check_data(config, data).train) == len(data.train)
    assert policy.check_data(job(), data) is data
    assert POLICY.check_data(config, data) is data
    with pytest.raises(FedistillError, match="No class of this site is as large"):
        dataclasses.replace(POLICY, smallest_class=1000).check_data(config, data)
    with pytest.raises(FedistillError, match="several findings"):
        policy.check_data(config, dataclasses.replace(data, kind="multilabel"))


def test_a_job_whose_set_could_not_leave_is_refused_before_it_costs_anything() -> None:
    data = phantom_data(make_config({"phantom_images": 90, "phantom_classes": 3, "phantom_size": 16}).resolved())
    dataclasses.replace(POLICY, largest_set=30, max_delta=0.01).check_data(job(ipc=10), data)
    with pytest.raises(FedistillError, match="ipc=11 makes 33 images, and at most 30 may leave this site"):
        dataclasses.replace(POLICY, largest_set=30).check_data(job(ipc=11), data)
    with pytest.raises(FedistillError, match="ipc=3 with formation=2 makes 36 images, and at most 30 may leave"):
        dataclasses.replace(POLICY, largest_set=30).check_data(job(ipc=3, formation=2), data)
    with pytest.raises(FedistillError, match=r"delta=0.01 is more than this site gives to one job: 0.001"):
        dataclasses.replace(POLICY, max_delta=1e-3).check_data(job(), data)


def test_answers_have_a_delta_of_their_own() -> None:
    data = phantom_data(make_config({"phantom_images": 900, "phantom_classes": 3, "phantom_size": 16}).resolved())
    policy = dataclasses.replace(POLICY, max_delta=1e-3)
    policy.check_data(job(ipc=2), data)
    few = dataclasses.replace(data, test=data.test.take(torch.arange(60)))
    with pytest.raises(FedistillError, match=r"delta=0.01 of answers is more"):
        policy.check_answers(job(), few, "test")
    dataclasses.replace(policy, max_delta=0.01).check_answers(job(), few, "test")
    with pytest.raises(FedistillError, match="lets no counts of answers leave"):
        dataclasses.replace(policy, answers=False).check_answers(job(), few, "test")


def test_a_guarantee_whose_conditions_do_not_hold_does_not_leave() -> None:
    broken = private()
    broken.manifest["north"]["privacy"]["conditions"][0]["status"] = "failed"
    with pytest.raises(FedistillError, match="Condition 1 failed"):
        POLICY.check_set(broken)


def limited(**more: Any) -> Policy:
    return dataclasses.replace(POLICY, required=True, cap=Cap(epsilon=10, delta=1e-2), **more)


def test_what_leaves_is_judged_by_itself_and_not_by_its_job() -> None:
    limited(max_epsilon=2.0, max_delta=1e-3, largest_set=4).check_set(private())
    POLICY.check_set(NOTHING)
    for policy, given, why in (
        (limited(), NOTHING, "has no formal guarantee"),
        (limited(max_epsilon=1.5), private(), r"promises epsilon=\d\.\d+ at delta=0.001, and this site allows 1.5"),
        (limited(max_delta=1e-4), private(), "and this site allows inf at 0.0001"),
        (limited(unit="patient"), private(), "protects every image, and this site demands it of every patient"),
        (limited(largest_set=3), private(), "has 4 images, and at most 3 may leave"),
        (POLICY, made({"epsilon": None, "delta": None, "statement": "-"}, sites=("south",)), "not only this site's"),
        (POLICY, made({"epsilon": None, "delta": None, "statement": "-"}, sites=("north", "south")), "not only"),
    ):
        with pytest.raises(FedistillError, match=why) as caught:
            policy.check_set(given)
        assert caught.value.code == "policy"
    limited(unit="patient").check_set(private(unit="patient"))


def test_real_images_never_leave() -> None:
    real = made({"epsilon": None, "delta": None, "statement": "-"})
    real.manifest["north"]["init"] = "real"
    with pytest.raises(FedistillError, match="holds real images, or began with them"):
        POLICY.check_set(real)
