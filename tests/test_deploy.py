"""What a server and a site are set up with: nothing secret in a kit, nothing taken from one that is not checked."""

from __future__ import annotations

import json
import ssl
import stat
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification  # noqa: F401

from fedistill import cli
from fedistill.certificates import check_certificates
from fedistill.deploy import (
    MOST_BYTES,
    Server,
    begin_server,
    environment,
    link_commands,
    make_kit,
    make_site_key,
    read_kit,
    read_server,
    run_words,
)
from fedistill.errors import FedistillError
from fedistill.site.policy import read_policy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return begin_server(tmp_path_factory.mktemp("deploy") / "server", "fed.example.org", 8123)


def test_a_server_is_found_again_and_not_made_twice(server: Server) -> None:
    assert server.address == "fed.example.org:443"
    assert read_server(server.folder) == server
    with pytest.raises(FedistillError, match="holds a server already"):
        begin_server(server.folder, "other.org", 1)
    with pytest.raises(FedistillError, match="holds no server"):
        read_server(server.folder / "pki")
    with pytest.raises(FedistillError, match="is not empty"):
        begin_server(server.folder / "pki", "other.org", 1)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "a b",
        "host:",
        "host:0",
        "host:99999",
        "host:x",
        "host:²",
        "http://host",
        "h:1:2",
        "ho\nst",
        "a..b",
        "-x-.org",
        "x-.org",
        ".org",
        "org.",
        "a\n",
        "a" * 64 + ".org",
        "a." * 127 + "org",
    ],
)
def test_addresses(address: str, tmp_path: Path) -> None:
    if address == "host:":
        assert begin_server(tmp_path / "s", address, 1).address == "host:443"
        return
    with pytest.raises(FedistillError, match="is not the address of a server"):
        begin_server(tmp_path / "s", address, 1)
    assert not (tmp_path / "s").exists()


def test_an_address_that_is_longer_than_a_common_name(tmp_path: Path) -> None:
    host = f"{'a' * 63}.{'b' * 63}.example.org"
    server = begin_server(tmp_path / "s", host, 1)
    assert check_certificates(server.pki, host) == []  # a client that asks for that name trusts it
    assert read_kit(make_kit(server, "north")[0]).address == f"{host}:443"


def test_secrets_are_for_their_owner_alone(server: Server, tmp_path: Path) -> None:
    secret = {"ca.key", "server.key", "superexec.secret"}
    assert secret <= {p.name for p in (server.folder / "pki").iterdir()}
    key = tmp_path / "north.key"
    make_site_key(key)
    for file in [*(server.folder / "pki" / name for name in secret), key]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = key.read_bytes()
    public = key.with_name("north.key.pub").read_bytes()
    key.with_name("north.key.pub").unlink()  # as a kill between the two leaves it
    make_site_key(key)
    assert key.read_bytes() == before
    assert key.with_name("north.key.pub").read_bytes() == public
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
    words = " ".join(word for command in link_commands(server) for word in command)
    assert (server.folder / "pki/superexec.secret").read_text() not in words


def test_the_certificate_is_of_the_address_and_of_this_machine(server: Server) -> None:
    pki = server.folder / "pki"
    authority, mine = (x509.load_pem_x509_certificate((pki / f"{name}.crt").read_bytes()) for name in ("ca", "server"))
    mine.verify_directly_issued_by(authority)
    names = mine.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    assert isinstance(mine.public_key(), ec.EllipticCurvePublicKey)
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    strict = x509.verification.PolicyBuilder().store(x509.verification.Store([authority]))
    strict.build_server_verifier(x509.DNSName("fed.example.org")).verify(mine, [])
    context.load_cert_chain(pki / "server.crt", pki / "server.key")


def test_the_proxy_lets_sites_in_and_nobody_else(server: Server) -> None:
    text = (server.folder / "nginx.conf").read_text()
    assert text.count("location") == 2
    assert "location /v1/fleet/" in text
    assert "location / { return 403; }" in text
    assert all("127.0.0.1" in command for command in link_commands(server)[0:1])


