"""Loaded by the service's own processes when a test puts this directory on their path: a wrong clock, a bad broker.

`DISTURBED_CLOCK_S`: seconds that the wall clock of the process is ahead.
`DISTURBED_MESSAGES`: a file with the number of times that each message is sent. 0 loses all but those of the scheduler,
which says again what stalls.
`DISTURBED_POISON`: another such file, which makes some tokens poison to a worker.
"""

from __future__ import annotations

import datetime as datetime_module
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

PARTS_THAT_LOSE = {"api", "worker"}
PARTS = {*PARTS_THAT_LOSE, "jobs.scheduler"}


def _shift_clock(seconds: float) -> None:
    true_time, true_time_ns, true_datetime = time.time, time.time_ns, datetime_module.datetime

    class Meta(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, true_datetime)

    class Shifted(true_datetime, metaclass=Meta):  # type: ignore[misc,valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return true_datetime.fromtimestamp(true_time() + seconds, tz)

        @classmethod
        def utcnow(cls) -> Any:
            return true_datetime.utcfromtimestamp(true_time() + seconds)

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)
    datetime_module.datetime = Shifted  # type: ignore[misc]


def _multiply_messages(file: Path) -> None:
    from kombu.messaging import Producer

    publish, loses = Producer.publish, bool(PARTS_THAT_LOSE & set(sys.orig_argv))

    def disturbed(self: Any, *args: Any, **kwargs: Any) -> Any:
        copies = int(file.read_text()) if file.exists() else 1
        for _ in range(copies if copies or loses else 1):
            publish(self, *args, **kwargs)

    Producer.publish = disturbed


if "DISTURBED_CLOCK_S" in os.environ:
    _shift_clock(float(os.environ["DISTURBED_CLOCK_S"]))
if "DISTURBED_MESSAGES" in os.environ and PARTS & set(sys.orig_argv):
    _multiply_messages(Path(os.environ["DISTURBED_MESSAGES"]))
if "DISTURBED_POISON" in os.environ:
    poison = importlib.util.spec_from_file_location("poison", os.environ["DISTURBED_POISON"])
    assert poison is not None
    assert poison.loader is not None
    poison.loader.exec_module(importlib.util.module_from_spec(poison))
