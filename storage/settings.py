"""Where things are kept. Read once per process from `PIECEWORK_…`; the defaults are the embedded service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class StorageSettings(BaseSettings):
    """Database and object store.

    Without `database_url` and `object_store_url` both lie in `data_dir`: SQLite and a local directory.
    """

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    data_dir: Path = Field(Path(".piecework"), description="directory of the embedded service: database, objects, logs")
    database_url: str = Field(
        "", description="SQLAlchemy URL: postgresql+psycopg://user:password@host/name; empty: SQLite in the data dir"
    )
    object_store_url: str = Field(
        "",
        description="s3://key:secret@host:port/bucket?secure=false or file:///dir; empty: a directory in the data dir",
    )
    sqlite_synchronous: Literal["NORMAL", "FULL"] = Field(
        "NORMAL", description="NORMAL survives the death of any process, FULL also power loss (about 10 times slower)"
    )
    inline_bytes_max: int = Field(
        65_536,
        description="payloads and results up to this size lie in the journal row, larger ones in the object store",
    )
    upload_expiry_s: float = Field(
        86_400.0, description="an object that no row names this long after its upload was announced is deleted"
    )

    @property
    def embedded_database(self) -> Path:
        """The file that is the database where no URL names another one."""
        return self.data_dir.absolute() / "piecework.db"

    def has_database(self) -> bool:
        """Whether there is a database, as far as can be told without opening one."""
        return bool(self.database_url) or self.embedded_database.exists()

    def resolved_database_url(self) -> str:
        """The URL in force, with the embedded default filled in."""
        return self.database_url or f"sqlite:///{self.embedded_database}"

    def resolved_object_store_url(self) -> str:
        """The URL in force, with the embedded default filled in."""
        return self.object_store_url or (self.data_dir.absolute() / "objects").as_uri()


def say_what_is_wrong(error: ValidationError) -> str:
    """Which settings are not what they may be, and why, in one line."""
    problems = (f"PIECEWORK_{'_'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors())
    return "a setting is wrong: " + "; ".join(problems)