def test_a_kit_holds_no_secret_and_says_who_made_it(server: Server) -> None:
    path, fingerprint = make_kit(server, "north")
    kit = read_kit(path)
    assert (kit.name, kit.address, kit.fingerprint) == ("north", "fed.example.org:443", fingerprint)
    assert kit.authority == (server.folder / "pki/ca.crt").read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert not any(b"PRIVATE" in archive.read(name) for name in archive.namelist())
    assert make_kit(server, "south")[1] != fingerprint
    assert make_kit(server, "north")[1] == fingerprint
    for name in ("", "North", "../x", "a" * 33, "a b"):
        with pytest.raises(FedistillError, match="is no name for a site"):
            make_kit(server, name)


def changed(path: Path, to: Path, **parts: bytes | None) -> Path:
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive.namelist():
            content = parts.get(name.rpartition("/")[2].replace(".", "_"), archive.read(name))
            if content is not None:
                out.writestr(name, content)
        for name in set(parts) - {"ca_crt", "site_json", "README_txt", "kit_pub", "kit_sig"}:
            out.writestr(name, parts[name] or b"")
    return to


@pytest.mark.parametrize(
    "parts",
    [
        {"ca_crt": None},
        {"site_json": None},
        {"README_txt": None},
        {"kit_pub": None},
        {"kit_sig": None},
        {"kit_pub": b"no key"},
        {"kit_sig": bytes(64)},
        {"ca_crt": b"no certificate"},
        {"site_json": b"{}"},
        {"site_json": b"[1]"},
        {"site_json": b"not json"},
        {"site_json": json.dumps({"name": "../../etc", "address": "h:1"}).encode()},
        {"site_json": json.dumps({"name": "north", "address": 'h:1"\n[privacy]'}).encode()},
        {"site_json": json.dumps({"name": 3, "address": "h:1"}).encode()},
        {"extra.txt": b"x"},
        {"north/sub/ca.crt": b"a second one"},
        {"README_txt": b"0" * (MOST_BYTES + 1)},
    ],
)
def test_what_is_no_kit(parts: dict[str, bytes | None], server: Server, tmp_path: Path) -> None:
    good, _ = make_kit(server, "north")
    with pytest.raises(FedistillError, match="is no kit of"):
        read_kit(changed(good, tmp_path / "kit.zip", **parts))


def test_a_kit_that_was_cut_or_is_none_at_all(server: Server, tmp_path: Path) -> None:
    good, _ = make_kit(server, "north")
    whole, bad = good.read_bytes(), tmp_path / "bad.zip"
    flipped = [whole[:k] + bytes([whole[k] ^ 0x55]) + whole[k + 1 :] for k in range(30, 200)]
    squeezed = changed(good, tmp_path / "squeezed.zip").read_bytes()
    flipped += [squeezed[:k] + bytes([squeezed[k] ^ 0x55]) + squeezed[k + 1 :] for k in range(0, len(squeezed), 3)]
    for content in flipped:  # a sentence, or a flip that does not matter; never anything else
        bad.write_bytes(content)
        with suppress(FedistillError):
            read_kit(bad)
    for content in (b"", b"hello", *(whole[:k] for k in range(0, len(whole), 97))):
        bad.write_bytes(content)
        with pytest.raises(FedistillError, match="is no kit of"):
            read_kit(bad)
    with pytest.raises(FedistillError, match="is no kit of"):
        read_kit(tmp_path / "nowhere.zip")


def test_another_authority_has_another_fingerprint(server: Server, tmp_path: Path) -> None:
    """Who changes a kit has to sign it anew, and then it is another server's."""
    good, fingerprint = make_kit(server, "north")
    other = begin_server(tmp_path / "other", "fed.example.org", 8123)
    theirs, another = make_kit(other, "north")
    assert another != fingerprint
    assert read_kit(theirs).signer != read_kit(good).signer == read_kit(make_kit(server, "south")[0]).signer
    with zipfile.ZipFile(theirs) as archive:
        parts = {name: archive.read(f"north/{name}") for name in ("ca.crt", "kit.pub", "kit.sig")}
    for name, content in ({"README.txt": b"Send us everything."} | parts).items():
        with pytest.raises(FedistillError, match="changed on its way"):
            read_kit(changed(good, tmp_path / "kit.zip", **{name.replace(".", "_"): content}))


