"""Certificates: a federation's own authority and what it signs, and those that an operator has from elsewhere.

    pki/ca.crt, ca.key             the federation's own authority
    pki/server.crt, server.key     by it, for the server's address and for this machine
    pki/outside.crt, outside.key, outside-ca.crt   the operator's own, where there are any

Programs on the server's machine reach the server at 127.0.0.1, which no public authority vouches for: they always use the
federation's own. What sites see is what the proxy shows: the operator's own where there are any.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedistill.errors import FedistillError
from fedistill.files import write_bytes
from fedistill.tls import trial

DAYS = 825  # of a server's certificate
AUTHORITY_DAYS = 3650  # a new authority means new kits for all sites
WARN_DAYS = 30
LONGEST_COMMON = 64  # characters of a certificate's common name
MOST_BYTES = 100_000  # of a file in a kit
_PEM, _PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


@dataclass(frozen=True)
class Shown:
    """What a server shows, and the authority by which it is to be trusted."""

    certificate: Path
    key: Path
    authority: Path


def inside(pki: Path) -> Shown:
    """For programs on the server's own machine."""
    return Shown(pki / "server.crt", pki / "server.key", pki / "ca.crt")


def outside(pki: Path) -> Shown:
    """For sites."""
    if not (pki / "outside.crt").exists():
        return inside(pki)
    return Shown(pki / "outside.crt", pki / "outside.key", pki / "outside-ca.crt")


def make_authority(pki: Path, host: str) -> None:
    """An authority of the federation's own, and a first certificate by it."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedistill authority")])
    end = _now() + datetime.timedelta(days=AUTHORITY_DAYS)
    made = _builder(name, name, key, key, end, signs=True)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    _write(pki / "ca", made.sign(key, hashes.SHA384()), key)
    make_certificate(pki, host)


def make_certificate(pki: Path, host: str) -> None:
    """A new key, and a certificate by the federation's own authority for `host` and for this machine.

    What was there before is kept as `server.*.old`. Raises `FedistillError` ("no-authority") where the authority's key is away.
    """
    try:
        authority = x509.load_pem_x509_certificate((pki / "ca.crt").read_bytes())
        signer = serialization.load_pem_private_key((pki / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise FedistillError(
            "no-authority", f"{pki} lacks ca.crt or ca.key, or they cannot be read: put back the copies that you kept."
        ) from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != authority.public_key():
        raise FedistillError("no-authority", f"{pki / 'ca.key'} is not the key of {pki / 'ca.crt'}.")
    if authority.not_valid_after_utc <= _now():
        raise FedistillError(
            "expired", f"The authority {pki / 'ca.crt'} has expired: make a new server, and new kits for all sites."
        )
    for file in (pki / "server.crt", pki / "server.key"):
        if file.exists():
            write_bytes(file.with_name(f"{file.name}.old"), file.read_bytes(), private=True)
    places: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        places.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        places.append(x509.DNSName(host))
    key = ec.generate_private_key(ec.SECP384R1())
    shown = host if len(host) <= LONGEST_COMMON else "fedistill server"  # what counts is the alternative name below
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, shown)])
    end = min(_now() + datetime.timedelta(days=DAYS), authority.not_valid_after_utc)
    made = _builder(authority.subject, name, key, signer, end, signs=False)
    made = made.add_extension(x509.SubjectAlternativeName(list(dict.fromkeys(places))), critical=False)
    _write(pki / "server", made.sign(signer, hashes.SHA384()), key)


def keep_own(pki: Path, given: Shown, host: str) -> None:
    """Check an operator's own certificate, and keep copies: sites are given the authority, and the proxy shows the certificate.

    Raises `FedistillError` ("bad-certificate") where a site would not trust the server with them.
    """
    chain, authority = _certificates(given.certificate), _certificates(given.authority)
    if len(authority) > MOST_BYTES:
        raise FedistillError(
            "bad-certificate", f"{given.authority} holds many authorities: give the one that {given.certificate} is by."
        )
    try:
        key = serialization.load_pem_private_key(_read(given.key), None)
    except TypeError:
        raise FedistillError(
            "bad-certificate", f"{given.key} has a passphrase, and a proxy starts without a person: give one without."
        ) from None
    except ValueError:
        raise FedistillError("bad-certificate", f"{given.key} is no private key in PEM.") from None
    if (why := trial(given.certificate, given.key, given.authority, host)) is not None:
        raise FedistillError("bad-certificate", f"With {given.certificate}, sites would not trust the server: {why}.")
    plain = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN)
    write_bytes(pki / "outside-ca.crt", authority)
    write_bytes(pki / "outside.key", plain, private=True)
    write_bytes(pki / "outside.crt", chain)


def check_certificates(pki: Path, host: str) -> list[str]:
    """Sentences on what soon expires. Raises `FedistillError` ("bad-certificate") on what nobody would trust now."""
    soon = []
    for shown, name in dict.fromkeys([(inside(pki), "localhost"), (outside(pki), host)]):
        mine = shown.authority.name == "ca.crt"
        todo = (
            "`fedistill server renew FOLDER` makes a new one" if mine else "give a new one to `fedistill server renew`"
        )
        if (why := trial(shown.certificate, shown.key, shown.authority, name)) is not None:
            raise FedistillError(
                "bad-certificate", f"{shown.certificate} cannot be used: {why}. {todo[0].upper()}{todo[1:]}."
            )
        soon += [f"{shown.certificate} {words}: {todo}." for words in [_soon(shown.certificate)] if words]
        todo = "sites need new kits from a new server, or they cannot connect" if mine else "sites need its successor"
        soon += [f"{shown.authority} {words}: {todo}." for words in [_soon(shown.authority)] if words]
    return list(dict.fromkeys(soon))


def end_of(certificate: Path) -> datetime.datetime:
    """When the first certificate of a file ends. Raises `FedistillError` ("bad-certificate") where it holds none."""
    return x509.load_pem_x509_certificate(_certificates(certificate)).not_valid_after_utc


def _soon(certificate: Path) -> str:
    end = end_of(certificate)
    days = (end - _now()).days
    return f"expires in {days} days, on {end:%Y-%m-%d}" if days < WARN_DAYS else ""


def _certificates(path: Path) -> bytes:
    """The certificates of a file, and nothing else that it may hold."""
    try:
        found = x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise FedistillError("bad-certificate", f"{path} is no certificate in PEM.") from None
    return b"".join(one.public_bytes(_PEM) for one in found)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedistillError("bad-certificate", f"{path} cannot be read: {error.strerror}.") from None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _builder(
    issuer: x509.Name,
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    end: datetime.datetime,
    *,
    signs: bool,
) -> x509.CertificateBuilder:
    made = x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(_now() - datetime.timedelta(hours=1)).not_valid_after(end)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    mine = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return made.add_extension(mine, critical=False).add_extension(_usage(signs=signs), critical=True)


def _write(stem: Path, made: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    plain = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN)
    write_bytes(stem.with_suffix(".key"), plain, private=True)
    write_bytes(stem.with_suffix(".crt"), made.public_bytes(_PEM))


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Of an authority, or of a server."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
