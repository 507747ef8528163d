"""The supervisor with children that are no parts of piecework: order, restarts, ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.cli.conftest import is_alive, wait_until
from tests.cli.supervised import Run, script, sleeper

pytestmark = pytest.mark.processes


def test_dead_child_is_replaced_and_its_death_told(tmp_path: Path) -> None:
    # given a child with an environment of its own for each start
    numbers = iter(range(100))
    told: list[str] = []
    spec = sleeper(
        "worker",
        make_environment=lambda: {"NUMBER": str(next(numbers))},
        on_death=lambda death: told.append(death.environment["NUMBER"]),
    )
    run = Run(tmp_path, [spec])

    def kill_it() -> None:
        (before,) = run.pids()
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: run.pids()[0] not in (None, before), "a new child", timeout_s=1)
        wait_until(lambda: told == ["0"], "the death is told with the environment that died", timeout_s=1)

    # when it is killed, then another takes its place
    run.during(kill_it)
    assert run.pids() == [None]


def test_children_wait_for_the_broker(tmp_path: Path) -> None:
    # given a broker that is not ready before we say so
    open_door = threading.Event()
    run = Run(tmp_path, [sleeper("broker", is_ready=open_door.is_set), sleeper("worker")])
    seen: list[int | None] = []

    def open_later() -> None:
        wait_until(lambda: run.pids()[0] is not None, "the broker runs")
        seen.append(run.pids()[1])
        open_door.set()

    opener = threading.Thread(target=open_later)
    opener.start()

    # when it becomes ready, then the worker starts, and not before
    run.during(lambda: wait_until(lambda: run.pids()[1] is not None, "the worker runs"))
    opener.join()
    assert seen == [None]


def test_child_that_ignores_its_end_is_killed_after_the_grace(tmp_path: Path) -> None:
    # given
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    stubborn = f"import signal, time; {deaf}; time.sleep(1000)"
    run = Run(tmp_path, [script("worker", stubborn)], grace_s=0.3)
    pids: list[int] = []

    def until_deaf() -> None:
        log = tmp_path / "logs" / "worker.log"
        wait_until(lambda: log.read_text() == "deaf\n", "it ignores SIGTERM")
        pids.extend(pid for pid in run.pids() if pid is not None)

    # when
    run.during(until_deaf)

    # then
    assert pids
    assert not is_alive(pids[0])


def test_child_that_cannot_start_is_tried_ever_more_rarely_and_says_why(tmp_path: Path) -> None:
    # given
    run = Run(tmp_path, [script("api", "import sys; sys.exit('no such database')")])
    began = time.monotonic()

    # when
    run.during(lambda: wait_until(lambda: any("in 0.2 s" in line for line in run.said), "it waits longer"))

    # then
    assert any(line.endswith("| no such database") for line in run.said)
    assert sum("ended with code 1" in line for line in run.said) <= 2 + 10 * (time.monotonic() - began)


def test_error_lines_reach_the_console_and_everything_the_log(tmp_path: Path) -> None:
    # given
    lines = ['{"level": "info", "event": "fine"}', '{"level": "error", "event": "broken"}']
    run = Run(
        tmp_path,
        [script("api", f"import time; print({lines[0]!r}); print({lines[1]!r}, flush=True); time.sleep(1000)")],
    )

    # when
    run.during(lambda: wait_until(lambda: any("broken" in line for line in run.said), "the error is shown"))

    # then
    assert not any("fine" in line for line in run.said)
    assert (tmp_path / "logs" / "api.log").read_text().splitlines() == lines
