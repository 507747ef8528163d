"""The embedded broker: where it listens, what it survives, what is said where there is none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from api.cli import broker
from api.cli.child import ChildSpec
from api.cli.errors import CliError
from jobs.settings import SOCKET_PATH_BYTES_MAX, JobsSettings
from tests.cli.conftest import wait_until


@pytest.fixture
def spec(tmp_path: Path) -> ChildSpec:
    """The broker of an empty data directory."""
    return broker.broker_spec(tmp_path, JobsSettings(data_dir=tmp_path, broker_url="").broker_socket())


@pytest.fixture
def running(spec: ChildSpec) -> Iterator[subprocess.Popen[bytes]]:
    """A broker that answers."""
    with subprocess.Popen(spec.argv, stdout=subprocess.DEVNULL) as process:
        assert spec.is_ready is not None
        wait_until(spec.is_ready, "the broker answers")
        yield process
        process.kill()


@pytest.mark.processes
def test_broker_listens_on_its_socket_alone(running: subprocess.Popen[bytes], tmp_path: Path) -> None:
    # then nobody else may connect, and there is no port
    assert (tmp_path / "broker.sock").stat().st_mode & 0o077 == 0
    assert psutil.Process(running.pid).net_connections("inet") == []


@pytest.mark.processes
def test_stale_socket_of_a_killed_broker_is_no_answer(
    running: subprocess.Popen[bytes], spec: ChildSpec, tmp_path: Path
) -> None:
    # when
    running.kill()
    running.wait()

    # then
    assert (tmp_path / "broker.sock").exists()
    assert spec.is_ready is not None
    assert not spec.is_ready()


def test_unreadable_file_is_set_aside_after_three_deaths(spec: ChildSpec, tmp_path: Path) -> None:
    # given messages that the broker cannot read any more
    (tmp_path / "broker" / "appendonlydir").mkdir()
    assert spec.on_quick_death is not None

    # when it has died twice, nothing is touched
    spec.on_quick_death(2)
    assert (tmp_path / "broker" / "appendonlydir").exists()

    # when it dies once more, it begins empty
    spec.on_quick_death(3)
    assert not list((tmp_path / "broker").iterdir())
    assert list(tmp_path.glob("broker-unreadable-*/appendonlydir"))


def test_platform_without_broker_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "find_server", lambda: None)
    with pytest.raises(CliError, match="PIECEWORK_BROKER_URL"):
        broker.broker_spec(tmp_path, tmp_path / "broker.sock")


def test_socket_of_a_long_path_lies_elsewhere_and_is_its_own(tmp_path: Path) -> None:
    # given two data directories whose paths differ only at the end
    paths = [tmp_path / ("d" * 120) / name for name in ("a", "b")]

    # when
    sockets = [JobsSettings(data_dir=path).broker_socket() for path in paths]

    # then each has a socket that the kernel takes
    assert all(len(os.fsencode(one)) <= SOCKET_PATH_BYTES_MAX for one in sockets)
    assert sockets[0] != sockets[1]
