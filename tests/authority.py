"""Certificates for tests: an authority, what it signs, and a server that shows it."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedistill.certificates import Shown

PEM = serialization.Encoding.PEM


def hospital(
    folder: Path,
    host: str = "fed.example.org",
    *,
    begins: float = -1,
    ends: float = 365,
    passphrase: bytes | None = None,
) -> Shown:
    """An authority of its own, and a certificate by it. begins, ends: in days from now."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in ("hospital authority", host)]
    try:
        place: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        place = x509.DNSName(host)
    extensions: tuple[Any, ...] = (x509.BasicConstraints(True, None), x509.SubjectAlternativeName([place]))
    for stem, name, key, extension in zip(("root", "leaf"), names, keys, extensions, strict=True):
        made = x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number())
        first, last = (begins, ends) if stem == "leaf" else (-1000, 1000)
        made = made.not_valid_before(now + datetime.timedelta(days=first))
        made = made.not_valid_after(now + datetime.timedelta(days=last))
        made = made.add_extension(extension, critical=stem == "root")
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
        made = made.add_extension(issuer, critical=False)
        (folder / f"{stem}.crt").write_bytes(made.sign(keys[0], hashes.SHA256()).public_bytes(PEM))
        lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        (folder / f"{stem}.key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock))
    return Shown(folder / "leaf.crt", folder / "leaf.key", folder / "root.crt")


@contextmanager
def served(certificate: Path, key: Path, *, status: int = 404, clock: float = 0.0) -> Iterator[int]:
    """A server with TLS on a port of this machine, which answers everything with `status`, by a clock that is off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(datetime.datetime.now().timestamp() + clock, usegmt=True)

        def log_message(self, *_: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
