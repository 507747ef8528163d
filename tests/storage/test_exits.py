"""How the end of a process is told: a crash, somebody's hand, or the kernel for want of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.deaths import UNSEEN_EXIT_STATUS, Cause, cause_of_exit, count_oom_kills


@pytest.mark.parametrize(
    ("returncode", "oom_kills_now", "cause"),
    [
        (0, 5, Cause.STOPPED),
        (0, 6, Cause.STOPPED),
        (1, 5, Cause.FAULT),
        (70, 6, Cause.FAULT),
        (UNSEEN_EXIT_STATUS, 5, Cause.UNKNOWN),
        (-11, 5, Cause.FAULT),
        (-6, 6, Cause.FAULT),
        (-9, 5, Cause.HAND),
        (-9, 6, Cause.OUT_OF_MEMORY),
        (-15, 6, Cause.HAND),
        (-2, 5, Cause.HAND),
        (-1, 5, Cause.HAND),
    ],
)
def test_an_exit_is_told_from_its_code_and_what_the_kernel_counts(
    returncode: int, oom_kills_now: int, cause: Cause
) -> None:
    assert cause_of_exit(returncode, oom_kills_before=5, oom_kills_now=oom_kills_now) is cause


def test_the_control_group_counts_before_the_machine(tmp_path: Path) -> None:
    # Given
    events = _write(tmp_path / "sys/fs/cgroup/service/memory.events", "low 0\noom 3\noom_kill 2\n")
    v1 = _write(tmp_path / "sys/fs/cgroup/memory/box/memory.oom_control", "under_oom 0\noom_kill 7\n")
    _write(tmp_path / "proc/vmstat", "pgfault 12345\noom_kill 9\n")
    # When
    _write(tmp_path / "proc/self/cgroup", "0::/service\n")
    version_2 = count_oom_kills(tmp_path)
    _write(tmp_path / "proc/self/cgroup", "9:cpu:/box\n4:memory:/box\n0::/\n")
    version_1 = count_oom_kills(tmp_path)
    for file in (events, v1):
        file.unlink()
    # Then
    assert (version_2, version_1, count_oom_kills(tmp_path)) == (2, 7, 9)


def test_where_nobody_counts_nobody_was_killed(tmp_path: Path) -> None:
    assert count_oom_kills(tmp_path) == 0


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
