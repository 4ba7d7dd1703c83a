"""Checksums and a signature: what shows that a release is still what its publisher made.

`SHA256SUMS` is what `sha256sum -c` reads; it lists every file but itself and the signature. `SIGNATURE` is Ed25519 (RFC 8032) over
the bytes of `SHA256SUMS`, in base64. The public key lies beside it, but says nothing about who owns it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedistill.errors import FedistillError
from fedistill.files import read_plain, write_bytes

SUMS = "SHA256SUMS"
SIGNATURE = "SIGNATURE"
PUBLIC_KEY = "PUBLIC-KEY.pem"
LARGEST = 2**20  # bytes of the three
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0\r\n]+)")


def keygen(path: Path) -> Path:
    """Write a new private key to `path`, readable by its owner only, and its public half to `path`.pub, which is returned.

    Raises `FedistillError` where one of them exists, or cannot be written.
    """
    public = path.with_name(path.name + ".pub")
    for place in (path, public):
        if os.path.lexists(place):
            raise FedistillError("exists", f"{place} exists already: choose another name, a key is never overwritten.")
    key = Ed25519PrivateKey.generate()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(private_bytes(key))
        write_bytes(public, public_bytes(key.public_key()))
    except OSError:
        raise FedistillError("not-writable", f"The key {path} cannot be written: choose another place.") from None
    return public


def load_private(path: Path) -> Ed25519PrivateKey:
    """The private key that `keygen` wrote. Raises `FedistillError` ("bad-key") where there is none."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise FedistillError(
            "bad-key", f"{path} is not an Ed25519 private key without a password: `fedistill release keygen` makes one."
        )
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """The public key in the file at `path`. Raises `FedistillError` ("bad-key") where there is none."""
    try:
        key = load_pem_public_key(read_plain(path, LARGEST))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise FedistillError("bad-key", f"{path} is not an Ed25519 public key: give the .pub file of the publisher.")
    return key


def private_bytes(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_bytes(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: Ed25519PublicKey) -> str:
    """A short name of the key, which people can compare over the telephone."""
    digest = hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:32]
    return "-".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, key: Ed25519PrivateKey | None) -> None:
    """Write the checksums of all files in `folder`, and sign them where there is a key."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (SUMS, SIGNATURE))
    sums = "".join(f"{sha256(folder / name)}  {name}\n" for name in names).encode()
    write_bytes(folder / SUMS, sums)
    if key is not None:
        write_bytes(folder / SIGNATURE, base64.b64encode(key.sign(sums)) + b"\n")


def broken_files(folder: Path) -> list[str]:
    """One sentence for every file that is missing, changed or was not there when the release was sealed."""
    try:
        text = read_plain(folder / SUMS, LARGEST).decode()
    except (OSError, UnicodeDecodeError):
        return [f"{SUMS} is missing or cannot be read, so nothing shows that the files are unchanged."]
    lines = [_LINE.fullmatch(line) for line in text.removesuffix("\n").split("\n")]
    if not all(lines) or len({line[2] for line in lines if line}) < len(lines):
        return [f"{SUMS} is not a list of checksums and file names."]
    listed = {line[2]: line[1] for line in lines if line}
    found = []
    for name, expected in listed.items():
        path = folder / name
        try:
            digest = None if path.is_symlink() or not path.is_file() else sha256(path)
        except OSError:  # a name that no file system takes, or a file that may not be read
            digest = None
        if digest is None:
            found.append(f"{name} is missing, or not a plain file.")
        elif digest != expected:
            found.append(f"{name} was changed: its checksum is not the one in {SUMS}.")
    extra = sorted({path.name for path in folder.iterdir()} - set(listed) - {SUMS, SIGNATURE})
    return found + [f"{name} does not belong to the release: {SUMS} does not list it." for name in extra]


def check_signature(folder: Path, expected: Ed25519PublicKey | None) -> tuple[str, list[str]]:
    """(what the signature shows, what is wrong with it).

    expected: the publisher's key, from another place than the release; without it the enclosed key is used, which only shows
    that nobody changed the files who does not hold the same private key.
    """
    enclosed: Ed25519PublicKey | None = None
    if (folder / PUBLIC_KEY).exists():
        try:
            enclosed = load_public(folder / PUBLIC_KEY)
        except FedistillError:
            return "unsigned", [f"{PUBLIC_KEY} is not an Ed25519 public key."]
    if not (folder / SIGNATURE).exists():
        if enclosed is not None:
            return "unsigned", [f"{SIGNATURE} is missing, though the release holds a public key."]
        return "unsigned", [] if expected is None else [f"The release is not signed: it has no {SIGNATURE}."]
    key = enclosed if expected is None else expected
    if key is None:
        return "unsigned", [f"The release has a {SIGNATURE} but no {PUBLIC_KEY}."]
    try:
        signature = base64.b64decode(read_plain(folder / SIGNATURE, LARGEST).strip(), validate=True)
        key.verify(signature, read_plain(folder / SUMS, LARGEST))
    except (InvalidSignature, OSError, binascii.Error, ValueError):
        whose = "enclosed key" if expected is None else "given public key"
        return "bad", [f"The signature is not that of the {whose} over {SUMS}."]
    if enclosed is None or fingerprint(enclosed) != fingerprint(key):
        return "bad", [f"The enclosed {PUBLIC_KEY} is not the given public key."]
    return ("by the enclosed key " if expected is None else "by the given key ") + fingerprint(key), []
