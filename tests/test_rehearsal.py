"""A federation on this machine ends in good order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedistill.rehearsal import Federation

# Says goodbye some time after it was told to end: to a server, if that is still there.
PROGRAM = """
import signal, sys, time
from pathlib import Path

place, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def goodbye(*_):
    time.sleep(seconds)
    (place / name).write_text("" if (place / "server").exists() else "the server was there")
    sys.exit()

signal.signal(signal.SIGTERM, goodbye)
print(flush=True)
while True:
    time.sleep(0.05)
"""


def test_a_slow_site_says_goodbye_while_the_server_is_there(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "federation", {}, {})
    for name, seconds in (("server", 0.0), ("quick", 0.0), ("slow", 1.0)):
        words = [sys.executable, "-c", PROGRAM, str(tmp_path), name, str(seconds)]
        process = federation.processes[name] = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
    federation.stop()
    assert all(process.poll() == 0 for process in federation.processes.values())
    assert (tmp_path / "slow").read_text() == "the server was there"
