"""The fork server: it makes workers in no time, may die or fail without harm, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from api.cli import process, supervisor, worker_child
from api.cli.child import ChildSpec, Death
from api.cli.process import Process, adopt_orphans, fork_by, program, reap_orphans
from api.cli.supervisor import FORKSERVER
from storage.settings import StorageSettings
from storage.supervision import SUPERVISED
from tests.cli.conftest import environment, is_alive, wait_until
from tests.cli.supervised import Run, script
from worker.forkserver import FORKSERVER as FORKSERVER_FLAG
from worker.forkserver import UNFIT, UnfitError, check_fit

pytestmark = pytest.mark.processes

WORKS = """
import os, time
os.write(0, b"ready\\n")
time.sleep(1000)
"""
SERVES = """
import os, time
from worker import forkserver
forkserver._load = lambda modules: None
forkserver.serve()
print("worker", os.environ.get("NUMBER"), os.getpid(), os.getsid(0), flush=True)
forkserver.say_ready()
time.sleep(1000)
"""
"""A fork server that has nothing to load."""
PART = """
import os, sys, time
print(__name__, sys.argv[1:], "part" in sys.modules, flush=True)
if __name__ == "__main__":
    os.write(0, b"ready\\n")
    time.sleep(1000)
"""
GOES_ON = """
import sys, types
sys.path.insert(0, {directory!r})
sys.modules["worker.rehearsal"] = types.SimpleNamespace(rehearse=lambda: None)
from worker import forkserver
forkserver.go_on(forkserver.serve(["part"]))
"""
"""A fork server that loads a part, and no torch."""
NEVER_SERVES = "import time; time.sleep(1000)"
COMPUTES = """
import os
from worker import forkserver
forkserver.serve()
import torch
before = len(os.listdir("/proc/self/task"))
torch.ones(1 << 22).exp()
os.write(0, b"%d %d\\n" % (torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before))
"""
SUPERVISES = """
import sys
from pathlib import Path
from api.cli.process import adopt_orphans
from api.cli.supervisor import Supervisor
from tests.cli import test_forkserver as here
adopt_orphans()
Supervisor(
    [here.server(), here.worker(on_begun=lambda: print("begun", flush=True))],
    grace_s=1.0,
    say=lambda line: None,
    logs=Path(sys.argv[1]),
    on_change=lambda running: print("running", *(pid for _, pid in running), flush=True),
).run()
"""


@pytest.fixture(autouse=True)
def _adopting() -> Iterator[None]:
    """What fork servers make becomes ours, while a test runs."""
    assert adopt_orphans()
    yield
    assert adopt_orphans(False)


def server(code: str = SERVES, **more: object) -> ChildSpec:
    """A fork server."""
    return script(FORKSERVER, code, speaks=True, **more)


def worker(**more: object) -> ChildSpec:
    """A child that a fork server makes, or that is started by itself."""
    return script("worker", WORKS, speaks=True, forked=True, awaits_fork=True, **more)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that there is."""
    assert pid is not None
    os.kill(pid, number)


def is_ready(run: Run, role: str) -> bool:
    """Whether the process of this role takes work."""
    found = [child.process for child in run.supervisor.children if child.spec.role == role]
    return found[0] is not None and found[0].ready


def is_forked(run: Run) -> bool:
    """Whether the running worker was made by the fork server that runs now."""
    forkserver, pid = run.pids()
    return pid is not None and psutil.Process(pid).cmdline() == psutil.Process(forkserver).cmdline()


def test_dead_workers_are_replaced_by_forked_ones_again_and_again(tmp_path: Path) -> None:
    # given a worker beside a fork server
    numbers = iter(range(100))
    deaths: list[Death] = []
    spec = worker(make_environment=lambda: {"NUMBER": str(next(numbers))}, on_death=deaths.append)
    run = Run(tmp_path, [server(), spec])
    pids: list[int] = []

    def kill_the_worker() -> None:
        for _ in range(3):
            wait_until(lambda: is_ready(run, "worker"), "the worker is ready")
            assert is_forked(run)
            assert psutil.Process(run.pids()[1]).ppid() == os.getpid()
            pids.append(run.pids()[1] or 0)

            # when it is killed
            kill(pids[-1])
            wait_until(lambda: run.pids()[1] not in (None, pids[-1]), "another is started")
        wait_until(lambda: len(deaths) == 3, "the deaths are told")

    run.during(kill_the_worker)

    # then each of the next ones has variables, a session and a log of its own, and every death is told
    assert [(one.environment["NUMBER"], one.code) for one in deaths[:3]] == [
        (str(n), -signal.SIGKILL) for n in range(3)
    ]
    log = (tmp_path / "logs" / "worker.log").read_text().splitlines()
    assert log[:3] == [f"worker {number} {pid} {pid}" for number, pid in enumerate(pids)]


