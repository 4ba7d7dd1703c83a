"""A federation whose server and sites are in networks of their own, behind the proxy that `server init` writes.

    north 10.77.1.2 ---- 10.77.1.1 \\
                                    server 10.77.0.1: nginx on 443, the SuperLink on 127.0.0.1:8000
    south 10.77.2.2 ---- 10.77.2.1 /

A network is a namespace of Linux, a link a veth pair. The server passes nothing on from one link to another. What comes to a site
from outside for a port below `OWN` it can drop, without an answer; from `OWN` on are the ports of connections that it opened.
It needs root, iproute2 and nginx.
"""

from __future__ import annotations

import ctypes
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedistill.rehearsal import Federation

SERVER, GATE, INNER = "10.77.0.1", 443, 8000
NUMBERS = {"north": 1, "south": 2}
OWN = 50_000
NGINX = "/usr/sbin/nginx"
_WHOLE = """\
daemon off;
user www-data;
pid {place}/pid;
error_log {place}/error.log;
events {{}}
http {{
    log_format way '$request_method $uri $status';
    access_log {place}/access.log way;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    include {server};
}}
"""
_libc = ctypes.CDLL(None, use_errno=True)


class Apart(Federation):
    """A federation with two sites, in three networks. `place`: of nginx, with its `access.log`."""

    def __enter__(self) -> Apart:
        self.place = Path(tempfile.mkdtemp(prefix="nginx-"))
        try:
            make_networks(list(self._sites))
            super().__enter__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        remove_networks(list(self._sites))
        shutil.rmtree(self.place, ignore_errors=True)

    def begin(self) -> None:
        self.folder.mkdir(parents=True, mode=0o700)
        self.command("server", "init", self.server, "--address", SERVER, "--port", INNER)
        self.start_server()
        with inside("server"):
            self.processes["nginx"] = start_nginx(self.place, self.server / "nginx.conf", (SERVER, GATE))

    def command(self, *words: object) -> str:
        with inside(next((name for name in self._sites if self.policy(name) in words), "server")):
            return super().command(*words)

    def _start(
        self, name: str, words: Sequence[object], ready: str, environment: Mapping[str, str] | None = None
    ) -> None:
        with inside(name):
            super()._start(name, words, ready, environment)


def start_nginx(place: Path, server: Path, listens: tuple[str, int]) -> subprocess.Popen[bytes]:
    """nginx with the file `server` as it is, after its own look at it (`nginx -t`); `listens`: an address that it will have."""
    place.chmod(0o755)  # its workers run under another account
    whole = place / "nginx.conf"
    whole.write_text(_WHOLE.format(place=place, server=server))
    words = [NGINX, "-p", str(place), "-c", str(whole)]
    subprocess.run([*words, "-t"], check=True)
    process = subprocess.Popen(words)
    end = time.monotonic() + 10
    while not connects(*listens):
        if process.poll() is not None or time.monotonic() > end:
            raise TimeoutError(f"nginx did not start: {(place / 'error.log').read_text()[-1000:]}")
        time.sleep(0.1)
    return process


def make_networks(sites: list[str]) -> None:
    remove_networks(sites)
    for name in ("server", *sites):
        _ip("netns", "add", _of(name))
        _ip("-n", _of(name), "link", "set", "lo", "up")
    _ip("-n", _of("server"), "addr", "add", f"{SERVER}/32", "dev", "lo")
    for site in sites:
        here, there = address(site), gateway(site)
        _ip(
            "link",
            "add",
            "out",
            "netns",
            _of(site),
            "type",
            "veth",
            "peer",
            "name",
            f"to-{site}",
            "netns",
            _of("server"),
        )
        for name, link, own in ((site, "out", here), ("server", f"to-{site}", there)):
            _ip("-n", _of(name), "addr", "add", f"{own}/30", "dev", link)
            _ip("-n", _of(name), "link", "set", link, "up")
        _ip("-n", _of(site), "route", "add", "default", "via", there)
        with inside(site):
            Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{OWN} 65535")


def close_to_outside(site: str) -> None:
    """Drop what comes from outside to a port that is none of a connection of the site's own."""
    rule = ("-n", _of(site), "rule")
    _ip(*rule, "add", "pref", "100", "lookup", "local")  # behind the one that follows
    _ip(*rule, "del", "pref", "0")
    _ip(*rule, "add", "pref", "10", "iif", "out", "ipproto", "tcp", "dport", f"1-{OWN - 1}", "blackhole")


def link(site: str, state: str) -> None:
    """Pull the cable of a site, or put it back: "down", "up"."""
    _ip("-n", _of("server"), "link", "set", f"to-{site}", state)


def remove_networks(sites: list[str]) -> None:
    for name in ("server", *sites):
        subprocess.run(["ip", "netns", "del", _of(name)], check=False, stderr=subprocess.DEVNULL)


def address(site: str) -> str:
    return f"10.77.{NUMBERS[site]}.2"


def gateway(site: str) -> str:
    return f"10.77.{NUMBERS[site]}.1"


@contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and the processes that it starts, in another network."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{_of(name)}") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def connects(host: str, port: int, seconds: float = 1.0) -> bool:
    with suppress(OSError), socket.create_connection((host, port), seconds):
        return True
    return False


def open_ports(host: str) -> list[int]:
    """Every TCP port of a host, of a network without loss, at which something listens."""
    return [port for port in range(1, 65536) if connects(host, port)]


def _enter(network: int) -> None:
    if _libc.setns(network, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _of(name: str) -> str:
    return f"fedistill-{name}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
