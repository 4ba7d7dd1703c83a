"""Drills of what is between a site and its server: clocks, certificates, keys, proxies and networks."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import networks
from networks import Apart, inside, start_nginx
from stage import SITES, Result, Stage, about, before_all, disturbed, set_of

from fedistill.certificates import DAYS, make_certificate
from fedistill.deploy import Server, environment, make_site_key, read_server
from fedistill.processes import start_time, tree_with_times
from fedistill.rehearsal import fedistill, free_port

CLOCK = """\
import datetime
real = datetime.datetime
class Fast(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(minutes=10)
datetime.datetime = Fast
"""
CERTIFICATE_SECONDS, REST_SECONDS = 130.0, 75.0  # of a certificate: when it is made, and when the run begins
LISTENS = 22_222
DOWN = 30.0  # seconds that a link is down
TWICE = """\
server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {pki}/server.crt;
    ssl_certificate_key {pki}/server.key;
    client_max_body_size 16m;
    proxy_http_version 1.1;
    location / {{ proxy_pass https://{link}; }}
    location /v1/fleet/push- {{
        mirror /twice;
        proxy_pass https://{link};
    }}
    location = /twice {{
        internal;
        proxy_pass http://127.0.0.1:{copies}$request_uri;
    }}
}}
"""
LATER = 2.0  # seconds after which an upload comes once more
# What must not get past the proxy, spelt in ways that a proxy and a server may read differently.
CLOSED = (
    "/", "/docs", "/openapi.json", "/health", "/v1/control/list-runs", "/v1/runtime/acquire-task", "/v1//control/list-runs",
    "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs", "/v1/control/list-runs/%2e%2e/%2e%2e/fleet/",
    "/v1/control/list-runs/../../fleet/", "/v1/fleet%2f..%2fcontrol/list-runs",
)  # fmt: skip
REFUSALS = {400, 403, 404}


def clock_off(stage: Stage, name: str, seed: int) -> Result:
    """A site's clock is ten minutes fast"""
    place = stage.folder / "late"
    place.mkdir()
    (place / "sitecustomize.py").write_text(CLOCK)
    return stage.refused_start(name, "south", PYTHONPATH=before_all(place))


def wrong_authority(stage: Stage, name: str, seed: int) -> Result:
    """A server that another authority vouches for"""
    other = stage.folder / "other"
    fedistill("server", "init", other, "--address", "127.0.0.1")
    with stage.swapped(stage.site("south") / "south.ca.crt", (other / "pki" / "ca.crt").read_bytes()):
        return stage.refused_start(name, "south")


def unknown_key(stage: Stage, name: str, seed: int) -> Result:
    """A key that was never admitted"""
    place = stage.folder / "stranger"
    make_site_key(place)
    with stage.swapped(stage.site("south") / "south.key", place.read_bytes()):
        return stage.refused_start(name, "south")


def key_twice(stage: Stage, name: str, seed: int) -> Result:
    """A second machine with the key of a site that is connected"""
    with stage.swapped(stage.site("south") / "south.key", (stage.site("north") / "north.key").read_bytes()):
        result = stage.refused_start(name, "south")
    stage.mended()
    out = stage.begin(name, seed=seed)
    stage.wait(out)
    return replace(result, ok=result.ok and set_of(out, seed) == set_of(stage.expected(seed), seed))


def expired_certificate(stage: Stage, name: str, seed: int) -> Result:
    """The server's certificate runs out during a run, and a site and the server start then; renewed, and the same command again"""
    server = read_server(stage.federation.server)
    end = datetime.now(UTC) + timedelta(seconds=CERTIFICATE_SECONDS)
    with patch("fedistill.certificates._now", lambda: end - timedelta(days=DAYS)):
        make_certificate(server.pki, server.host)
    stage.stop("server")
    stage.federation.start_server()
    sleep_until(end - timedelta(seconds=REST_SECONDS))
    out = stage.begin(name, seed=seed, iterations=400)
    sleep_until(end + timedelta(seconds=2))
    steps, harm = stage.steps(out, "north"), time.monotonic()
    at_work = bool(stage.told(out)) and not (out / "summary.json").exists()
    site = stage.refused_start(name, "south")
    below = tree_with_times(stage.federation.processes["server"].pid)
    stage.stop("server")
    left = [pid for pid, began in below.items() if began and start_time(pid) == began]
    try:
        stage.federation.start_server()
        said = "nothing"
    except TimeoutError:
        said = stage.said("server")
    fedistill("server", "renew", server.folder)
    stage.federation.start_server()
    stage.mended()
    stage.again(name)
    stage.wait_anew(out)
    result = stage.judged(name, seed, out, harm, steps, iterations=400)
    clear = at_work and not left and site.ok and "expired" in site.sees and "expired" in said and "server renew" in said
    return replace(result, ok=result.ok and clear, sees=f"site: {site.sees} server: {said}")


def sleep_until(when: datetime) -> None:
    time.sleep(max((when - datetime.now(UTC)).total_seconds(), 0))


def upload_cut(stage: Stage, name: str, seed: int) -> Result:
    """The network breaks in the middle of an upload, for 20 s"""
    out = stage.begin(name, seed=seed, ipc=20)
    stage.wait(out, stage.distils(out, "south"))
    steps, harm = stage.steps(out, "north"), time.monotonic()
    stage.proxy.cut(20)
    stage.wait(out)
    assert stage.proxy.cuts == 1
    return stage.judged(name, seed, out, harm, steps, ipc=20)


def answers_late(stage: Stage, name: str, seed: int) -> Result:
    """A site's set is held up on its way until the deadline has passed; it arrives while the run goes on without it"""
    settings = {"ipc": 20, "deadline": 150.0, "quorum": 1, "iterations": 100}
    expected = stage.expected(seed, **settings)
    out = stage.begin(name, seed=seed, **settings)
    stage.wait(out, stage.distils(out, "south"))
    stage.proxy.hold()
    try:
        stage.wait(out, lambda: any("no answer within" in line for line in stage.told(out)))
    finally:
        harm = time.monotonic()
        stage.proxy.release()
    running = not (out / "summary.json").exists()
    stage.wait(out)
    outbox = stage.site("south") / "work" / "site-south" / "outbox"
    let_go = (outbox / set_of(expected, seed, "south")).exists()
    south = about(out, "south")
    alone = set_of(out, seed) == set_of(expected, seed, "north") and south["status"] == "late"
    ok = running and bool(stage.proxy.held) and let_go and alone
    return Result(name, ok, time.monotonic() - harm, f"south: {south['reason']}", "that site's part")


def answers_twice(stage: Stage, name: str, seed: int) -> Result:
    """Every answer of a site arrives twice: each of its uploads is copied on its way, and sent once more after two seconds"""
    server, port = read_server(stage.federation.server), free_port()
    place = Path(tempfile.mkdtemp(prefix="nginx-"))
    with Copies(server) as copies:
        file = place / "twice.conf"
        file.write_text(TWICE.format(port=port, pki=server.pki, link=server.link, copies=copies.server_port))
        nginx = start_nginx(place, file, ("127.0.0.1", port))
        try:
            with diverted(stage, port):
                began = time.monotonic()
                out = stage.begin(name, seed=seed)
                stage.wait(out)
                result = stage.judged(name, seed, out, began, [])
        finally:
            nginx.terminate()
            nginx.wait()
            shutil.rmtree(place)
    counts = ", ".join(f"{count} answered by {status}" for status, count in sorted(copies.statuses.items()))
    told = f"{result.sees}. {copies.statuses.total()} uploads once more: {counts}"
    return replace(result, ok=result.ok and copies.statuses.total() > 0, sees=told, lost="nothing")


class Copies(ThreadingHTTPServer):
    """Takes copies of requests to a server, and sends each there after `LATER` seconds; `statuses`: of the answers."""

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), Copy)
        self.server, self.statuses = server, Counter[int]()

    def __enter__(self) -> Copies:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Copy(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        copies = self.server
        assert isinstance(copies, Copies)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        time.sleep(LATER)
        trusting = ssl.create_default_context(cafile=copies.server.pki / "ca.crt")
        wire = http.client.HTTPSConnection("127.0.0.1", copies.server.port, timeout=60, context=trusting)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        wire.request("POST", self.path, body, headers)
        copies.statuses[wire.getresponse().status] += 1
        wire.close()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def diverted(stage: Stage, port: int) -> Iterator[None]:
    """South's connections come to another port of this machine than the server's."""
    stage.stop("south")
    before, stage.proxy.server = stage.proxy.server, port
    stage.back("south")
    try:
        yield
    finally:
        stage.stop("south")
        stage.proxy.server = before
        stage.back("south")


def behind_nginx(stage: Stage, name: str, seed: int) -> Result:
    """Sites come through nginx with the configuration that `server init` writes; what else is open to the outside is looked for"""
    with Stage(stage.folder / name, Apart) as apart:
        assert isinstance(apart.federation, Apart)
        place, began = apart.federation.place, time.monotonic()
        out = apart.begin(name, seed=seed)
        with inside("server"):  # what follows is no proof otherwise
            open_inside = asked(networks.INNER, apart) - REFUSALS and lists_runs(networks.INNER, apart)
        with inside("north"):
            ports = networks.open_ports(networks.SERVER)
            answers, lists = asked(networks.GATE, apart), lists_runs(networks.GATE, apart)
        apart.wait(out)
        result = apart.judged(name, seed, out, began, [])
        came = (place / "access.log").read_text()
    closed = bool(open_inside) and answers <= REFUSALS and ports == [networks.GATE] and not lists
    told = f"from outside: port {', '.join(map(str, ports))}; other paths are answered by {', '.join(map(str, sorted(answers)))}"
    ok = result.ok and closed and "POST /v1/fleet/push-messages 200" in came
    return replace(result, ok=ok, sees=told, lost="nothing")


def asked(port: int, stage: Stage) -> set[int]:
    """With which statuses a port of the server answers to `CLOSED`, sent as it is spelt, by GET and by POST."""
    trusting = ssl.create_default_context(cafile=stage.site("north") / "north.ca.crt")
    found = set()
    for path in CLOSED:
        for method, body in (("GET", None), ("POST", b"")):
            wire = http.client.HTTPSConnection(host_of(port), port, timeout=10, context=trusting)
            wire.request(method, path, body)
            found.add(wire.getresponse().status)
            wire.close()
    return found


def lists_runs(port: int, stage: Stage) -> bool:
    """Whether Flower's own command lists the runs by this port of the server, as it does for an operator."""
    home = stage.folder / f"flower-{port}"
    env = environment(home)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "it"\n[superlink.it]\naddress = "{host_of(port)}:{port}"\n'
        f'root-certificates = "{stage.site("north") / "north.ca.crt"}"\n'
    )
    words = ["flwr", "list", "it", "--format", "json"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    return '"success": true' in done.stdout


def host_of(port: int) -> str:
    return "127.0.0.1" if port == networks.INNER else networks.SERVER


def own_networks(stage: Stage, name: str, seed: int) -> Result:
    """The server and each site in a network of its own, which takes no connections from outside; a site's link is down for 30 s"""
    with Stage(stage.folder / name, Apart) as apart:
        ways: dict[tuple[str, str], bool] = {}
        for site in SITES:
            with inside(site):
                listener = socket.create_server(("0.0.0.0", LISTENS))
            with listener:
                open_to_all = reaches("server", site)  # what follows is no proof otherwise
                networks.close_to_outside(site)
                ways |= {(other, site): reaches(other, site) for other in ("server", *SITES) if other != site}
            ways |= {(site, "server"): reaches(site, "server")}

        def harm() -> float:
            when = time.monotonic()
            networks.link("north", "down")
            time.sleep(DOWN)
            networks.link("north", "up")
            return when

        result = disturbed(apart, name, seed, harm)
    outward = {way for way, there in ways.items() if there} == {(site, "server") for site in SITES}
    return replace(result, ok=result.ok and open_to_all and outward)


def reaches(one: str, other: str) -> bool:
    """Whether a connection can be opened, to a port at which something listens."""
    place = (networks.SERVER, networks.GATE) if other == "server" else (networks.address(other), LISTENS)
    with inside(one):
        return networks.connects(*place)