def test_a_dead_fork_server_is_replaced_and_the_worker_does_not_notice(tmp_path: Path) -> None:
    # given
    deaths: list[Death] = []
    run = Run(tmp_path, [server(), worker(on_death=deaths.append)])

    def kill_the_server() -> None:
        wait_until(lambda: is_ready(run, "worker"), "the worker is ready")
        before, pid = run.pids()

        # when
        kill(before)

        # then
        wait_until(lambda: run.pids()[0] not in (None, before) and is_ready(run, FORKSERVER), "another one serves")
        assert run.pids()[1] == pid
        assert is_alive(pid or 0)

        # and the new one makes the next worker
        kill(pid)
        wait_until(lambda: run.pids()[1] not in (None, pid) and is_ready(run, "worker"), "another one works")
        assert is_forked(run)

    run.during(kill_the_server)
    assert len([death for death in deaths if not death.stopped]) == 1


def test_a_worker_is_started_by_itself_where_the_fork_server_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a fork server that is stopped
    numbers = iter(range(100))
    spec = worker(make_environment=lambda: {"NUMBER": str(next(numbers))})
    run = Run(tmp_path, [server(), spec])

    def stop_the_server() -> None:
        wait_until(lambda: is_ready(run, "worker"), "the worker is ready")
        before, pid = run.pids()
        monkeypatch.setattr(process, "FORK_S", 0.3)
        kill(before, signal.SIGSTOP)

        # when the worker dies
        kill(pid)

        # then another one works, and another fork server
        wait_until(lambda: run.pids()[1] not in (None, pid) and is_ready(run, "worker"), "another one works")
        wait_until(lambda: run.pids()[0] not in (None, before) and is_ready(run, FORKSERVER), "another one serves")
        assert not is_forked(run)
        assert not is_alive(before or 0)
        assert psutil.Process(run.pids()[1]).environ()["NUMBER"] == "1"

    run.during(stop_the_server)


def test_a_worker_is_started_by_itself_where_the_fork_server_cannot_load(tmp_path: Path) -> None:
    # given a fork server that ends before it is ready
    run = Run(tmp_path, [server("raise SystemExit(1)", backoff_s=(0.0, 60.0)), worker()])

    def told() -> list[str]:
        return [line for line in run.said if line.startswith("forkserver (pid ")]

    # then the worker does not wait for it
    def look() -> None:
        wait_until(lambda: is_ready(run, "worker"), "the worker is ready")
        wait_until(lambda: len(told()) == 2, "it has been tried twice")

    run.during(look)

    # and it is tried again, ever later
    assert "starting it again now" in told()[0]
    assert re.search(r"starting it again in (60|59)\.", told()[1])


def test_a_forked_worker_that_ends_before_it_is_ready_is_followed_by_a_program(tmp_path: Path) -> None:
    # given a fork server whose workers cannot work
    fails = SERVES.replace("forkserver.say_ready()", "raise SystemExit(5)")
    run = Run(tmp_path, [server(fails), worker()])

    # then one that is started by itself does
    run.during(lambda: wait_until(lambda: is_ready(run, "worker"), "the worker is ready", timeout_s=30))


def test_a_forked_worker_that_hangs_before_it_is_ready_is_followed_by_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a fork server whose workers hang
    monkeypatch.setattr(supervisor, "HANG_S", 0.5)
    run = Run(tmp_path, [server(SERVES.replace("forkserver.say_ready()", "time.sleep(1000)")), worker()])

    # then one that is started by itself works
    run.during(lambda: wait_until(lambda: is_ready(run, "worker"), "the worker is ready", timeout_s=30))
    assert [line for line in run.said if "did not become ready in 0.5 s" in line]


def test_a_fork_server_that_never_loads_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr(supervisor, "LOAD_S", 0.5)
    run = Run(tmp_path, [server(NEVER_SERVES), worker()])

    # then the worker is started by itself
    run.during(lambda: wait_until(lambda: is_ready(run, "worker"), "the worker is ready"))


