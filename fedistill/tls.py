"""Whether a client trusts what a server shows, and in one sentence why it does not."""

from __future__ import annotations

import ssl
from pathlib import Path

OTHER, NAME, EXPIRED, EARLY = "other-authority", "wrong-name", "expired", "not-yet-valid"
_CODES = {9: EARLY, 10: EXPIRED, 62: NAME, 64: NAME} | dict.fromkeys((2, 18, 19, 20, 21), OTHER)  # of OpenSSL


def kind_of(error: ssl.SSLError) -> str:
    """One of the kinds above, or "tls"."""
    return _CODES.get(getattr(error, "verify_code", 0), "tls")


def why(error: ssl.SSLError, host: str, authority: Path) -> str:
    """What is wrong, to follow on "it does not work:"."""
    return {
        OTHER: f"its certificate is not by the authority in {authority}",
        NAME: f"its certificate is not for {host}",
        EXPIRED: "its certificate, or that of its authority, has expired",
        EARLY: "its certificate is not valid yet (or a clock is wrong)",
    }.get(kind_of(error), f"{error.reason or error}".replace("_", " ").lower())


def trial(certificate: Path, key: Path, authority: Path, host: str) -> str | None:
    """Why a client that trusts `authority` would not take this server for `host`, or None: a handshake within this process."""
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key, password="")
        client = ssl.create_default_context(cafile=authority)
        inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.wrap_bio(inward, outward, server_hostname=host),
            server.wrap_bio(outward, inward, server_side=True),
        ]
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{key} is not the key of {certificate}"
        return why(error, host, authority)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    return None
