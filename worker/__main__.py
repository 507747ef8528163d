"""`python -m worker`: one worker process, or the one that others are forked from (`forkserver.py`)."""

from __future__ import annotations

import sys

from worker.forkserver import FORKSERVER, serve
from worker.supervised import SUPERVISED, WORKER_NAME, call_oneself, say_ready


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    forked, supervised = FORKSERVER in sys.argv[1:], SUPERVISED in sys.argv[1:]
    if forked:
        serve()
    call_oneself(WORKER_NAME)
    from worker.process import run  # torch and all the rest

    run(on_ready=say_ready if forked or supervised else lambda: None)


if __name__ == "__main__":
    main()