def test_what_supervisor_and_worker_say_to_each_other_is_the_same() -> None:
    (spec,) = worker_child.forkserver_children({}, wanted=True)
    dead_workers = worker_child.DeadWorkers(StorageSettings(), lambda _line: None)
    assert spec.argv[-1] == FORKSERVER_FLAG
    assert worker_child.worker_child("worker", {}, dead_workers).argv[-1] == SUPERVISED
    assert spec.unfit == UNFIT


def test_an_unfit_fork_server_is_not_started_again(tmp_path: Path) -> None:
    # given one, and a service that is ready only after it has ended
    def is_over() -> bool:
        return run.supervisor.children[1].code is not None

    late = script("api", WORKS, is_ready=is_over)
    run = Run(tmp_path, [late, server(f"raise SystemExit({UNFIT})", unfit=UNFIT), worker()])

    def kill_the_worker() -> None:
        wait_until(lambda: is_ready(run, "worker"), "the worker is ready")
        pid = run.pids()[2]
        kill(pid)
        wait_until(lambda: run.pids()[2] not in (None, pid) and is_ready(run, "worker"), "another one works")
        assert run.pids()[1] is None

    # then workers are started by themselves
    run.during(kill_the_worker)
    assert len([line for line in run.said if "it is not started again" in line]) == 1


def test_the_service_is_ready_while_the_fork_server_still_loads(tmp_path: Path) -> None:
    # given a fork server that takes long
    run = Run(tmp_path, [server(NEVER_SERVES), worker()])

    # when the supervisor says that it is ready, then there is no worker yet
    run.during(lambda: None)
    assert run.supervisor.children[1].code is None


def test_a_part_that_loads_quickly_does_not_wait_for_the_fork_server_and_is_forked_later(tmp_path: Path) -> None:
    # given such a part, whose process begins while the fork server loads
    loads = SERVES.replace("forkserver.serve()", "time.sleep(2); forkserver.serve()")
    part = script("api", WORKS, speaks=True, forked=True)
    run = Run(tmp_path, [server(loads), part])

    def kill_the_part() -> None:
        wait_until(lambda: is_ready(run, "api"), "the part is ready")
        before, pid = run.pids()
        assert not is_forked(run)
        wait_until(lambda: is_ready(run, FORKSERVER), "the fork server is ready", timeout_s=30)

        # when it dies beside a fork server that has loaded
        kill(pid)

        # then that makes the next one
        wait_until(lambda: run.pids()[1] not in (None, pid) and is_ready(run, "api"), "another one is ready")
        assert run.pids()[0] == before
        assert is_forked(run)

    run.during(kill_the_part)


def test_a_fork_server_makes_any_part_whose_command_line_it_is_given(tmp_path: Path) -> None:
    # given a fork server that imports a part beside what workers need, and that part's command line
    (tmp_path / "part.py").write_text(PART)
    serves = (sys.executable, "-c", GOES_ON.format(directory=str(tmp_path)))
    part = (sys.executable, "-m", "part", "--one", "two")
    specs = [
        ChildSpec(FORKSERVER, FORKSERVER, serves, speaks=True),
        ChildSpec("part", "part", part, speaks=True, forked=True, awaits_fork=True),
    ]
    run = Run(tmp_path, specs)

    # when it is asked for one
    run.during(lambda: wait_until(lambda: is_ready(run, "part"), "the part is ready", timeout_s=30))

    # then this is what the command line says
    assert (tmp_path / "logs" / "part.log").read_text().splitlines() == ["__main__ ['--one', 'two'] True"]


def test_nothing_is_left_when_the_supervisor_has_been_stopped(tmp_path: Path) -> None:
    # given
    run = Run(tmp_path, [server(), worker()])
    pids: list[int] = []

    def look() -> None:
        wait_until(lambda: is_ready(run, "worker"), "the worker is ready")
        pids.extend(pid for _, pid in run.running[1:])

    # when
    run.during(look)

    # then
    assert len(pids) == 2
    assert not [pid for pid in pids if is_alive(pid)]
    assert run.running == []


def test_all_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    # given a supervisor, its fork server, and a worker that this has made
    (tmp_path / "logs").mkdir()
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISES, str(tmp_path / "logs")], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    pids: list[int] = []
    for line in iter(supervisor.stdout.readline, b"begun\n"):
        pids = [int(pid) for pid in line.split()[1:]] if line.startswith(b"running") else pids
    assert len(pids) == 3

    # when
    supervisor.kill()
    supervisor.wait()

    # then
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], "all are gone", timeout_s=30)
    supervisor.stdout.close()


