"""A supervisor that runs in the test's own process, and children that are no parts of piecework."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from api.cli.child import ChildSpec
from api.cli.supervisor import Supervisor


class Run:
    """One run of a supervisor in this process, which `meanwhile` watches from a thread and then ends."""

    def __init__(self, tmp_path: Path, specs: Sequence[ChildSpec], *, grace_s: float = 5.0) -> None:
        self.said: list[str] = []
        self.running: list[tuple[str, int]] = []
        self.errors: list[BaseException] = []
        self.ready = threading.Event()
        self.supervisor = Supervisor(
            specs,
            grace_s=grace_s,
            say=self.said.append,
            logs=tmp_path / "logs",
            on_ready=self.ready.set,
            on_change=self._note,
        )

    def pids(self) -> list[int | None]:
        """Of the children, in order."""
        return [child.pid for child in self.supervisor.children]

    def during(self, meanwhile: Callable[[], None]) -> None:
        """Run the supervisor; signals need the main thread."""

        def watch() -> None:
            try:
                assert self.ready.wait(20)
                meanwhile()
            except BaseException as error:
                self.errors.append(error)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.supervisor.run()
        watcher.join()
        if self.errors:
            raise self.errors[0]

    def _note(self, running: Sequence[tuple[str, int]]) -> None:
        self.running = list(running)


def sleeper(role: str, **more: object) -> ChildSpec:
    """A child that does nothing, for a long time."""
    return ChildSpec(role, role, ("sleep", "1000"), **more)  # type: ignore[arg-type]


def script(role: str, code: str, **more: object) -> ChildSpec:
    """A child that runs Python."""
    return ChildSpec(role, role, (sys.executable, "-S", "-c", code), **more)  # type: ignore[arg-type]
