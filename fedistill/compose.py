"""A server and its proxy as containers: one file for `docker compose`.

The server is in the proxy's own network, so the server stays on 127.0.0.1 there, and only the proxy's port is to be had outside.
It is that way round because a container that starts again finds the network of one that went on, and not the reverse.
Paths are the same within as without: every other file of the folder names them.
"""

from __future__ import annotations

import json
import os

_COMPOSE = """\
# FEDISTILL_IMAGE: an image in which fedistill is installed (docs/deployment.md). Commands of the operator:
#   docker compose exec server fedistill server status {folder} RUN
services:
  proxy:
    image: nginx:stable
    ports: ["{outside}:{outside}"]
    volumes:
      - {config}
      - {certificate}
      - {key}
      - {authority}
    restart: always
  server:
    image: ${{FEDISTILL_IMAGE:-fedistill}}
    command: {command}
    network_mode: "service:proxy"   # where it listens on 127.0.0.1
    depends_on: [proxy]
    user: "{user}"
    environment: {{HOME: /tmp, USER: fedistill}}
    volumes: [{all}]
    stop_grace_period: 30s
    restart: always
"""


def compose_of(*, folder: str, gate: str, certificate: str, key: str) -> str:
    """The text of `compose.yaml`. The proxy is given the three files that it needs, and no other secret.

    folder: one that `deploy.check_path` lets pass, so that nothing in it means something to Compose.
    """
    within = {
        "all": f"{folder}:{folder}",
        "config": f"{folder}/nginx.conf:/etc/nginx/conf.d/default.conf:ro",
        "certificate": f"{certificate}:{certificate}:ro",
        "key": f"{key}:{key}:ro",
        "authority": f"{folder}/pki/ca.crt:{folder}/pki/ca.crt:ro",
    }
    quoted = {name: json.dumps(text) for name, text in within.items()}
    command = json.dumps(["fedistill", "server", "start", folder])
    return _COMPOSE.format(folder=folder, command=command, user=f"{os.getuid()}:{os.getgid()}", outside=gate, **quoted)
