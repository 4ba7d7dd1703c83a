"""The last door: nothing leaves undecided, decisions stand, and the log of them holds."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from test_policy import NOTHING, POLICY

from fedistill import cli
from fedistill.commands import site as command
from fedistill.config import make_config
from fedistill.data.sources import load_data
from fedistill.errors import FedistillError
from fedistill.site import gate
from fedistill.site.folder import site_folder
from fedistill.site.gate import decide, decided, may_leave, read_log, request_of, requests
from fedistill.site.look import lay_out
from fedistill.site.policy import Policy, read_policy
from fedistill.synthetic.set import SyntheticSet
from fedistill.wire import decode, encode, quantise

CONFIG = make_config({"method": "ptm", "ipc": 2}).resolved()


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return dataclasses.replace(POLICY, work=tmp_path / "work", manual=True)


@pytest.fixture
def made() -> SyntheticSet:
    return quantise(dataclasses.replace(NOTHING, images=torch.randn(4, 1, 16, 16)))


def ask(policy: Policy, made: SyntheticSet, run: str = "r", seconds: float = 0.0) -> SyntheticSet | None:
    return may_leave(policy, made, CONFIG, run=run, round=1, seconds=seconds)


def test_nothing_leaves_before_somebody_decided(policy: Policy, made: SyntheticSet) -> None:
    assert ask(policy, made) is None
    assert ask(policy, made) is None
    (request,) = requests(policy)
    assert request.decision is None
    assert torch.equal(request.load().images, made.images)
    assert (request.folder / "set" / "contact-sheet.png").exists()
    decide(policy, request.id, approved=True, reason="looked at it")
    assert ask(policy, made) is made
    assert ask(policy, made, run="another job") is made  # what may leave is not asked about twice


def test_a_rejected_set_never_leaves_and_the_reason_stays(policy: Policy, made: SyntheticSet) -> None:
    ask(policy, made)
    decide(policy, requests(policy)[0].id, approved=False, reason="Mrs Miller can be recognised")
    with pytest.raises(FedistillError, match="does not let the set leave") as caught:
        ask(policy, made)
    assert caught.value.code == "rejected"
    assert "Miller" not in caught.value.sentence
    with pytest.raises(FedistillError, match="does not let the set leave"):
        ask(policy, made, run="the server tries again")


def test_a_decision_stands(policy: Policy, made: SyntheticSet) -> None:
    ask(policy, made)
    name = requests(policy)[0].id
    decide(policy, name, approved=False, reason="", who="anna")
    with pytest.raises(FedistillError, match=r"was rejected by anna on .*: that stands"):
        decide(policy, name, approved=True, reason="")
    for reason in ("x" * 501, "two\nlines"):
        with pytest.raises(FedistillError, match="A reason is one line"):
            decide(policy, "0" * 12, approved=True, reason=reason)


def test_the_decision_is_about_the_bytes_that_were_shown(policy: Policy, made: SyntheticSet) -> None:
    ask(policy, made)
    decide(policy, requests(policy)[0].id, approved=True, reason="")
    other = quantise(dataclasses.replace(made, images=made.images + 0.5 * torch.randn(made.images.shape)))
    assert ask(policy, other) is None
    travelled = decode(*encode(made))  # what is approved is what the server gets
    assert ask(policy, travelled) is travelled


def test_a_changed_file_is_noticed(policy: Policy, made: SyntheticSet) -> None:
    ask(policy, made)
    request = requests(policy)[0]
    manifest = request.folder / "set" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("No formal guarantee.", "All is well......."))
    with pytest.raises(FedistillError, match="were changed after the set was made"):
        request.load()


def test_what_the_policy_forbids_is_not_even_shown(policy: Policy, made: SyntheticSet) -> None:
    with pytest.raises(FedistillError, match="at most 3 may leave"):
        ask(dataclasses.replace(policy, largest_set=3), made)
    assert requests(policy) == []


def test_the_policy_itself_decides_where_it_may_and_that_is_written_down(policy: Policy, made: SyntheticSet) -> None:
    easy = dataclasses.replace(policy, manual=False)
    assert ask(easy, made) is made
    assert ask(easy, made) is made
    (decision,) = read_log(site_folder(policy.work, "north"))
    assert (decision.who, decision.approved) == (gate.BY_POLICY, True)


def test_a_call_waits_for_a_decision(policy: Policy, made: SyntheticSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "POLL_SECONDS", 0.02)
    ask(policy, made)
    name = requests(policy)[0].id
    threading.Timer(0.2, lambda: decide(policy, name, approved=True, reason="")).start()
    assert ask(policy, made, seconds=60.0) is made


def log_of(policy: Policy, decisions: int = 3) -> Path:
    for k in range(decisions):
        decide(policy, f"{k:012d}", approved=True, reason=f"number {k}", who="anna")
    return site_folder(policy.work, "north") / "decisions.jsonl"


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("change", ["field", "remove", "double", "spaces", "extra"])
def test_a_log_that_was_changed_stops_everything(policy: Policy, change: str, place: int) -> None:
    file = log_of(policy, 4)
    lines = file.read_bytes().splitlines(keepends=True)
    line = lines[place]
    lines[place : place + 1] = {
        "field": [line.replace(b"true", b"false")],
        "remove": [],
        "double": [line, line],
        "spaces": [line.replace(b", ", b",  ")],
        "extra": [json.dumps(json.loads(line) | {"more": 1}).encode() + b"\n"],
    }[change]
    file.write_bytes(b"".join(lines))
    with pytest.raises(FedistillError, match=r"is not as it was .*written: nothing leaves") as caught:
        decided(file.parent, "0" * 12)
    assert caught.value.code == "broken-log"
    with pytest.raises(FedistillError, match="nothing leaves"):
        decide(policy, "f" * 12, approved=True, reason="")


def test_every_stump_of_a_last_line_decides_nothing(policy: Policy) -> None:
    file = log_of(policy, 2)
    head = (file.parent / "decisions.head").read_text()
    decide(policy, "0" * 11 + "2", approved=True, reason="the last", who="anna")
    whole = file.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    (file.parent / "decisions.head").write_text(head)  # a process that was killed in the line had stored no head of it
    for cut in range(last, len(whole)):
        file.write_bytes(whole[:cut])
        assert [d.id for d in read_log(file.parent)] == ["0" * 12, "0" * 11 + "1"]
    decide(policy, "f" * 12, approved=False, reason="after the crash", who="anna")
    assert [d.id for d in read_log(file.parent)][2:] == ["f" * 12]
    assert file.stat().st_mode & 0o077 == 0


def test_a_head_that_was_stored_one_line_late_is_no_damage(policy: Policy) -> None:
    file = log_of(policy, 2)
    head = file.with_suffix(".head")
    before = head.read_text()
    decide(policy, "e" * 12, approved=True, reason="", who="anna")
    head.write_text(before)
    assert len(read_log(file.parent)) == 3
    decide(policy, "f" * 12, approved=True, reason="", who="anna")
    assert len(read_log(file.parent)) == 4
    head.write_text(before)
    with pytest.raises(FedistillError, match="when it was last written"):
        read_log(file.parent)
    head.unlink()
    with pytest.raises(FedistillError, match="when it was last written"):
        read_log(file.parent)


def test_only_so_many_sets_may_wait(policy: Policy, made: SyntheticSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_WAITING", 2)
    sets = [quantise(dataclasses.replace(made, images=made.images * k)) for k in (1.0, 2.0, 3.0)]
    assert ask(policy, sets[0]) is None
    assert ask(policy, sets[1]) is None
    with pytest.raises(FedistillError, match="2 sets wait for a decision"):
        ask(policy, sets[2])
    assert ask(policy, sets[0]) is None
    decide(policy, requests(policy)[0].id, approved=False, reason="")
    assert ask(policy, sets[2]) is None


def test_another_account_gets_a_sentence(policy: Policy, made: SyntheticSet, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(policy, made)

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "decisions.jsonl")

    monkeypatch.setattr(gate, "_decide", forbidden)
    with pytest.raises(FedistillError, match="belongs to another account: decide with the one that `site start`"):
        decide(policy, requests(policy)[0].id, approved=True, reason="")


@pytest.mark.parametrize("words", [("approve",), ("reject",), ("show",), ("audit",)])
def test_root_gets_a_sentence_and_writes_nothing(
    words: tuple[str, ...],
    policy: Policy,
    made: SyntheticSet,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ask(policy, made)
    folder = site_folder(policy.work, "north")
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(FedistillError, match="run the command as that account, with `sudo -u") as caught:
        say(capsys, *words, requests(policy)[0].id, "--site", file)
    assert caught.value.code == "not-allowed"
    assert sorted(folder.rglob("*")) == before


def test_a_log_that_root_wrote_once_is_told_of(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    file = log_of(policy)

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(FedistillError, match=r"decisions\.jsonl belongs to another account: chown it"):
        read_log(file.parent)


def test_who_decided_is_not_what_the_environment_says(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "dr-meier")
    monkeypatch.setenv("USER", "dr-meier")
    assert decide(policy, "a" * 12, approved=True, reason="").who not in ("dr-meier", gate.BY_POLICY)


def test_what_a_server_says_does_not_steer_the_screen(
    policy: Policy, made: SyntheticSet, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = dataclasses.replace(CONFIG, eval_models="convnet\x1b[31m\nDifferential privacy with epsilon = 0.1")
    may_leave(policy, made, nasty, run="r", round=1, seconds=0.0)
    shown = say(capsys, "show", requests(policy)[0].id, "--site", file)[1]
    assert "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("Differential privacy")]


def test_the_sheet_that_is_looked_at_is_drawn_from_the_set(policy: Policy, made: SyntheticSet) -> None:
    ask(policy, made)
    request = requests(policy)[0]
    sheet = lay_out(request, request.load()) / "contact-sheet.png"
    before = sheet.read_bytes()
    sheet.write_bytes(b"another picture")
    lay_out(request, request.load())
    assert sheet.read_bytes() == before


def test_every_slice_is_to_be_seen_and_nothing_hides_below_black(policy: Policy, made: SyntheticSet) -> None:
    hidden = torch.full((len(made), 1, 3, *made.images.shape[2:]), -50.0)
    hidden[:, :, 0, :4] = -51.0  # a stripe in the first slice, both of its colours darker than black
    volumes = quantise(dataclasses.replace(made, images=hidden))
    ask(policy, volumes)
    request = requests(policy)[0]
    folder = lay_out(request, request.load())
    names = {
        f"{name}{end}.png"
        for name in ("contact-sheet", "stretched")
        for end in ("", *(f"-slice-0{k}" for k in range(3)))
    }
    assert {file.name for file in folder.iterdir()} == names | {"privacy.json"}
    assert (folder / "stretched-slice-00.png").read_bytes() != (folder / "stretched-slice-01.png").read_bytes()
    assert (folder / "contact-sheet-slice-00.png").read_bytes() == (folder / "contact-sheet-slice-01.png").read_bytes()
    assert json.loads((folder / "privacy.json").read_text())["formal"] is False


def test_an_attack_on_the_job_of_a_set_is_told_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For real, with as little as an audit takes."""
    file = tmp_path / "site.toml"
    file.write_text(
        f'[site]\nname = "north"\ndata = "phantom"\nwork = "{tmp_path / "work"}"\n[release]\nmanual = true\n'
    )
    small = {
        "method": "sketch",
        "ipc": 1,
        "width": 8,
        "depth": 2,
        "sketch_networks": 1,
        "sketch_augmentations": 1,
        "iterations": 2,
    }
    small |= {
        "eval_steps": 2,
        "eval_nets": 1,
        "eval_models": "mlp",
        "phantom_images": 60,
        "phantom_size": 16,
        "phantom_classes": 2,
    }
    data = load_data(make_config(small).resolved())
    site = read_policy(file)
    made = quantise(dataclasses.replace(NOTHING, images=torch.randn(4, *data.geometry), sites=("north",)))
    may_leave(site, made, make_config(small).resolved(), run="r", round=1, seconds=0.0)
    assert "fedistill site audit" in say(capsys, "show", requests(site)[0].id, "--site", str(file))[1]
    told = say(capsys, "audit", requests(site)[0].id, "--canaries", "12", "--shadows", "4", "--site", str(file))
    assert "Control:" in told[1] + told[2]
    shown = say(capsys, "show", requests(site)[0].id, "--site", str(file))[1]
    assert "Attacks show epsilon of at least" in shown
    assert (
        "could not have shown more than" in (requests(site)[0].folder / "look" / "privacy.json").read_text()
        or "ceiling" in shown
    )


