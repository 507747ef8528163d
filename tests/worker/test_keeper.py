"""Leases are renewed while the engine makes progress, and no longer."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from storage.errors import DatabaseUnavailableError
from worker.keeper import Keeper
from worker.settings import WorkerSettings

SETTINGS = WorkerSettings(lease_s=0.003, step_deadline_s=900)


class Engine:
    """Counts renewals; the database is away for the first one."""

    def __init__(self, stuck_s: float) -> None:
        self.stuck_s = stuck_s
        self.renewals = 0
        self.enough = threading.Event()

    def renew(self) -> None:
        """Renew."""
        self.renewals += 1
        if self.renewals == 1:
            raise DatabaseUnavailableError("database", "away")
        self.enough.set()


def test_leases_are_renewed_also_after_the_database_was_away() -> None:
    # given
    engine = Engine(stuck_s=899)
    keeper = Keeper(engine, SETTINGS)  # type: ignore[arg-type]

    # when
    keeper.start()

    # then
    assert engine.enough.wait(30)
    keeper.stop()


def test_a_step_past_its_deadline_ends_the_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a keeper that looks five times
    engine = Engine(stuck_s=901)
    keeper = Keeper(engine, SETTINGS)  # type: ignore[arg-type]
    looks: list[Any] = [False] * 5 + [True]
    monkeypatch.setattr(keeper, "_stopping", SimpleNamespace(wait=lambda _: looks.pop(0)))

    # when
    keeper.run()

    # then
    assert (looks, engine.renewals) == ([], 0)
