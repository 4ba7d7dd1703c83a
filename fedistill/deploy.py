"""What a server and its sites are set up with: keys, certificates, kits, and the command lines of Flower's programs.

    FOLDER/server.toml       the address that sites use, and the port behind it
    FOLDER/pki/              ca.crt, server.crt and their keys (`fedistill.certificates`); superexec.secret; kit.key
    FOLDER/sites/, keys/     under which name each node was admitted, and its public key
    FOLDER/kits/north.zip    what a site gets: the authority's certificate, the address, its name. No secret.
    FOLDER/nginx.conf        passes to the sites what they need, and nothing else
    FOLDER/compose.yaml      the server and that proxy as containers
    FOLDER/runs/             results
    FOLDER/started/          which of Flower's runs a run is

A private key is made where it is used and never travels. A kit is signed with kit.key, so it is whole, and by the same server as
the one before. That the first is genuine its fingerprint shows, told over another way: the key to check it with comes with it.
"""

from __future__ import annotations

import getpass
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedistill.certificates import MOST_BYTES, Shown, keep_own, make_authority, outside
from fedistill.compose import compose_of
from fedistill.errors import FedistillError
from fedistill.files import plain_members, read_plain, write_bytes, write_once
from fedistill.release.seal import load_private, private_bytes, public_bytes
from fedistill.simulation import app_folder
from fedistill.wire import strict_json

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_PART = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # between the dots of a host's name
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_PART}(\.{_PART})*")
_OTHERS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
REMOVED = "Flower takes it never again, so the site makes a new one with `fedistill site init` in another folder."
HERE = "here"  # what Flower's configuration calls the server
_PEM, _PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()
_KIT = ("ca.crt", "site.json", "README.txt", "kit.pub")
_SIGNATURE = "kit.sig"  # Ed25519, over the hash of these
_NGINX = """\
# The only way in from outside. Operators use the port behind it, on this machine: whoever reaches that can run code at the sites.
server {{
    listen {outside} ssl;
    server_name {host};
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    client_max_body_size 16m;                   # Flower sends pieces of 5 MiB
    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{port};
        proxy_set_header Host $host;
        proxy_http_version 1.1;
        proxy_request_buffering off;
        proxy_ssl_trusted_certificate {folder}/pki/ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_verify on;
    }}
    location / {{ return 403; }}
}}
"""
_UNIT = """\
[Unit]
Description=fedistill {what}
After=network-online.target
Wants=network-online.target

[Service]
User={user}
ExecStart={command}
KillMode=mixed
Restart=always
RestartSec=10

[Install]
WantedBy=multi-user.target
"""
_README = """\
This kit lets the site "{name}" take part in a federation of fedistill, at {address}. It holds no secret.

1. Ask the operator for the fingerprint of the kit over the telephone, and compare it with what the next command prints.
2. fedistill site init --kit {name}.zip --data DATA --work WORK
3. Read and change site.toml: it says what may leave. Then: fedistill site check
4. Send {name}.key.pub to the operator. {name}.key stays here.
5. fedistill site start
"""


