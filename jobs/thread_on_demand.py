"""A thread that begins once there is something for it to do, and ends once it is closed.

Whoever has work for it never waits for it: where no thread can be begun, the next piece of work tries again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


class ThreadOnDemand:
    """Calls `work` on a thread of its own; `work` takes what there is to do, waits for more, and returns when closing.

    Attributes:
        changed: held while what there is to do is changed or read.
    """

    def __init__(self, work: Callable[[], None], *, name: str) -> None:
        self.changed = threading.Condition()
        self._work = work
        self._name = name
        self._closing = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Say, holding `changed`, that there is more to do; begins the thread the first time."""
        if self._thread is None and not self._closing:
            self._begin()
        self.changed.notify()

    def wait_for(self, there_is_work: Callable[[], object]) -> None:
        """Wait, on the thread and holding `changed`, until there is work or none will come any more."""
        self.changed.wait_for(lambda: there_is_work() or self._closing)

    def pause(self, timeout_s: float) -> bool:
        """Wait, on the thread, however much there is to do; returns whether it was cut short by closing."""
        with self.changed:
            return self.changed.wait_for(lambda: self._closing, timeout_s)

    def close(self, *, timeout_s: float) -> None:
        """Let the thread do what is left and end; one that takes longer ends with the process."""
        with self.changed:
            self._closing = True
            self.changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _begin(self) -> None:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads now: the next piece of work tries again
            thread.start()
            self._thread = thread
