"""What is particular to objects in a directory; the rest is in the contract."""

import os
import time
from pathlib import Path

import pytest

from storage.atomic_file import SCRATCH_PREFIX
from storage.errors import InvalidObjectKeyError, ObjectStoreRefusedError, ObjectStoreUnavailableError
from storage.local import LocalObjectStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Directory of the store."""
    return tmp_path / "objects"


@pytest.fixture
def store(root: Path) -> LocalObjectStore:
    """An empty store."""
    return LocalObjectStore(root)


def test_unfinished_files_are_not_listed_and_go_when_the_store_is_opened(store: LocalObjectStore, root: Path) -> None:
    # Given what a dead writer left an hour ago
    unfinished = root / ".scratch" / f"{SCRATCH_PREFIX}dead"
    unfinished.touch()
    an_hour_ago = time.time() - 3600
    os.utime(unfinished, (an_hour_ago, an_hour_ago))
    # Then
    assert list(store.list()) == []
    # When
    LocalObjectStore(root)
    # Then
    assert not unfinished.exists()


def test_a_directory_goes_with_its_last_object(store: LocalObjectStore, root: Path) -> None:
    # Given
    store.put("runs/a/1", b"")
    store.put("runs/b/1", b"")
    # When
    store.delete(["runs/a/1"])
    # Then
    assert [path.name for path in (root / "runs").iterdir()] == ["b"]
    # When
    store.delete(["runs/b/1"])
    # Then
    assert root.is_dir()
    assert not (root / "runs").exists()


@pytest.mark.parametrize("key", ["a/b", "a/b/c/d", "a"])
def test_a_key_that_continues_another_is_refused(store: LocalObjectStore, key: str) -> None:
    # Given
    store.put("a/b/c", b"kept")
    # When
    with pytest.raises(InvalidObjectKeyError, match="continues another's"):
        store.put(key, b"x")
    # Then
    assert store.get("a/b/c") == b"kept"
    assert [info.key for info in store.list()] == ["a/b/c"]


def test_links_to_directories_are_not_followed(store: LocalObjectStore, root: Path) -> None:
    # Given
    store.put("a/1", b"")
    (root / "loop").symlink_to(root, target_is_directory=True)
    # Then
    assert [info.key for info in store.list()] == ["a/1"]


def test_no_fsync_stores_the_same(root: Path) -> None:
    # Given
    store = LocalObjectStore(root, fsync=False)
    # When
    store.put("a/b", b"x")
    # Then
    assert store.get("a/b") == b"x"


def test_a_directory_cannot_sign(store: LocalObjectStore) -> None:
    assert store.signed_url("a", expires_s=60) is None


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    # Given
    (tmp_path / "file").touch()
    # Then
    with pytest.raises((ObjectStoreRefusedError, InvalidObjectKeyError, ObjectStoreUnavailableError), match="file"):
        LocalObjectStore(tmp_path / "file")


def test_a_disk_that_fails_is_unavailable(store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    # When
    with pytest.raises(ObjectStoreUnavailableError, match="No space left") as raised:
        store.put("a", b"x")
    # Then
    assert raised.value.retryable
    monkeypatch.undo()
    assert list(store.list()) == []
