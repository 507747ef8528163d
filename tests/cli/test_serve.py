"""`piecework serve` as a person sees it: real processes, real signals."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from api.cli.commands import piecework
from tests.cli.conftest import Service, is_alive, run, run_json, wait_until

pytestmark = pytest.mark.processes

ROLES = {"supervisor", "broker", "api", "forkserver", "worker", "scheduler"}


def test_first_start_shows_a_key_that_works(service: Service) -> None:
    # given a service that has just been started for the first time
    shown = re.search(r"export TINKER_BASE_URL=(\S+)\s+export TINKER_API_KEY=(tml-\S+)", service.output)

    # then it has shown its address and a key, and the key lets one in
    assert shown is not None
    assert shown[1] in service.output.partition("ready:")[2]
    assert service.get("/api/v1/get_server_capabilities", shown[2]) == 200
    assert service.get("/api/v1/get_server_capabilities", "tml-wrong") == 401


def test_service_without_base_model_runs_and_says_how_to_add_one(service: Service) -> None:
    assert service.is_healthy()
    assert "piecework models add" in service.output


def test_key_made_while_the_service_runs_works_at_once(service: Service) -> None:
    # given an account and a key made beside the running service
    run_json(service.data_dir, "accounts", "create", "beside")
    key = run_json(service.data_dir, "keys", "create", "--account", "beside")["api_key"]

    # then the key lets one in
    assert service.get("/api/v1/get_server_capabilities", key) == 200


def test_status_names_every_process(service: Service) -> None:
    # given
    wait_until(lambda: set(service.pids()) == ROLES, "all processes run")

    # when the status is asked for
    status = run_json(service.data_dir, "status")

    # then every role has a process that lives
    assert {one["role"] for one in status["processes"]} == ROLES
    assert all(is_alive(one["pid"]) for one in status["processes"])
    assert set(status) == {"processes", "queue_depth", "base_models", "workers", "budgets_without_room", "alarms"}
    assert status["queue_depth"] == 0
    assert status["base_models"] == []
    assert status["budgets_without_room"] == []


def test_second_service_on_the_same_data_directory_is_refused(service: Service) -> None:
    # when another one is started
    refused = run(service.data_dir, "serve", "--port", "0")

    # then it says in one line who holds the directory, and the first one is as it was
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: another `piecework serve`")
    assert str(service.process.pid) in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert service.is_healthy()


@pytest.mark.parametrize("role", ["worker", "scheduler", "broker", "api"])
def test_killed_process_is_replaced_at_once(service: Service, role: str) -> None:
    # given
    wait_until(lambda: set(service.pids()) == ROLES, "all processes run")
    before = service.pids()[role]

    # when
    os.kill(before, signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(lambda: service.pids().get(role, before) != before, f"a new {role}", timeout_s=10)

    # then its successor starts in less than a second, and the service answers again
    assert time.monotonic() - killed_at < 1.0
    wait_until(service.is_healthy, "the service is healthy again")
    assert f"pid {before}) was ended by SIGKILL" in service.output


def test_a_killed_api_process_is_forked_once_the_fork_server_has_loaded(service: Service) -> None:
    # given
    log = service.data_dir / "logs" / "supervisor.log"
    wait_until(lambda: set(service.pids()) == ROLES, "all processes run")
    before = service.pids()
    served = f'"child": "forkserver", "pid": {before["forkserver"]}, "event": "child_ready"'
    wait_until(lambda: served in log.read_text(), "the fork server has loaded", timeout_s=120)

    # when
    os.kill(before["api"], signal.SIGKILL)
    wait_until(lambda: service.pids().get("api", before["api"]) != before["api"], "a new api process")

    # then
    api, forkserver = (psutil.Process(service.pids()[role]) for role in ("api", "forkserver"))
    assert api.cmdline() == forkserver.cmdline()
    wait_until(service.is_healthy, "the service is healthy again")
    assert (api.name(), forkserver.name()) == ("api", "forkserver")


def test_sigterm_leaves_nothing_running(own_service: Service) -> None:
    # given
    pids = own_service.pids()

    # when
    own_service.process.send_signal(signal.SIGTERM)

    # then it ends well, and so do its processes
    assert own_service.process.wait(30) == 0
    assert not [role for role, pid in pids.items() if is_alive(pid)]
    assert run_json(own_service.data_dir, "status")["processes"] == []


def test_killed_supervisor_leaves_nothing_running_and_the_next_start_shows_no_key(own_service: Service) -> None:
    # given
    pids = own_service.pids()

    # when
    own_service.process.kill()
    own_service.process.wait(10)

    # then its processes die with it
    wait_until(lambda: not any(map(is_alive, pids.values())), "the processes are gone", timeout_s=5)

    # when it is started again
    again = Service(own_service.data_dir)
    try:
        again.wait_until_ready()

        # then the key is not shown a second time
        assert "tml-" not in again.output
        assert "was shown when it was made" in again.output
    finally:
        again.end()


def test_data_directory_with_a_path_too_long_for_a_socket_is_served(tmp_path: Path) -> None:
    # given a directory whose path alone is longer than the kernel allows a socket
    long = tmp_path / ("d" * 120)
    service = Service(long)
    try:
        # then the service runs nevertheless
        service.wait_until_ready()
        assert service.is_healthy()
    finally:
        service.end()


def test_taken_port_is_refused_in_one_line(service: Service, tmp_path: Path) -> None:
    # given
    port = service.output.partition("ready: http://127.0.0.1:")[2].split()[0]

    # when
    refused = run(tmp_path, "serve", "--port", port)

    # then
    assert refused.returncode == 1
    assert "choose another --port" in refused.stderr
    assert refused.stderr.count("\n") == 1


WRONG = {
    ("PIECEWORK_EXPORT_DAILY", "xml"): "PIECEWORK_EXPORT_DAILY: Input should be 'csv', 'parquet' or 'cloudevents'",
    ("PIECEWORK_SWEEP_S", "soon"): "PIECEWORK_SWEEP_S: Input should be a valid number",
    ("PIECEWORK_RATE_CARD", "/nofile"): "/nofile: cannot be read",
}


@pytest.mark.parametrize("setting", WRONG)
@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["api"], ["worker"], ["scheduler"]])
def test_a_wrong_setting_is_said_in_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], setting: tuple[str, str]
) -> None:
    # given
    monkeypatch.setenv(*setting)
    for starts in ("api.cli.serve.Supervisor", "api.cli.parts.os.execve", "api.cli.supervised.Supervisor"):
        monkeypatch.setattr(starts, None)

    # when
    refused = CliRunner().invoke(piecework, [*command, "--data-dir", str(tmp_path / "data")])

    # then
    assert refused.exit_code == 1
    assert WRONG[setting] in refused.output
    assert refused.output.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_service_whose_worker_cannot_start_ends_and_says_why(tmp_path: Path) -> None:
    # given a device that is not there
    refused = run(tmp_path, "serve", "--port", "0", "--device", "cuda:77")

    # then
    assert refused.returncode == 1
    assert "worker-0 | piecework worker: there is no device 'cuda:77' here" in refused.stdout
    assert refused.stderr.startswith("Error: worker-0 could not start")