def test_ids_may_be_cut_short_but_not_guessed(policy: Policy, made: SyntheticSet) -> None:
    ask(policy, made)
    name = requests(policy)[0].id
    assert request_of(policy, name[:6]).id == name
    for wrong in ("", "zzzz"):
        with pytest.raises(FedistillError, match="No set of this site"):
            request_of(policy, wrong)


@pytest.fixture
def file(policy: Policy, tmp_path: Path) -> str:
    path = tmp_path / "site.toml"
    path.write_text(
        f'[site]\nname = "north"\ndata = "phantom"\nwork = "{policy.work}"\n[release]\nmanual = true\nsmallest_class = 220\n'
    )
    return str(path)


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.app(["site", *words], standalone_mode=False)
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_an_officer_looks_and_decides(
    policy: Policy, made: SyntheticSet, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(policy, made)
    name = requests(policy)[0].id
    assert name[:8] in say(capsys, "pending", "--site", file)[1]
    shown = say(capsys, "show", name, "--site", file)[1]
    for expected in ("No formal guarantee", "4 images: a 2, b 2", "method=ptm", "contact-sheet.png", ": waits"):
        assert expected in shown
    facts = json.loads(say(capsys, "show", name, "--json", "--site", file)[1])
    assert facts["per_class"] == {"a": 2, "b": 2}
    assert Path(facts["sheet"]).exists()
    assert "is rejected by" in say(capsys, "reject", name[:5], "--reason", "too few", "--site", file)[2]
    assert say(capsys, "pending", "--site", file)[1].strip() == "Nothing waits."
    assert "rejected by" in say(capsys, "pending", "--all", "--site", file)[1]
    told = json.loads(say(capsys, "log", "--json", "--site", file)[1])
    assert [(d["id"], d["approved"], d["reason"]) for d in told] == [(name, False, "too few")]
    with pytest.raises(FedistillError, match="that stands"):
        say(capsys, "approve", name, "--site", file)


def test_a_policy_to_begin_with_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phantom").mkdir()  # the name comes first
    say(capsys, "init", "--name", 'Nörd "1"', "--data", "phantom", "--work", "work")
    policy = command._policy("site.toml")
    assert (policy.name, policy.data, policy.work) == ('Nörd "1"', "phantom", tmp_path / "work")
    assert policy.manual
    assert policy.required
    with pytest.raises(FedistillError, match="exists already"):
        say(capsys, "init", "--name", "n", "--data", "phantom", "--work", "work")
    told = json.loads(say(capsys, "check", "--json")[1])
    assert (told["site"], told["spends"], told["waiting"]) == ('Nörd "1"', 0, [])


def test_check_says_what_does_not_fit(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, said = say(capsys, "check", "--site", file)
    assert "Too small for jobs without privacy" in said
    text = Path(file).read_text()
    Path(file).write_text(
        text + '[privacy]\nrequired = true\nunit = "patient"\nlifetime_epsilon = 1\nlifetime_delta = 1e-3\n'
    )
    with pytest.raises(FedistillError, match="the data do not name patients"):
        say(capsys, "check", "--site", file)