def test_a_worker_that_must_start_and_does_not_ends_the_supervisor_with_its_code(tmp_path: Path) -> None:
    # given
    deaths: list[Death] = []
    spec = script("worker", "raise SystemExit(4)", speaks=True, must_start=True, on_death=deaths.append)
    run = Run(tmp_path, [spec])

    # when nobody stops it
    run.supervisor.run()

    # then
    assert run.supervisor.children[0].code == 4
    assert deaths == []


def test_a_worker_that_waits_to_be_started_when_it_is_to_stop_has_stopped_well(tmp_path: Path) -> None:
    # given a worker that has been killed, and a fork server that is still loading
    run = Run(tmp_path, [server(NEVER_SERVES), worker()])
    run.supervisor.children[1].code = -signal.SIGKILL

    # when the supervisor is told to stop
    run.during(lambda: None)

    # then that death is not how the worker has ended
    assert run.supervisor.children[1].code is None


def test_a_worker_killed_after_its_grace_is_told_as_stopped_by_us(tmp_path: Path) -> None:
    # given a worker that does not hear SIGTERM
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORKS
    deaths: list[Death] = []
    run = Run(tmp_path, [script("worker", deaf, speaks=True, on_death=deaths.append)], grace_s=0.2)

    # when
    run.during(lambda: wait_until(lambda: run.supervisor.children[0].ever_ready, "the worker is ready"))

    # then
    assert [(death.code, death.stopped) for death in deaths] == [(-signal.SIGKILL, True)]


def test_a_forked_worker_that_is_given_up_before_it_is_told_to_begin_ends() -> None:
    # given
    serving = Process(program((sys.executable, "-S", "-c", SERVES)), {}, captured=False, speaks=True)
    wait_until(lambda: serving.listen() and serving.ready, "it serves")
    made = Process(fork_by(serving, ()), {}, captured=False, speaks=True)

    # when the supervisor's end of its line is gone
    made.close()

    # then
    wait_until(lambda: made.find_code() is not None, "it has ended", timeout_s=30)
    assert made.find_code() == 0

    # and so does the fork server
    serving.close()
    wait_until(lambda: serving.find_code() is not None, "it has ended")
    assert serving.find_code() == 0


def test_dead_orphans_are_reaped() -> None:
    # given a process that another one has left to us, and that is dead
    leaves = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-S', '-c', '']).pid)"
    left = int(subprocess.run([sys.executable, "-S", "-c", leaves], stdout=subprocess.PIPE, check=True).stdout)
    os.waitid(os.P_PID, left, os.WEXITED | os.WNOWAIT)

    # then it stays as long as somebody else is said to wait for it
    reap_orphans([left])
    assert psutil.pid_exists(left)

    # when nobody does
    reap_orphans([])

    # then it is gone
    assert not psutil.pid_exists(left)


def test_what_cannot_be_forked_is_found() -> None:
    # one thread more than is known of
    with pytest.raises(UnfitError, match="has begun 1 threads"):
        check_fit(len(os.listdir("/proc/self/task")) - 1)


# -------------------------------------------------------------------------------------------------------- the real one


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Process]:
    """A fork server that has loaded everything, and whose children compute something."""
    variables = {**environment(), "PIECEWORK_DATA_DIR": str(tmp_path / "data"), "OMP_NUM_THREADS": "2"}
    started = Process(program((sys.executable, "-c", COMPUTES)), variables, captured=False, speaks=True)
    wait_until(lambda: started.listen() and started.ready, "it has loaded", timeout_s=240)
    yield started
    started.send(signal.SIGKILL)
    wait_until(lambda: started.find_code() is not None, "it has ended")
    started.close()


def test_a_forked_worker_computes_with_several_threads(loaded: Process, tmp_path: Path) -> None:
    # given a fork server that has left no trace
    assert not (tmp_path / "data").exists()

    # when a worker that it makes computes on a large tensor
    made = Process(fork_by(loaded, ()), {}, captured=False, speaks=True)
    made.begin()

    # then a second thread has been begun there, and something comes out
    wait_until(lambda: made.find_code() is not None, "it has computed", timeout_s=60)
    assert made.find_code() == 0
    assert made.line is not None
    assert made.line.recv(64) == b"2 1\n"
    made.close()

    # when the fork server is told to end, then it does
    loaded.send(signal.SIGTERM)
    wait_until(lambda: loaded.find_code() is not None, "it has ended")
    assert loaded.find_code() == 0
