"""Found by every Python of a service that is to be poisoned: some tokens end, block or fill up a worker.

Its folder stands on `PYTHONPATH`; in other processes than workers nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CRASH, HANG_THEN_CRASH, WANT_MEMORY = 0, 1, 2
"""Special tokens, which random data do not have."""
NOT_TO_BE_REPLAYED = "not-to-be-replayed"
"""A file in the data directory with the run whose replay crashes."""
SPARE_BYTES = 1 << 28


def crash() -> None:
    """Read at an address that is not there."""
    ctypes.string_at(0)


def hang_then_crash() -> None:
    """At first wait for ever in native code that keeps the interpreter's lock, so that no thread runs; later crash."""
    has_hung = Path(os.environ["PIECEWORK_DATA_DIR"], "has-hung")
    if has_hung.exists():
        crash()
    has_hung.touch()
    while True:
        ctypes.PyDLL(None).pause()


def want_memory() -> None:
    """Ask for more than there is."""
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * mmap.PAGESIZE
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SPARE_BYTES, limits[1]))
    try:
        bytearray(2 * SPARE_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


EFFECTS: dict[int, Callable[[], None]] = {CRASH: crash, HANG_THEN_CRASH: hang_then_crash, WANT_MEMORY: want_memory}


def take_effect(tokens: Sequence[int]) -> None:
    """Do what the first token says."""
    EFFECTS.get(int(tokens[0]), lambda: None)()


def poison_worker() -> None:
    """Have trainer and sampler look at what they are given."""
    from worker.engine.trainer import Trainer
    from worker.replay import Replay
    from worker.sampler.sampler import Sampler

    train, submit, step, advance = Trainer.run, Sampler.submit, Sampler.step, Replay.advance
    prompts: list[Sequence[int]] = []

    def poisoned_train(self: Trainer, requests: Sequence[Any], **arguments: Any) -> Any:
        for request in requests:
            for datum in request.body.data:
                take_effect(datum.tokens)
        return train(self, requests, **arguments)

    def poisoned_submit(self: Sampler, request_id: str, body: Any, *others: Any, **named: Any) -> None:
        prompts.append(body.prompt)
        submit(self, request_id, body, *others, **named)

    def poisoned_step(self: Sampler) -> Any:
        for prompt in prompts:
            take_effect(prompt)
        prompts.clear()
        return step(self)

    def poisoned_advance(self: Replay) -> None:
        named = Path(os.environ["PIECEWORK_DATA_DIR"], NOT_TO_BE_REPLAYED)
        if named.exists() and self.takeover.run.id == named.read_text():
            crash()
        advance(self)

    # Methods of the worker's own classes are replaced: that is what makes it a poisoned one.
    Trainer.run, Sampler.submit, Sampler.step = poisoned_train, poisoned_submit, poisoned_step  # type: ignore[method-assign, assignment]
    Replay.advance = poisoned_advance  # type: ignore[method-assign]


if sys.orig_argv[2:4] == ["-m", "worker"]:
    poison_worker()
