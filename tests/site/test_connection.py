"""Whether a site reaches its server: every way to fail is one sentence, and known to mend itself or not."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from authority import hospital, served
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedistill import cli
from fedistill.certificates import Shown
from fedistill.deploy import make_site_key
from fedistill.errors import FedistillError
from fedistill.evaluation import probe
from fedistill.site import connection, room
from fedistill.site.connection import MENDS, reach, warnings
from fedistill.site.policy import Connection

SITE = '[site]\nname = "north"\ndata = "phantom"\nwork = "{work}"\n'
LINK = '[connection]\nserver = "{server}"\nauthority = "root.crt"\nkey = "site.key"\n'


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    found = hospital(tmp_path_factory.mktemp("own"), "127.0.0.1")
    key = found.key.with_name("site.key")
    make_site_key(key)
    return found


def link(own: Shown, server: str) -> Connection:
    return Connection(server=server, authority=own.authority, key=own.key.with_name("site.key"))


def test_a_server_that_is_there(own: Shown) -> None:
    with served(own.certificate, own.key) as port:
        site = link(own, f"127.0.0.1:{port}")
        found = reach(site)
    assert abs(found.clock) < 10
    assert warnings(site, found) == []


@pytest.fixture
def silent() -> Iterator[int]:
    """A port at which a connection is taken and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def plain() -> Iterator[int]:
    """A port at which something else than TLS is spoken."""

    def speak() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            one.recv(100)
            one.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
            one.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def failure(site: Connection) -> FedistillError:
    with pytest.raises(FedistillError) as caught:
        reach(site)
    return caught.value


@pytest.mark.parametrize(
    ("host", "kwargs", "why", "mends"),
    [
        ("127.0.0.1", {"ends": -0.5}, "has expired", True),
        ("127.0.0.1", {"begins": 1}, "is not valid yet", True),
        ("other.example.org", {}, r"is not for 127\.0\.0\.1", False),
    ],
)
def test_certificates_that_are_not_to_be_trusted(
    host: str, kwargs: dict[str, float], why: str, mends: bool, tmp_path: Path
) -> None:
    bad = hospital(tmp_path, host, **kwargs)  # type: ignore[arg-type]
    make_site_key(bad.key.with_name("site.key"))
    with served(bad.certificate, bad.key) as port:
        error = failure(link(bad, f"127.0.0.1:{port}"))
    assert re.search(why, error.sentence)
    assert (error.code in MENDS) is mends


def test_another_authority(own: Shown, tmp_path: Path) -> None:
    other = hospital(tmp_path, "127.0.0.1")
    with served(other.certificate, other.key) as port:
        error = failure(link(own, f"127.0.0.1:{port}"))
    assert "is not by the authority in" in error.sentence
    assert error.code not in MENDS


