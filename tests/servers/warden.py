"""Runs one server program and ends it when whoever started the warden is gone.

    python warden.py LOG USER COMMAND...

The starter holds the other end of standard input. When that closes, by order or because the starter was killed, the
server's process group is ended. Nothing else would do: a death signal does not survive a change of user, and no
clean-up code runs after `kill -9`. For the same reason the warden then deletes the directory of the log.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

_STOP_S = 10


def main() -> int:
    """Return the server's exit status, 0 if it was ended by us."""
    log, user, *command = sys.argv[1:]
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    with open(log, "ab") as output:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **identity
        )
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # a Ctrl-C meant for the tests ends them, and so closes our input
    starter_killed = threading.Event()
    threading.Thread(target=_end_with_input, args=(server, starter_killed), daemon=True).start()
    status = server.wait()
    _signal(server.pid, signal.SIGKILL, os.killpg)  # children that outlived it
    if starter_killed.is_set():
        shutil.rmtree(os.path.dirname(log), ignore_errors=True)
    return max(status, 0)


def _end_with_input(server: subprocess.Popen[bytes], starter_killed: threading.Event) -> None:
    """A starter that stops us says a byte first, one that is killed says nothing."""
    # Not the buffered stream: at exit its lock would be held by this thread.
    if not os.read(sys.stdin.fileno(), 1):
        starter_killed.set()
    _signal(server.pid, signal.SIGTERM, os.kill)
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        _signal(server.pid, signal.SIGKILL, os.killpg)


def _signal(pid: int, number: int, send: Callable[[int, int], None]) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)


if __name__ == "__main__":
    sys.exit(main())
