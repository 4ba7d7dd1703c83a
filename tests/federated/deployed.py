"""A SuperLink with TLS, and SuperNodes with keys of their own, on this machine: what a real federation is made of."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BIN = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
PLAIN = serialization.NoEncryption()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Federation:
    """Use it as a context: its processes end with it. `folder` holds keys, logs, and what Flower keeps."""

    def __init__(self, folder: Path, policies: Mapping[str, Path]) -> None:
        self.folder, self._policies, self._port = folder, policies, free_port()
        self._running: list[subprocess.Popen[bytes]] = []
        for name in ("user", "link", *policies):
            (folder / name).mkdir(parents=True)
        _certificates(folder)
        (folder / "user/config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self._port}"\n'
            f'root-certificates = "{folder}/ca.crt"\n'
        )

    def __enter__(self) -> Federation:
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key"]
        link = [
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            *tls,
            "--enable-supernode-auth",
            "--database",
            "state.db",
        ]
        self._start(
            "link", ["flower-superlink", *link, "--disable-runtime-dependency-installation"], "startup complete"
        )
        for name, policy in self._policies.items():
            _site_key(self.folder / f"{name}.key")
            self.flwr("supernode", "register", str(self.folder / f"{name}.key.pub"), "here", "--name", name)
            here = [
                "--superlink",
                f"127.0.0.1:{self._port}",
                "--root-certificates",
                "ca.crt",
                "--port",
                str(free_port()),
            ]
            mine = ["--auth-supernode-private-key", f"{name}.key", "--node-config", f'site-config="{policy}"']
            self._start(name, ["flower-supernode", *here, *mine], "SuperNode ID")

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def run(self, app: Path, settings: Mapping[str, Any], out: Path, seconds: float) -> None:
        """Run the app and wait until its folder holds a summary; raises `TimeoutError`, with the logs, where it does not."""
        words = {**settings, "out": str(out)}
        said = " ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in words.items())
        self.flwr("run", str(app), "here", "-c", said)
        end = time.monotonic() + seconds
        while not (out / "summary.json").exists():
            if time.monotonic() > end or (out / "error.json").exists():
                raise TimeoutError("\n".join(log.read_text()[-2000:] for log in sorted(self.folder.glob("*.log"))))
            time.sleep(0.2)

    def flwr(self, *words: str) -> str:
        env = os.environ | QUIET | {"FLWR_HOME": str(self.folder / "user"), "COLUMNS": "200"}
        done = subprocess.run([BIN / "flwr", *words], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _start(self, name: str, words: Sequence[str], ready: str) -> None:
        log = self.folder / f"{name}.log"
        env = (
            os.environ
            | QUIET
            | {"FLWR_HOME": str(self.folder / name), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        )
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [BIN / words[0], *words[1:]], cwd=self.folder, env=env, stdout=file, stderr=file, start_new_session=True
            )
        self._running.append(process)
        end = time.monotonic() + 120
        while not re.search(ready, log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > end:
                raise TimeoutError(f"{name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)


def _certificates(folder: Path) -> None:
    """An authority, and a certificate of this machine's loopback address by it."""
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in ("fedistill test CA", "localhost")]
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    extensions: dict[str, list[tuple[x509.ExtensionType, bool]]] = {
        "ca": [(x509.BasicConstraints(ca=True, path_length=None), True)],
        "server": [(x509.SubjectAlternativeName(addresses), False)],
    }
    for file, name, key in (("ca", names[0], authority), ("server", names[1], server)):
        made = x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        for extension, critical in extensions[file]:
            made = made.add_extension(extension, critical)
        signed = made.sign(authority, hashes.SHA384())
        (folder / f"{file}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, PLAIN)
    )


def _site_key(path: Path) -> None:
    key, ssh = ec.generate_private_key(ec.SECP384R1()), serialization.Encoding.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
    path.with_name(f"{path.name}.pub").write_bytes(
        key.public_key().public_bytes(ssh, serialization.PublicFormat.OpenSSH)
    )