def test_the_network(own: Shown, silent: int, plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    error = failure(link(own, f"127.0.0.1:{closed}"))
    assert (error.code, error.code in MENDS) == ("refused", True)
    monkeypatch.setattr(connection, "SECONDS", 0.2)
    error = failure(link(own, f"127.0.0.1:{silent}"))
    assert (error.code, error.code in MENDS) == ("no-answer", True)
    error = failure(link(own, f"127.0.0.1:{plain}"))
    assert (error.code, error.code in MENDS) == ("no-tls", False)
    error = failure(link(own, "no-such-host.invalid:443"))
    assert (error.code, error.code in MENDS) == ("no-name", True)
    assert failure(link(own, "127.0.0.1")).code == "bad-address"


@pytest.mark.parametrize("linger", [0, None])
def test_a_connection_cut_in_the_middle_of_a_handshake_mends(own: Shown, linger: int | None) -> None:
    """With an end (the way is closed) and with a reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def cut() -> None:
            there, _ = listener.accept()
            there.recv(10)
            if linger is not None:
                there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, linger))
            there.close()

        threading.Thread(target=cut, daemon=True).start()
        error = failure(link(own, f"127.0.0.1:{listener.getsockname()[1]}"))
    assert "broke off" in error.sentence
    assert error.code in MENDS


def test_a_proxy_without_a_server(own: Shown) -> None:
    with served(own.certificate, own.key, status=502) as port:
        error = failure(link(own, f"127.0.0.1:{port}"))
    assert "behind its proxy does not" in error.sentence
    assert error.code in MENDS


def test_a_proxy_of_the_hospital_is_asked(own: Shown, plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{plain}")
    monkeypatch.setenv("no_proxy", "")
    assert "broke off" in failure(link(own, "fed.example.org:443")).sentence
    for text, said in (
        ("http://no-such-proxy.invalid:1/", "no-such-proxy.invalid is not known"),
        ("http://u:pw@:x/", "no proxy"),
    ):
        monkeypatch.setenv("https_proxy", text)
        sentence = failure(link(own, "fed.example.org:443")).sentence
        assert said in sentence
        assert "pw" not in sentence


@contextmanager
def proxy(login: str) -> Iterator[int]:
    """A hospital's proxy, which connects whoever gives this name and password to where they say."""

    def pipe(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while part := one.recv(65536):
                other.sendall(part)
            other.shutdown(socket.SHUT_WR)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            _, place, _ = self.rfile.readline().decode().split()
            headers = http.client.parse_headers(self.rfile)
            if headers["Proxy-Authorization"] != f"Basic {base64.b64encode(login.encode()).decode()}":
                self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            host, _, port = place.partition(":")
            with socket.create_connection((host, int(port))) as there:
                back = threading.Thread(target=pipe, args=(there, self.connection))
                back.start()
                pipe(self.connection, there)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("text", ["http://u%40h:p%3Aw@127.0.0.1:{port}/", "u%40h:p%3Aw@127.0.0.1:{port}"])
def test_a_proxy_that_wants_a_password_gets_it(text: str, own: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    with served(own.certificate, own.key) as port, proxy("u@h:p:w") as gate:
        monkeypatch.setenv("https_proxy", text.format(port=gate))
        assert abs(reach(link(own, f"127.0.0.1:{port}")).clock) < 10
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{gate}/")
        assert "407" in failure(link(own, f"127.0.0.1:{port}")).sentence


def test_a_key_that_is_none(own: Shown, tmp_path: Path) -> None:
    key = tmp_path / "site.key"
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    for content in (b"x", b"", own.key.read_bytes(), other):
        key.write_bytes(content)
        error = failure(replace(link(own, "127.0.0.1:1"), key=key))
        assert (error.code, "is no key that Flower takes" in error.sentence) == ("bad-key", True)


@pytest.mark.parametrize(("clock", "words"), [(90.0, "90 s behind"), (-90.0, "90 s ahead of"), (400.0, "400 s behind")])
def test_clocks(clock: float, words: str, own: Shown) -> None:
    with served(own.certificate, own.key, clock=clock) as port:
        site = link(own, f"127.0.0.1:{port}")
        (sentence,) = warnings(site, reach(site))
    assert words.split()[1] in sentence
    assert abs(int(sentence.split("clock is ")[1].split()[0]) - abs(clock)) <= 2


def test_what_will_be_wrong(tmp_path: Path) -> None:
    soon = hospital(tmp_path, "127.0.0.1", ends=9.5)
    key = tmp_path / "site.key"
    make_site_key(key)
    key.chmod(0o644)
    with served(soon.certificate, soon.key) as port:
        site = link(soon, f"127.0.0.1:{port}")
        told = warnings(site, reach(site))
    assert ["chmod 600" in told[0], "expires in 9 days" in told[1], len(told)] == [True, True, 2]


def check(policy: Path, *words: str) -> int:
    return int(cli.app(["site", "check", "--site", str(policy), "--json", *words], standalone_mode=False) or 0)


def test_check_carries_it_all(own: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = own.key.with_name("site.toml")
    with served(own.certificate, own.key, clock=400.0) as port:
        policy.write_text(SITE.format(work=tmp_path) + LINK.format(server=f"127.0.0.1:{port}"))
        assert check(policy) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["connection"]["reached"]
    assert found["connection"]["certificate_ends"] < found["connection"]["authority_ends"]
    assert "behind the server's" in found["problems"][0]
    assert found["warnings"] == []
    assert found["disk"]["free_bytes"] > found["disk"]["job_bytes"] > 10**8
    assert check(policy) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["connection"]["reached"], "Nothing listens" in found["problems"][0]) == (False, True)
    policy.write_text(SITE.format(work=tmp_path))
    assert check(policy) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["connection"], found["problems"], found["warnings"], found["probe"]) == (None, [], [], None)
    cli.app(["site", "check", "--site", str(policy)], standalone_mode=False)
    assert "nothing was asked of a server" in capsys.readouterr().err


def test_check_with_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick, measure = {"eval_steps": 2, "eval_nets": 2, "workers": 1}, probe.probe
    monkeypatch.setattr(probe, "probe", lambda config, data: measure(replace(config, **quick), data, (1,)))
    policy = tmp_path / "site.toml"
    policy.write_text(SITE.format(work=tmp_path))
    assert check(policy, "--probe") == 0
    assert json.loads(capsys.readouterr().out)["probe"]["format"] == "fedistill-probe/1"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LEAST", 10**18)
    with pytest.raises(FedistillError, match="a site needs 1 GB at least"):
        room.free(tmp_path / "not" / "there")


def test_missing_files(own: Shown, tmp_path: Path) -> None:
    gone = Connection(server="127.0.0.1:1", authority=own.authority, key=tmp_path / "gone.key")
    assert failure(gone).code == "no-file"
    (tmp_path / "ca.crt").write_text("no")
    bad = Connection(server="127.0.0.1:1", authority=tmp_path / "ca.crt", key=own.key)
    assert failure(bad).code == "bad-certificate"
