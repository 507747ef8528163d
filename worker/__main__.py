"""`python -m worker`: one worker process; with `--when-told` it begins when its supervisor says so (`waiting.py`)."""

from __future__ import annotations

import sys

from worker.waiting import WHEN_TOLD, say_ready, wait_for_turn


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    told = WHEN_TOLD in sys.argv[1:]
    if told:
        wait_for_turn()
    from worker.process import run  # torch and all the rest

    run(on_ready=say_ready if told else lambda: None)


if __name__ == "__main__":
    main()
