"""Whether a site can reach its server: the network, the certificates, the clocks, and the files that it takes.

What is wrong is one sentence. `MENDS` names what goes away by itself, or when the other side does something: it is worth
trying again.
"""

from __future__ import annotations

import base64
import email.utils
import errno
import http.client
import socket
import ssl
import stat
import time
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedistill.certificates import WARN_DAYS, end_of
from fedistill.errors import FedistillError
from fedistill.site.policy import Connection
from fedistill.tls import EARLY, EXPIRED, kind_of, why

SECONDS = 10.0  # for an answer
CLOCK_WARN, CLOCK_WRONG = 60.0, 300.0  # Flower takes no signature that is older
MENDS = ("no-name", "no-route", "refused", "no-answer", "not-there", EXPIRED, EARLY)


@dataclass(frozen=True)
class Reached:
    """What the server showed. clock: seconds that this machine is ahead of it."""

    certificate_ends: datetime
    clock: float


def check_files(link: Connection) -> None:
    """Raises `FedistillError` where a file of [connection] is missing, the authority is no certificate, or the key none that Flower
    takes."""
    for needed in (link.authority, link.key):
        if not needed.is_file():
            raise FedistillError("no-file", f"{needed} is not there, and [connection] names it.")
    end_of(link.authority)
    _check_key(link.key)


def reach(link: Connection) -> Reached:
    """Connect as the SuperNode does, through the same proxy of the hospital where the environment names one.

    Raises `FedistillError` with one sentence on what is wrong, whose code is in `MENDS` or not.
    """
    check_files(link)
    host, _, port = link.server.rpartition(":")
    if not host or not port.isdigit():
        raise FedistillError("bad-address", f"server={link.server} in [connection] is not host:port.")
    context = ssl.create_default_context(cafile=link.authority)
    proxy = None if urllib.request.proxy_bypass(host) else _proxy()
    near, gate = (host, int(port)) if proxy is None else (proxy.host, proxy.port)
    wire = http.client.HTTPSConnection(near, gate, timeout=SECONDS, context=context)
    if proxy is not None:
        wire.set_tunnel(host, int(port), proxy.headers)
    try:
        wire.connect()
        shown = x509.load_der_x509_certificate(wire.sock.getpeercert(binary_form=True) or b"")
        wire.request("GET", "/v1/fleet/")
        answer = wire.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise _sentence(error, host, port, link, proxy) from None
    finally:
        wire.close()
    if answer.status in (502, 503, 504):
        raise FedistillError(
            "not-there", f"{link.server} answers, but the server behind its proxy does not: ask the operator."
        )
    try:
        clock = time.time() - email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (TypeError, ValueError):
        clock = 0.0  # a server that does not say
    return Reached(shown.not_valid_after_utc, round(clock, 1))


def warnings(link: Connection, found: Reached) -> list[str]:
    """Sentences on what is not wrong yet, or not wrong enough."""
    told = []
    mode = stat.S_IMODE(link.key.stat().st_mode)
    if mode & 0o077:
        told.append(f"{link.key} can be used by other accounts (mode {mode:o}): chmod 600 {link.key}.")
    for what, end in (
        (f"The authority {link.authority}", end_of(link.authority)),
        ("The server's certificate", found.certificate_ends),
    ):
        days = (end - datetime.now(UTC)).days
        if days < WARN_DAYS:
            told.append(f"{what} expires in {days} days, on {end:%Y-%m-%d}: tell the operator.")
    if abs(found.clock) > CLOCK_WARN:
        told.append(clock_sentence(found))
    return told


def clock_sentence(found: Reached) -> str:
    ahead = f"{abs(found.clock):.0f} s {'ahead of' if found.clock > 0 else 'behind'} the server's"
    return f"This machine's clock is {ahead}, and Flower refuses sites at {CLOCK_WRONG:.0f} s: set it (NTP)."


def _check_key(path: Path) -> None:
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FedistillError(
            "bad-key",
            f"{path} is no key that Flower takes (in OpenSSH's format, of a NIST curve, without a passphrase): put back the one "
            "that `site init` made.",
        )


@dataclass(frozen=True)
class _Proxy:
    """A hospital's. headers: what it is told besides where to connect to."""

    host: str
    port: int
    headers: dict[str, str]


def _proxy() -> _Proxy | None:
    """The one that the environment names. Raises `FedistillError` ("bad-proxy") where that is no address."""
    text = urllib.request.getproxies().get("https")
    if not text:
        return None
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port = "", 0
    if not host:
        shown = text.rpartition("@")[2]  # without the password
        raise FedistillError("bad-proxy", f"https_proxy names no proxy ({shown}): write http://host:port.")
    if parts.username is None:
        return _Proxy(host, port, {})
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return _Proxy(host, port, {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"})


def _sentence(error: Exception, host: str, port: str, link: Connection, proxy: _Proxy | None) -> FedistillError:
    where = f"{host}:{port}"
    if proxy is not None and isinstance(error, socket.gaierror | ConnectionRefusedError):  # never of what is behind it
        host, where = proxy.host, f"the proxy {proxy.host}:{proxy.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return FedistillError(kind_of(error), f"{where} is not to be trusted: {why(error, host, link.authority)}.")
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError):
        return FedistillError(
            "no-answer", f"The connection to {where} broke off: does the server run, is the port right?"
        )
    if isinstance(error, ssl.SSLError):
        return FedistillError(
            "no-tls", f"{where} does not speak TLS ({why(error, host, link.authority)}): is the port right?"
        )
    if isinstance(error, socket.gaierror):
        return FedistillError("no-name", f"The name {host} is not known here: is it spelt right, does DNS work?")
    if isinstance(error, ConnectionRefusedError):
        return FedistillError("refused", f"Nothing listens at {where}: does the server run, is the port right?")
    if isinstance(error, TimeoutError):
        return FedistillError(
            "no-answer", f"{where} does not answer within {SECONDS:.0f} s: a firewall may be in the way."
        )
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN):
        return FedistillError("no-route", f"There is no way from here to {where}: is the network up?")
    return FedistillError("no-answer", f"The connection to {where} broke off ({error or type(error).__name__}).")
