"""Run every trial, or those whose names hold a word: `python -m tests.mutations [WORD …]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.guard import Guard
from tests.mutations.guards import GUARDS
from tests.mutations.trial import Copy


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.mutations", description="Take guards away: are tests red then?")
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only guards whose names hold it; all, if none is given"
    )
    words = parser.parse_args(arguments).words
    chosen = [guard for guard in GUARDS if not words or any(word in guard.name for word in words)]
    if not chosen:
        parser.error(f"no guard's name holds {' or '.join(map(repr, words))}: see docs/mutations.md")
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        copy = Copy(Path(directory))
        if not _is_green(copy, chosen):
            return 1
        caught = [_try(copy, guard) for guard in chosen]
    return 0 if all(caught) else 1


def _is_green(copy: Copy, guards: Sequence[Guard]) -> bool:
    begun = time.monotonic()
    verdicts = copy.run({test for guard in guards for test in guard.red})
    red = {test: verdict for test, verdict in verdicts.items() if verdict != "passed"}
    for test, verdict in red.items():
        print(f"with every guard in place, {test} is {verdict}")
    if not red:
        print(f"with every guard in place, {len(verdicts)} tests pass ({time.monotonic() - begun:.0f} s)", flush=True)
    return not red


def _try(copy: Copy, guard: Guard) -> bool:
    begun = time.monotonic()
    trial = copy.without(guard)
    print(f"{'caught' if trial.is_caught else 'MISSED'}  without {guard.name} ({time.monotonic() - begun:.0f} s)")
    for test, verdict in trial.verdicts.items():
        print(f"        {'red' if verdict == 'asserted' else verdict.upper()}: {test}", flush=True)
    return trial.is_caught


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
