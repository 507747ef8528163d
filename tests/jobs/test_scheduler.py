"""Of several schedulers one leads; when it is gone another does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.scheduler import leadership
from storage.open import Storage, open_storage
from storage.settings import StorageSettings


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.servers)])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Storage, Storage]]:
    """Storage as two processes have it."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("fresh_database_url")
    settings = StorageSettings(data_dir=tmp_path, database_url=url, object_store_url="")
    opened = (open_storage(settings), open_storage(settings))
    yield opened
    for storage in opened:
        storage.close()


def test_one_leads_at_a_time_and_hands_on(two: tuple[Storage, Storage], tmp_path: Path) -> None:
    first, second = two
    # When
    with leadership(first, tmp_path) as leads, leadership(second, tmp_path) as waits:
        # Then
        assert leads is not None
        assert leads.is_set()
        assert waits is None
    # When
    with leadership(second, tmp_path) as leads, leadership(first, tmp_path) as waits:
        # Then
        assert leads is not None
        assert waits is None
    assert first.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_leader_that_fails_lets_go(two: tuple[Storage, Storage], tmp_path: Path) -> None:
    first, second = two
    # When
    with pytest.raises(ZeroDivisionError), leadership(first, tmp_path):
        raise ZeroDivisionError
    # Then
    with leadership(second, tmp_path) as leads:
        assert leads is not None
