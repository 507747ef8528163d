"""`piecework worker` beside a running service: a parent that stands for its worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from storage.supervision import WORKER_NAME
from tests.cli.conftest import PIECEWORK, Service, environment, is_alive, wait_until
from tests.setups.deployment import find_name

pytestmark = pytest.mark.processes

START_S = 240.0


class Worker:
    """A running `piecework worker`."""

    def __init__(self, data_dir: Path, log: Path, *arguments: str, forkserver: bool = True) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*PIECEWORK, "worker", "--data-dir", str(data_dir), *arguments],
                env={**environment(), "PIECEWORK_FORKSERVER": str(forkserver)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """What parent and worker have said so far."""
        return self._log.read_text()

    def events(self, name: str, **fields: object) -> list[dict[str, Any]]:
        """The log lines of this name, with these fields among others."""
        lines = [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name and fields.items() <= line.items()]

    def worker_pids(self) -> list[int]:
        """Of the children that work: one, or none for a moment."""
        return [child.pid for child in psutil.Process(self.process.pid).children() if find_name(child) == WORKER_NAME]

    def end(self) -> None:
        """End it by force; its processes die with it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(params=[True, False], ids=["forked", "loading by itself"])
def second(service: Service, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A second worker of a service, that takes messages, with a fork server and without."""
    log = tmp_path / "worker.log"
    started = Worker(service.data_dir, log, "--worker-id", "second", forkserver=request.param)
    try:
        wait_until(
            lambda: bool(started.events("child_ready", child="worker")), "the worker is ready", timeout_s=START_S
        )
        yield started
    finally:
        started.end()


def test_a_killed_worker_is_replaced_and_sigterm_ends_all_with_status_0(second: Worker) -> None:
    # given
    (before,) = second.worker_pids()
    children = psutil.Process(second.process.pid).children()

    # when the worker is killed
    os.kill(before, signal.SIGKILL)

    # then another takes messages, under an id of its own, and what the first held was freed
    wait_until(lambda: len(second.events("worker_ready")) == 2, "another is ready", timeout_s=START_S)
    first_id, second_id = (event["worker"] for event in second.events("worker_ready"))
    assert first_id == "second"
    assert second_id.startswith("second-")
    wait_until(lambda: bool(second.events("worker_freed")), "freed")
    assert [event["worker"] for event in second.events("worker_freed")] == ["second"]

    # when it is told to stop, then it ends well, and leaves nothing
    second.process.terminate()
    assert second.process.wait(START_S) == 0
    assert not [child.pid for child in children if is_alive(child.pid)]


def test_a_worker_that_cannot_start_ends_the_parent_with_its_status(tmp_path: Path) -> None:
    # given a device that does not exist
    worker = Worker(tmp_path / "data", tmp_path / "worker.log", "--device", "cuda:99")

    # then
    assert worker.process.wait(START_S) == 1
    assert "there is no device 'cuda:99' here" in worker.output