@dataclass(frozen=True)
class Server:
    """A server's folder, what sites reach it by ("host:port"), and the port of the SuperLink on 127.0.0.1."""

    folder: Path
    address: str
    port: int

    @property
    def link(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def host(self) -> str:
        return self.address.partition(":")[0]

    @property
    def pki(self) -> Path:
        return self.folder / "pki"


@dataclass(frozen=True)
class Kit:
    name: str
    address: str
    authority: bytes
    fingerprint: str
    signer: bytes  # public key


def begin_server(folder: Path, address: str, port: int, own: Shown | None = None) -> Server:
    """Write the folder of a server. own: certificates that sites are to see in place of the federation's own.

    Raises `FedistillError` where there is one, or on an address that is none, or certificates that do not fit it.
    """
    if folder.exists() and any(folder.iterdir()):
        what = "holds a server already" if (folder / "server.toml").exists() else "is not empty"
        raise FedistillError("exists", f"{folder} {what}: choose another folder.")
    host, _, gate = address.partition(":")
    gate = gate or "443"
    if not _is_address(host, gate) or not 0 < int(gate) < 65536:
        raise FedistillError("bad-address", f"'{address}' is not the address of a server: write host or host:port.")
    folder = folder.absolute()
    check_path(folder)
    server = Server(folder, f"{host}:{gate}", port)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")  # the folder is there whole, or not at all
    new.mkdir(parents=True, mode=0o700)
    try:
        _fill(new, server, gate, own)
        if folder.exists():
            folder.rmdir()
        os.rename(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return server


def _fill(new: Path, server: Server, gate: str, own: Shown | None) -> None:
    """What `server` consists of, in the folder `new`, which will be its own."""
    (new / "pki").mkdir(mode=0o700)
    make_authority(new / "pki", server.host)
    if own is not None:
        keep_own(new / "pki", own, server.host)
    write_once(new / "pki" / "superexec.secret", secrets.token_hex(32).encode())
    folder, shown = server.folder, outside(new / "pki")
    certificate, key = f"{folder}/pki/{shown.certificate.name}", f"{folder}/pki/{shown.key.name}"
    config = (
        f'[superlink]\ndefault = "{HERE}"\n[superlink.{HERE}]\naddress = "{server.link}"\n'
        f'root-certificates = "{folder}/pki/ca.crt"\n'
    )
    write_bytes(new / "flower" / "config.toml", config.encode())
    proxy = _NGINX.format(
        outside=gate, host=server.host, port=server.port, folder=folder, certificate=certificate, key=key
    )
    write_bytes(new / "nginx.conf", proxy.encode())
    compose = compose_of(folder=str(folder), gate=gate, certificate=certificate, key=key)
    write_bytes(new / "compose.yaml", compose.encode())
    write_bytes(new / "fedistill-server.service", unit_of(f"server start {folder}").encode())
    write_bytes(new / "server.toml", f'address = "{server.address}"\nport = {server.port}\n'.encode())


def check_path(path: Path) -> None:
    """Raises `FedistillError` ("bad-path") on what would have another meaning in a unit, in nginx.conf or in Flower's words."""
    if found := re.search(r"[^\w./@:+,~-]", str(path)):
        raise FedistillError("bad-path", f"{path} has the character {found[0]!r}: choose a folder without it.")


def unit_of(words: str) -> str:
    """A unit for systemd that runs `fedistill WORDS` under this account, and again where it stops."""
    return _UNIT.format(what=words.split()[0], user=getpass.getuser(), command=f"{_program('fedistill')} {words}")


def read_server(folder: Path) -> Server:
    """Raises `FedistillError` where the folder holds no server."""
    try:
        found = tomllib.loads((folder / "server.toml").read_text())
        return Server(folder.absolute(), str(found["address"]), int(found["port"]))
    except (OSError, ValueError, KeyError):
        raise FedistillError("no-server", f"{folder} holds no server: `fedistill server init` makes one.") from None


def make_kit(server: Server, name: str) -> tuple[Path, str]:
    """The kit of a site, and its fingerprint. Raises `FedistillError` on a name that would not do for a file, and on a key that
    is none any more."""
    check_name(name)
    parts = {
        "ca.crt": outside(server.pki).authority.read_bytes(),
        "site.json": json.dumps({"name": name, "address": server.address}, sort_keys=True).encode(),
        "README.txt": _README.format(name=name, address=server.address).encode(),
    }
    write_once(server.pki / "kit.key", private_bytes(ed25519.Ed25519PrivateKey.generate()))
    signer = load_private(server.pki / "kit.key")
    parts["kit.pub"] = public_bytes(signer.public_key())
    parts[_SIGNATURE] = signer.sign(_digest(parts))
    path = kit_file(server, name)
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for part in parts:
            archive.writestr(zipfile.ZipInfo(f"{name}/{part}"), parts[part])
    return path, _fingerprint(parts)


def _is_address(host: str, port: str) -> bool:
    return bool(_HOST.fullmatch(host) and re.fullmatch("[0-9]{1,5}", port))


def check_name(name: str) -> None:
    """Raises `FedistillError` ("bad-name") on a name that would not do for a file."""
    if not NAME.fullmatch(name):
        raise FedistillError(
            "bad-name", f"'{name}' is no name for a site: use up to 32 lower-case letters, digits and dashes."
        )


def kit_file(server: Server, name: str) -> Path:
    return server.folder / "kits" / f"{name}.zip"


def read_kit(path: Path) -> Kit:
    """What a kit holds; nothing of it is unpacked. Raises `FedistillError` ("bad-kit") on anything else than a kit."""
    parts: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(read_plain(path, 4 * MOST_BYTES))) as archive:
            for entry in plain_members(archive):
                name = entry.filename.rpartition("/")[2]
                if name not in (*_KIT, _SIGNATURE) or name in parts or entry.file_size > MOST_BYTES:
                    raise ValueError
                with archive.open(entry) as file:
                    parts[name] = file.read(MOST_BYTES)
        about = strict_json(parts["site.json"].decode())
        name, address = about["name"], about["address"]
        host, _, gate = address.rpartition(":")
        if set(parts) != {*_KIT, _SIGNATURE} or not NAME.fullmatch(name) or not _is_address(host, gate):
            raise ValueError
        x509.load_pem_x509_certificate(parts["ca.crt"])
        signer = serialization.load_pem_public_key(parts["kit.pub"])
        if not isinstance(signer, ed25519.Ed25519PublicKey):
            raise ValueError
        signer.verify(parts[_SIGNATURE], _digest(parts))
    except Exception:  # archives and certificates are refused with a dozen kinds of errors, some of them undocumented
        raise FedistillError(
            "bad-kit", f"{path} is no kit of `fedistill server add-site`, or was changed on its way."
        ) from None
    return Kit(name, address, parts["ca.crt"], _fingerprint(parts), parts["kit.pub"])


def make_site_key(path: Path) -> Path:
    """A private key that Flower takes, for its owner's eyes alone, unless there is one; returns where its public half is."""
    public = path.with_name(f"{path.name}.pub")
    fresh = ec.generate_private_key(ec.SECP384R1())
    stored = write_once(path, fresh.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, _PLAIN))
    key = serialization.load_ssh_private_key(stored, None)
    ssh = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_bytes(public, ssh + b"\n")
    return public


