"""A worker whose engine hangs ends itself, without anybody's help, and says whose fault it was if it can."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from storage.deaths import UNSEEN_EXIT_STATUS
from worker.watchdog import STUCK_EXIT_STATUS

ENGINE = """
import ctypes, io, sys, threading, time
from worker import watchdog
from worker.settings import WorkerSettings

watchdog.GRACE_S, watchdog.LAST_WORDS_S = 0.2, 0.3
sys.stderr = io.StringIO()  # has no file descriptor, as what some libraries put in its place

class Engine:
    is_draining = False
    is_cut_off = {cut_off}
    begun_at = time.monotonic()

    @property
    def stuck_s(self):
        return time.monotonic() - self.begun_at

    def is_alive(self):
        return alive

def hang():
    time.sleep(60)

def hang_without_python():
    while True:
        ctypes.PyDLL(None).pause()  # a foreign function that keeps the interpreter's lock

def progress():
    for _ in range(20):
        time.sleep(0.1)
        engine.begun_at = time.monotonic()
    dog.stop()
    sys.exit(0)

def confess(cause):
    print("confessed", cause, flush=True)

def cannot_confess(cause):
    time.sleep(60)

alive = {alive}
engine = Engine()
dog = watchdog.Watchdog(engine, WorkerSettings(step_deadline_s=0.5, lease_s=0.1), confess={confess})
dog.start()
{engine}()
"""


def run(
    engine: str, *, confess: str = "confess", alive: bool = True, cut_off: bool = False
) -> subprocess.CompletedProcess[str]:
    """A process with a watchdog that looks at an engine."""
    script = textwrap.dedent(ENGINE).replace("{engine}", engine).replace("{confess}", confess)
    script = script.replace("{alive}", str(alive)).replace("{cut_off}", str(cut_off))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.processes
def test_a_step_past_its_deadline_ends_the_worker_which_says_so() -> None:
    ended = run("hang")
    assert (ended.returncode, "confessed fault" in ended.stdout) == (STUCK_EXIT_STATUS, True), ended.stderr


@pytest.mark.processes
def test_a_dead_engine_ends_the_worker_too() -> None:
    ended = run("hang", alive=False)
    assert (ended.returncode, "confessed fault" in ended.stdout) == (STUCK_EXIT_STATUS, True), ended.stderr


@pytest.mark.processes
def test_an_engine_that_storage_refused_is_held_against_nobody() -> None:
    ended = run("hang", alive=False, cut_off=True)
    assert (ended.returncode, "confessed stopped" in ended.stdout) == (STUCK_EXIT_STATUS, True), ended.stderr


@pytest.mark.processes
def test_code_that_keeps_python_from_running_is_ended_and_where_it_stood_is_logged() -> None:
    ended = run("hang_without_python")
    assert ended.returncode == 1
    assert "confessed" not in ended.stdout
    assert "in hang_without_python" in ended.stderr


@pytest.mark.processes
def test_a_worker_that_cannot_reach_the_database_ends_all_the_same() -> None:
    ended = run("hang", confess="cannot_confess")
    assert ended.returncode == UNSEEN_EXIT_STATUS, ended.stderr


@pytest.mark.processes
def test_a_worker_that_makes_progress_is_left_alone() -> None:
    ended = run("progress")
    assert ended.returncode == 0, ended.stderr
