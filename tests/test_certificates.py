"""Certificates: by the federation's own authority or the operator's, renewed without the sites, and said before they end."""

from __future__ import annotations

import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from authority import PEM, hospital, served
from cryptography import x509

from fedistill import certificates, cli
from fedistill.certificates import (
    AUTHORITY_DAYS,
    DAYS,
    Shown,
    check_certificates,
    end_of,
    inside,
    make_certificate,
    outside,
)
from fedistill.deploy import Server, begin_server, link_commands, make_kit, make_site_key, read_kit
from fedistill.errors import FedistillError
from fedistill.site.connection import reach
from fedistill.site.policy import Connection
from fedistill.tls import trial


def say(*words: object) -> None:
    cli.app(list(map(str, words)), standalone_mode=False)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return begin_server(tmp_path / "server", "127.0.0.1:8443", 8123)


def link(server: Server, port: int, folder: Path) -> Connection:
    """A site's, from its kit."""
    kit = read_kit(make_kit(server, "north")[0])
    (folder / "north.ca.crt").write_bytes(kit.authority)
    make_site_key(folder / "north.key")
    return Connection(server=f"127.0.0.1:{port}", authority=folder / "north.ca.crt", key=folder / "north.key")


def test_sites_go_on_after_a_renewal(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = inside(server.pki)
    with served(mine.certificate, mine.key) as port:
        site = link(server, port, tmp_path)
        before = reach(site)
    old = mine.certificate.read_bytes(), mine.key.read_bytes()
    say("server", "renew", server.folder)
    assert "Start the server again" in capsys.readouterr().err
    with served(mine.certificate, mine.key) as port:
        after = reach(Connection(server=f"127.0.0.1:{port}", authority=site.authority, key=site.key))
    assert after.certificate_ends >= before.certificate_ends
    kept = mine.certificate.with_name("server.crt.old"), mine.key.with_name("server.key.old")
    assert tuple(path.read_bytes() for path in kept) == old
    assert mine.certificate.read_bytes() != old[0]
    assert mine.key.read_bytes() != old[1]
    for path in (mine.key, kept[1], server.pki / "ca.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not list(server.pki.glob(".*"))


def test_a_renewal_needs_the_key_of_the_authority(server: Server, tmp_path: Path) -> None:
    key = server.pki / "ca.key"
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(FedistillError, match="put back the copies"):
        say("server", "renew", server.folder)
    key.write_bytes(inside(server.pki).key.read_bytes())
    with pytest.raises(FedistillError, match="is not the key of"):
        say("server", "renew", server.folder)
    key.write_bytes(kept)
    say("server", "renew", server.folder)


def test_a_certificate_that_ends_is_said_before_and_refused_after(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_certificates(server.pki, server.host) == []
    apart = end_of(inside(server.pki).authority) - end_of(inside(server.pki).certificate)
    # they were made one after the other, maybe in two seconds
    assert round(apart / timedelta(days=1)) == AUTHORITY_DAYS - DAYS
    monkeypatch.setattr(certificates, "DAYS", 12)
    make_certificate(server.pki, server.host)
    (soon,) = check_certificates(server.pki, server.host)
    assert "server.crt expires in 11 days" in soon
    assert "fedistill server renew" in soon
    (server.folder / "runs/job").mkdir(parents=True)
    (server.folder / "runs/job/events.jsonl").write_text("")
    say("server", "status", server.folder, "job", "--json")
    assert '"certificates": [\n' in capsys.readouterr().out
    monkeypatch.setattr(certificates, "DAYS", 1)
    monkeypatch.setattr(certificates, "_now", shifted(days=-2))
    make_certificate(server.pki, server.host)
    monkeypatch.undo()
    with pytest.raises(FedistillError, match=r"has expired. `fedistill server renew FOLDER` makes a new one\."):
        say("server", "start", server.folder)
    say("server", "status", server.folder, "job")
    assert "has expired" in capsys.readouterr().err


def shifted(days: int) -> Callable[[], object]:
    import datetime

    now = datetime.datetime.now(datetime.UTC)
    return lambda: now + datetime.timedelta(days=days)


def test_a_key_of_another_certificate_is_refused_at_start(server: Server) -> None:
    (server.pki / "server.key").write_bytes(
        (server.pki / "ca.key").read_bytes()
    )  # as a kill within a renewal leaves it
    with pytest.raises(FedistillError, match="is not the key of"):
        say("server", "start", server.folder)


def words(given: Shown) -> list[object]:
    return ["--certificate", given.certificate, "--certificate-key", given.key, "--authority", given.authority]


def test_an_operators_own_certificate_is_what_sites_see(tmp_path: Path) -> None:
    given, folder = hospital(tmp_path / "own", "127.0.0.1"), tmp_path / "server"
    given.certificate.write_bytes(given.certificate.read_bytes() + given.key.read_bytes())  # as some tools write it
    say("server", "init", folder, "--address", "127.0.0.1", *words(given))
    server = Server(folder, "127.0.0.1:443", 8000)
    shown = outside(server.pki)
    assert shown.certificate.name == "outside.crt"
    assert b"PRIVATE" not in shown.certificate.read_bytes()
    assert stat.S_IMODE(shown.key.stat().st_mode) == 0o600
    assert read_kit(make_kit(server, "north")[0]).authority == given.authority.read_bytes()
    text = (folder / "nginx.conf").read_text()
    assert f"ssl_certificate {folder}/pki/outside.crt;" in text
    assert f"ssl_certificate_key {folder}/pki/outside.key;" in text
    assert f"proxy_ssl_trusted_certificate {folder}/pki/ca.crt;" in text
    assert f"{folder}/pki/server.crt" in link_commands(server)[0]  # programs here use 127.0.0.1
    assert trial(*vars(inside(server.pki)).values(), "localhost") is None
    with served(shown.certificate, shown.key) as port:
        reach(link(server, port, tmp_path))


def test_an_operators_own_certificate_is_renewed(tmp_path: Path) -> None:
    first = hospital(tmp_path / "own", "h.example.org")
    server = begin_server(tmp_path / "server", "h.example.org", 8000, first)
    before = inside(server.pki).certificate.read_bytes()
    with pytest.raises(FedistillError, match="is not by the authority in"):
        say("server", "renew", server.folder, *words(hospital(tmp_path / "other", "h.example.org"))[:4])
    say("server", "renew", server.folder, *words(first)[:4])
    assert inside(server.pki).certificate.read_bytes() == before
    say("server", "renew", server.folder)
    assert inside(server.pki).certificate.read_bytes() != before
    plain = begin_server(tmp_path / "plain", "h.example.org", 8000)
    with pytest.raises(FedistillError, match="no certificate of your own"):
        say("server", "renew", plain.folder, *words(first)[:4])
    with pytest.raises(FedistillError, match="Give --certificate with --certificate-key"):
        say("server", "renew", server.folder, *words(first)[:2])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda g: g.certificate.unlink(), "cannot be read"),
        (lambda g: g.key.unlink(), "cannot be read"),
        (lambda g: g.authority.write_text("no"), "is no certificate"),
        (lambda g: g.certificate.write_text("no"), "is no certificate"),
        (lambda g: g.key.write_text("no"), "is no private key"),
        (lambda g: g.key.write_bytes(g.key.with_name("root.key").read_bytes()), "is not the key of"),
        (lambda g: hospital(g.key.parent, "fed.example.org", ends=-0.5), "has expired"),
        (lambda g: hospital(g.key.parent, "fed.example.org", begins=1), "is not valid yet"),
        (lambda g: hospital(g.key.parent, "other.example.org"), "is not for fed.example.org"),
        (lambda g: hospital(g.key.parent, passphrase=b"x"), "has a passphrase"),
        (lambda g: g.authority.write_bytes(inner(g)), "is not by the authority in"),
        (lambda g: g.authority.write_bytes(200 * g.authority.read_bytes()), "holds many authorities"),
    ],
)
def test_certificates_that_will_not_do(change: Callable[[Shown], object], why: str, tmp_path: Path) -> None:
    given = hospital(tmp_path / "own")
    change(given)
    with pytest.raises(FedistillError, match=why):
        say("server", "init", tmp_path / "server", "--address", "fed.example.org", *words(given))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]  # nothing half made


def inner(given: Shown) -> bytes:
    return hospital(given.key.parent.parent / "own/another").authority.read_bytes()


def test_all_three_or_none(tmp_path: Path) -> None:
    given = hospital(tmp_path / "own")
    for k in range(0, 6, 2):
        with pytest.raises(FedistillError, match="or none of them"):
            say("server", "init", tmp_path / "s", "--address", "fed.example.org", *words(given)[k : k + 2])
    assert x509.load_pem_x509_certificate(given.authority.read_bytes()).public_bytes(PEM)