def test_flower_tells_nobody(tmp_path: Path) -> None:
    found = environment(tmp_path / "home")
    assert (found["FLWR_TELEMETRY_ENABLED"], found["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert found["FLWR_HOME"] == str(tmp_path / "home")


def test_settings_travel_as_flower_reads_them() -> None:
    assert run_words({"sites": 3, "epsilon": 2.5, "data": 'a "b"', "class_weights": True}) == (
        'sites=3 epsilon=2.5 data="a \\"b\\"" class_weights=true'
    )


def say(*words: object) -> None:
    cli.app(list(map(str, words)), standalone_mode=False)


def test_a_site_from_a_kit_and_what_start_needs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kit, fingerprint = make_kit(server, "north")
    policy = tmp_path / "site.toml"
    say("site", "init", "--kit", kit, "--data", "phantom", "--work", tmp_path / "w", "--site", policy)
    assert fingerprint in capsys.readouterr().err
    assert (tmp_path / "north.key.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    ran: list[list[str]] = []
    monkeypatch.setattr("fedistill.site.node.keep_running", lambda policy, link, words, env: ran.append(words))
    say("site", "start", "--site", policy)
    assert f'site-config="{policy}"' in ran[0]
    assert "fed.example.org:443" in ran[0]
    (tmp_path / "north.key").unlink()
    with pytest.raises(FedistillError, match=r"north.key is not there, and \[connection\]"):
        say("site", "start", "--site", policy)
    other, _ = make_kit(begin_server(tmp_path / "other", "other.org", 1), "north")
    with pytest.raises(FedistillError, match="is of another federation"):
        say(
            "site",
            "init",
            "--kit",
            other,
            "--data",
            "phantom",
            "--work",
            tmp_path / "w",
            "--site",
            tmp_path / "two.toml",
        )
    (server.pki / "kit.key").unlink()  # the same authority, but somebody else signs
    make_kit(server, "north")
    with pytest.raises(FedistillError, match="is not by the server whose kits"):
        say(
            "site", "init", "--kit", kit, "--data", "phantom", "--work", tmp_path / "w", "--site", tmp_path / "two.toml"
        )
    policy.write_text(policy.read_text().partition("[connection]")[0])
    with pytest.raises(FedistillError, match=r"has no \[connection\]"):
        say("site", "start", "--site", policy)
    for words in ([], ["--kit", kit, "--name", "n"]):
        with pytest.raises(FedistillError, match="has its name from --kit, or from --name"):
            say("site", "init", *words, "--data", "d", "--work", "w", "--site", tmp_path / "other.toml")


def test_a_work_folder_may_begin_with_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--work=~/w` as it is: the ledger would lie in a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    say("site", "init", "--name", "north", "--data", "phantom", "--work=~/w", "--site", tmp_path / "site.toml")
    assert read_policy(tmp_path / "site.toml").work == tmp_path / "w"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["run", "{server}", "{job}", "--name", "Bad Name"], "is no name for a run"),
        (["run", "{server}", "nowhere.toml"], "There is no file nowhere.toml."),
        (["run", "{server}", "{private}"], "privacy=dp needs a budget"),
        (["run", "{server}", "{slip}"], "Unknown method 'nope'"),
        (["run", "{server}", "{lonely}"], "quorum=4 is more than the 3 sites that take part"),
        (["run", "{server}", "{job}"], "say with sites = 3 how many take part"),
        (["run", "{job}", "{job}"], "holds no server"),
        (["status", "{server}", "nothing"], "There is no run nothing"),
        (["admit", "{server}", "north", "{job}.missing"], "is no public key"),
        (["admit", "{server}", "north", "{server}/pki/ca.key"], "is no public key"),
    ],
)
def test_what_an_operator_gets_wrong(words: list[str], why: str, server: Server, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text("ipc = 2\n")
    private = tmp_path / "private.toml"
    private.write_text('sites = 3\nprivacy = "dp"\n')
    slip, lonely = tmp_path / "slip.toml", tmp_path / "lonely.toml"
    slip.write_text('sites = 3\nmethod = "nope"\n')
    lonely.write_text("sites = 3\nquorum = 4\n")
    files = {"job": job, "private": private, "slip": slip, "lonely": lonely}
    with pytest.raises(FedistillError, match=why):
        say("server", *(word.format(server=server.folder, **files) for word in words))


def test_a_server_that_does_not_run_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "k.pub").write_text("ecdsa-sha2-nistp384 AAAA")
    make_kit(server, "north")
    with pytest.raises(FedistillError, match="is the server running"):
        say("server", "admit", server.folder, "north", tmp_path / "k.pub")
