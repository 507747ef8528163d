"""`python -m worker`: one worker process, or the one that others are forked from (`forkserver.py`)."""

from __future__ import annotations

import sys

from storage.supervision import SUPERVISED, WORKER_NAME, call_oneself, say_ready
from worker.forkserver import FORKSERVER, go_on, serve


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    option, *modules = sys.argv[1:] or [""]
    if option == FORKSERVER:
        go_on(serve(modules))
        return
    call_oneself(WORKER_NAME)
    from worker.process import run  # torch and all the rest

    run(on_ready=say_ready if option == SUPERVISED else lambda: None)


if __name__ == "__main__":
    main()
