"""What the supervisor does about a dead worker: frees what it held, and writes down what it died of."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from sqlalchemy import select

from api.cli.child import Death
from api.cli.worker_child import DeadWorkers
from storage import tables, workers
from storage.deaths import Cause
from storage.migrate import migrate
from storage.open import open_storage
from storage.settings import StorageSettings


@pytest.mark.parametrize(
    ("code", "stopped", "cause"),
    [
        (-signal.SIGSEGV, False, Cause.FAULT),
        (-signal.SIGKILL, False, Cause.HAND),
        (-signal.SIGKILL, True, Cause.STOPPED),
        (-signal.SIGTERM, True, Cause.STOPPED),
    ],
)
def test_the_cause_of_a_death_is_written_down_and_stopping_is_none(
    tmp_path: Path, code: int, stopped: bool, cause: Cause
) -> None:
    # given a worker, in a service whose broker is away
    settings = StorageSettings(data_dir=tmp_path)
    storage = open_storage(settings)
    migrate(storage.database)
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=now)
    said: list[str] = []
    dead_workers = DeadWorkers(settings, said.append)

    # when its death is told
    dead_workers.free(Death({"PIECEWORK_WORKER_ID": "w"}, code, stopped=stopped))
    dead_workers.finish()

    # then its row says so
    with storage.database.read() as tx:
        row = tx.execute(select(tables.worker)).one()
    assert (row.ended_by, row.stopped_at is not None) == (cause, True)
    assert said == []
    storage.close()
