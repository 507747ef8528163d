"""Logs of children are bounded, and lines are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.cli.child_log import NUM_OLD, ChildLog, is_error


def test_log_never_grows_beyond_its_files(tmp_path: Path) -> None:
    # given a log of at most 100 bytes a file
    log = ChildLog(tmp_path / "api.log", lambda _: None, bytes_max=100)

    # when much more is written
    for number in range(100):
        log.write(f"line {number:04d}\n".encode())
    log.close()

    # then only the newest files are kept
    files = sorted(tmp_path.iterdir())
    assert len(files) == NUM_OLD + 1
    assert sum(path.stat().st_size for path in files) <= (NUM_OLD + 1) * 110


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"level": "error", "event": "x"}', True),
        ('{"level": "info", "event": "ERROR in name only"}', False),
        ("ERROR:    [Errno 98] address already in use", True),
        ("INFO:     started", False),
        ("{not json", False),
    ],
)
def test_errors_are_known_by_their_level(line: str, expected: bool) -> None:
    assert is_error(line) is expected


def test_line_that_comes_in_pieces_is_one_line(tmp_path: Path) -> None:
    # given
    told: list[str] = []
    log = ChildLog(tmp_path / "api.log", told.append)

    # when
    log.write(b'{"level": "err')
    log.write(b'or", "event": "x"}\n')
    log.close()

    # then
    assert told == ['{"level": "error", "event": "x"}']
