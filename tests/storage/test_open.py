"""Settings decide where things are kept; without any, both lie in the data directory."""

from pathlib import Path

import pytest

from storage.migrate import migrate
from storage.open import open_storage
from storage.settings import StorageSettings


def test_the_defaults_are_a_database_and_a_directory_in_the_data_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    for name in ("DATABASE_URL", "OBJECT_STORE_URL"):
        monkeypatch.delenv(f"PIECEWORK_{name}", raising=False)
    monkeypatch.setenv("PIECEWORK_DATA_DIR", str(tmp_path / "new" / "data % dir"))
    # When
    storage = open_storage()
    migrate(storage.database)
    storage.objects.put("a/b", b"x")
    # Then
    assert storage.database.is_sqlite
    assert {path.name for path in (tmp_path / "new" / "data % dir").iterdir()} >= {"piecework.db", "objects"}
    storage.close()


def test_urls_of_the_environment_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setenv("PIECEWORK_DATABASE_URL", "postgresql+psycopg://u:secret@127.0.0.1:1/d")
    monkeypatch.setenv("PIECEWORK_OBJECT_STORE_URL", (tmp_path / "elsewhere").as_uri())
    # When
    settings = StorageSettings()
    storage = open_storage(settings)
    # Then
    assert not storage.database.is_sqlite
    assert "secret" not in storage.database.url_without_password
    storage.objects.put("a", b"x")
    assert (tmp_path / "elsewhere").exists()
    storage.close()


def test_a_transaction_on_sqlite_survives_the_death_of_a_process_as_set(tmp_path: Path) -> None:
    # Given
    for name, number in (("NORMAL", 1), ("FULL", 2)):
        settings = StorageSettings(data_dir=tmp_path, database_url="", object_store_url="", sqlite_synchronous=name)
        storage = open_storage(settings)
        # When
        with storage.database.read() as tx:
            mode = tx.exec_driver_sql("PRAGMA journal_mode").scalar_one()
            synchronous = tx.exec_driver_sql("PRAGMA synchronous").scalar_one()
            foreign_keys = tx.exec_driver_sql("PRAGMA foreign_keys").scalar_one()
        # Then
        assert (mode, synchronous, foreign_keys) == ("wal", number, 1)
        storage.close()
