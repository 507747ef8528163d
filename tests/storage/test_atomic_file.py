"""Files that appear whole or not at all."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from storage.atomic_file import SCRATCH_PREFIX, clean_scratch, whole_file

_OLD = time.time() - 3600


def test_a_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file"
    # When
    with whole_file(path) as file:
        file.write(b"ha")
        assert not path.exists()
        file.write(b"lf")
    # Then
    assert path.read_bytes() == b"half"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_writer_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    # Given
    (tmp_path / "file").write_bytes(b"old")

    # When
    def interrupted() -> None:
        with whole_file(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # Then
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_parent_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    # Given
    (tmp_path / "scratch").mkdir()
    (tmp_path / "parent").mkdir()
    # When
    with whole_file(tmp_path / "parent" / "file", scratch=tmp_path / "scratch") as file:
        file.write(b"kept")
        (tmp_path / "parent").rmdir()
    # Then
    assert (tmp_path / "parent" / "file").read_bytes() == b"kept"


def test_writers_and_removers_of_one_directory_never_lose_a_file(tmp_path: Path) -> None:
    # Given someone who often removes the directory when it is empty
    (tmp_path / "scratch").mkdir()
    parent, done = tmp_path / "parent", threading.Event()

    def remove() -> None:
        while not done.wait(0.0002):
            with contextlib.suppress(OSError):
                parent.rmdir()

    remover = threading.Thread(target=remove)
    remover.start()
    # When
    kept = []
    try:
        for number in range(200):
            with whole_file(parent / str(number), scratch=tmp_path / "scratch", fsync=False) as file:
                file.write(b"x")
            kept.append((parent / str(number)).exists())
            (parent / str(number)).unlink()
    finally:
        done.set()
        remover.join()
    # Then
    assert all(kept)


def test_the_unfinished_file_of_a_killed_writer_is_cleaned(tmp_path: Path) -> None:
    # Given a writer that is killed within its block
    program = (
        "import sys, time; from pathlib import Path; from storage.atomic_file import whole_file\n"
        f"with whole_file(Path({str(tmp_path / 'file')!r})) as f:\n"
        "    f.write(b'part'); f.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        (unfinished,) = tmp_path.glob(f"{SCRATCH_PREFIX}*")
        os.utime(unfinished, (_OLD, _OLD))
        # When it lives
        assert clean_scratch(tmp_path) == 0
        writer.send_signal(signal.SIGKILL)
    # When it is dead
    num_cleaned = clean_scratch(tmp_path)
    # Then
    assert num_cleaned == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_file_that_may_be_just_before_its_lock_is_left(tmp_path: Path) -> None:
    # Given
    (tmp_path / f"{SCRATCH_PREFIX}young").touch()
    # Then
    assert clean_scratch(tmp_path) == 0
