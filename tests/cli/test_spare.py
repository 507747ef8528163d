"""The spare: who takes a dead worker's place, when the next spare is made, and that none outlives its supervisor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.cli.child import ChildSpec, Death
from api.cli.parts import python
from tests.cli.conftest import environment, is_alive, wait_until
from tests.cli.supervised import Run, script

pytestmark = pytest.mark.processes

WORKS = """
import os, sys, time
os.write(0, b"loaded\\n")
if not os.read(0, 64):
    sys.exit(0)
os.write(0, b"ready\\n")
time.sleep(1000)
"""
NEVER_LOADS = """
import os, time
os.read(0, 64)
os.write(0, b"ready\\n")
time.sleep(1000)
"""
CANNOT_START = """
import os, sys
os.read(0, 64)
sys.exit(3)
"""


def worker(code: str = WORKS, **more: object) -> ChildSpec:
    """A child that waits for its turn, with a spare."""
    return script("worker", code, waits=True, spare=True, **more)


def kill(pid: int | None) -> None:
    """SIGKILL."""
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_the_spare_takes_the_place_of_a_dead_worker_and_another_spare_is_made(tmp_path: Path) -> None:
    # given a worker whose spare is loaded
    numbers = iter(range(100))
    deaths: list[Death] = []
    run = Run(tmp_path, [worker(make_environment=lambda: {"NUMBER": str(next(numbers))}, on_death=deaths.append)])

    def kill_the_worker() -> None:
        wait_until(lambda: run.spare_pid() is not None, "the spare is loaded")
        (before,), spare = run.pids(), run.spare_pid()

        # when the worker is killed
        kill(before)

        # then the spare works in its place, the death is told, and another spare waits
        wait_until(lambda: run.pids() == [spare], "the spare has begun")
        wait_until(lambda: run.spare_pid() not in (None, spare), "another spare is loaded")
        wait_until(lambda: bool(deaths), "the death is told")
        assert run.running == [("supervisor", os.getpid()), ("worker", spare), ("spare", run.spare_pid())]

    run.during(kill_the_worker)
    assert [(death.environment["NUMBER"], death.code) for death in deaths if not death.stopped] == [
        ("0", -signal.SIGKILL)
    ]


def test_a_dead_spare_is_replaced_and_the_worker_does_not_notice(tmp_path: Path) -> None:
    # given
    deaths: list[Death] = []
    run = Run(tmp_path, [worker(on_death=deaths.append)])

    def kill_the_spare() -> None:
        wait_until(lambda: run.spare_pid() is not None, "the spare is loaded")
        (pid,), spare = run.pids(), run.spare_pid()

        # when
        kill(spare)

        # then
        wait_until(lambda: run.spare_pid() not in (None, spare), "another spare is loaded")
        assert run.pids() == [pid]

    run.during(kill_the_spare)
    assert [death for death in deaths if not death.stopped] == []
    assert any(line.startswith("spare of worker (pid ") for line in run.said)


def test_a_second_death_before_the_next_spare_is_loaded_is_answered_too(tmp_path: Path) -> None:
    # given a worker whose spares never get so far as to be loaded
    run = Run(tmp_path, [worker(NEVER_LOADS)])

    def kill_twice() -> None:
        for _ in range(2):
            wait_until(lambda: run.supervisor.children[0].spare is not None, "a spare has been started")
            (before,) = run.pids()

            # when the worker is killed
            kill(before)

            # then what there is takes its place
            wait_until(lambda before=before: run.pids()[0] not in (None, before), "another one works")  # type: ignore[misc]

    run.during(kill_twice)


def test_without_a_spare_a_dead_worker_is_started_anew(tmp_path: Path) -> None:
    # given
    run = Run(tmp_path, [script("worker", WORKS, waits=True)])

    def kill_it() -> None:
        wait_until(lambda: run.supervisor.children[0].ever_ready, "the worker is ready")
        (before,) = run.pids()
        kill(before)
        wait_until(lambda: run.pids()[0] not in (None, before), "another one is started")
        assert [role for role, _ in run.running] == ["supervisor", "worker"]

    run.during(kill_it)


def test_worker_and_spare_are_gone_when_the_supervisor_has_been_stopped(tmp_path: Path) -> None:
    # given
    run = Run(tmp_path, [worker()])
    pids: list[int] = []

    def look() -> None:
        wait_until(lambda: run.spare_pid() is not None, "the spare is loaded")
        pids.extend(pid for _, pid in run.running[1:])

    # when
    run.during(look)

    # then
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]
    assert run.running == []


def test_a_worker_that_must_start_and_does_not_ends_the_supervisor_with_its_code(tmp_path: Path) -> None:
    # given
    deaths: list[Death] = []
    run = Run(tmp_path, [script("worker", CANNOT_START, waits=True, must_start=True, on_death=deaths.append)])

    # when nobody stops it
    run.supervisor.run()

    # then
    assert run.supervisor.children[0].code == 3
    assert deaths == []


def test_a_worker_killed_after_its_grace_is_told_as_stopped_by_us(tmp_path: Path) -> None:
    # given a worker that does not hear SIGTERM
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORKS
    deaths: list[Death] = []
    run = Run(tmp_path, [script("worker", deaf, waits=True, on_death=deaths.append)], grace_s=0.2)

    # when
    run.during(lambda: wait_until(lambda: run.supervisor.children[0].ever_ready, "the worker is ready"))

    # then
    assert [(death.code, death.stopped) for death in deaths] == [(-signal.SIGKILL, True)]


class Waiting:
    """A real worker that waits for its turn."""

    def __init__(self, tmp_path: Path) -> None:
        self.data_dir = tmp_path / "data"
        self.line, theirs = socket.socketpair()
        self.line.settimeout(240)
        self.process = subprocess.Popen(
            [*python("worker"), "--when-told"],
            env={**environment(), "PIECEWORK_DATA_DIR": str(self.data_dir)},
            stdin=theirs,
        )
        theirs.close()

    def end(self) -> None:
        """End it by force."""
        self.process.kill()
        self.process.wait()
        self.line.close()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    """A real worker that waits for its turn."""
    started = Waiting(tmp_path)
    yield started
    started.end()


def test_a_loaded_spare_leaves_no_trace_and_ends_cleanly(waiting: Waiting) -> None:
    # given a real worker that has loaded everything
    assert waiting.line.recv(64) == b"loaded\n"

    # then it has made nothing
    assert not waiting.data_dir.exists()

    # when it is told to end, then it does
    waiting.process.terminate()
    assert waiting.process.wait(60) == 0


def test_a_spare_ends_when_nobody_can_tell_it_to_begin_any_more(waiting: Waiting) -> None:
    # when the supervisor's end of the line is gone
    waiting.line.close()

    # then
    assert waiting.process.wait(240) == 0