def link_commands(server: Server) -> list[list[str]]:
    """The SuperLink, and beside it what starts the server's part of a run: nobody without the secret gets its work."""
    pki = server.pki
    secret = ["--superexec-auth-secret-file", str(pki / "superexec.secret")]
    tls = ["--ssl-ca-certfile", str(pki / "ca.crt"), "--ssl-certfile", str(pki / "server.crt")]
    tls += ["--ssl-keyfile", str(pki / "server.key")]
    place = ["--host", "127.0.0.1", "--port", str(server.port), "--database", str(server.folder / "state.db")]
    safe = ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation", "process", *secret]
    runtime = ["--root-certificates", str(pki / "ca.crt"), "--runtime-api-address", server.link]
    return [
        [_program("flower-superlink"), *place, *tls, *safe],
        [_program("flower-superexec"), *runtime, *secret],
    ]


def node_command(policy_file: Path, server: str, authority: Path, key: Path, port: int) -> list[str]:
    """The SuperNode of a site."""
    where = ["--superlink", server, "--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    return [_program("flower-supernode"), *where, "--port", str(port), "--node-config", f'site-config="{policy_file}"']


def node_environment(home: Path, policy_file: Path) -> dict[str, str]:
    """For a site's SuperNode, which starts programs by their names: it finds our `flwr-clientapp` (`client/guard.py`), and no other
    program of Flower that would run what a server sends. There are several, and a version to come may have more."""
    place, beside = home / "bin", Path(sys.executable).parent
    words = [sys.executable, "-P", str(app_folder() / "client" / "guard.py"), str(policy_file)]
    refusal = "echo 'This site runs client apps only.' >&2; exit 1"
    programs = dict.fromkeys((*_OTHERS, *(found.name for found in beside.glob("flwr*"))), refusal)
    programs |= {
        "flwr-clientapp": f'exec {shlex.join(words)} "$@"',
        "flower-superexec": f'exec {shlex.quote(_program("flower-superexec"))} "$@"',
    }
    for name, line in programs.items():
        write_bytes(place / name, f"#!/bin/sh\n{line}\n".encode())
        (place / name).chmod(0o700)
    harmless = [part for part in os.environ.get("PATH", os.defpath).split(os.pathsep) if not _has_flower(part)]
    return environment(home) | {"PATH": os.pathsep.join([str(place), *harmless])}


def _has_flower(folder: str) -> bool:
    return not folder or any(Path(folder).glob("flwr*")) or any(Path(folder).glob("flower-*"))


def environment(home: Path) -> dict[str, str]:
    """For Flower's programs: a folder of their own, nothing told to others, and our programs found first."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **quiet, "FLWR_HOME": str(home), "PATH": path}


def note_site(server: Server, node: str, name: str, key: bytes = b"") -> None:
    """Keep under which name a node's key was admitted: Flower does not tell it. A file each, so that no two admissions meet.

    key: the public one, where it is new.
    """
    if key:
        write_bytes(server.folder / "keys" / node, key)
    write_bytes(server.folder / "sites" / node, name.encode())


def forget_site(server: Server, node: str) -> None:
    """Of a node that is out. Its key is kept, which Flower never takes again."""
    (server.folder / "sites" / node).unlink()


def admitted_sites(server: Server) -> dict[str, str]:
    """Names by the nodes' numbers."""
    return {file.name: file.read_text() for file in (server.folder / "sites").glob("[0-9]*")}


def node_of_name(server: Server, name: str) -> str:
    """Raises `FedistillError` ("no-site") where no site, or more than one, was admitted under the name."""
    found = [node for node, other in admitted_sites(server).items() if other == name]
    if len(found) != 1:
        what = "No site" if not found else "More than one site"
        raise FedistillError("no-site", f"{what} was admitted as '{name}': `fedistill server sites FOLDER` lists them.")
    return found[0]


def check_new(server: Server, name: str) -> None:
    """Raises `FedistillError` where no site can be admitted under a name: it is none, has no kit, or is taken."""
    check_name(name)
    if not kit_file(server, name).exists():
        raise FedistillError(
            "no-kit",
            f"There is no kit for '{name}' in {server.folder}: is it spelt right? `fedistill server add-site` makes one.",
        )
    if name in admitted_sites(server).values():
        raise FedistillError(
            "taken", f"'{name}' is admitted already: take it out first (`fedistill server remove-site`), or rename it."
        )


def check_key(server: Server, public: Path) -> bytes:
    """A public key that was never admitted before. Raises `FedistillError`, where it was, with whose it is."""
    if not public.is_file() or public.stat().st_size > 10_000 or b"PRIVATE" in public.read_bytes():
        raise FedistillError("bad-key", f"{public} is no public key: the file that the site sends ends in .pub.")
    key, names = public.read_bytes(), admitted_sites(server)
    for file in (server.folder / "keys").glob("[0-9]*"):
        if file.read_bytes().split()[:2] == key.split()[:2]:  # after these comes a comment
            name = names.get(file.name)
            raise FedistillError(
                "known-key",
                f"The key in {public} was admitted as '{name}': `fedistill server rename-site` gives it another name."
                if name is not None
                else f"The key in {public} is of a site that was removed: {REMOVED}",
            )
    return key


def admitted_file(out: Path) -> Path:
    """Beside a run's folder: those of `admitted_sites`, as it was when the run was started, that the run asks."""
    return out.with_name(f"{out.name}.admitted.json")


def run_words(settings: Mapping[str, Any]) -> str:
    """Settings as `flwr run -c` takes them."""
    return " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items())


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _digest(parts: Mapping[str, bytes]) -> bytes:
    """A hash of a kit's files, but for the signature."""
    return hashlib.sha256(b"".join(hashlib.sha256(parts[name]).digest() for name in _KIT)).digest()


def _fingerprint(parts: Mapping[str, bytes]) -> str:
    """Sixteen digits in groups of four, to be read aloud."""
    digest = _digest(parts).hex()[:16]
    return " ".join(digest[k : k + 4] for k in range(0, 16, 4))
