"""The same histories with checkpoints that are saved, saved over, deleted and expire, while storage is metered.

What each hour should hold is worked out here, second by second in plain integers, from what was saved and deleted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from unittest import mock

import hypothesis.strategies as st
from hypothesis.stateful import invariant, precondition, rule
from sqlalchemy import select

from billing import storage_metering
from storage import billing_tables, checkpoints, keys
from storage.ids import CheckpointPath
from storage.open import Storage
from tests.properties.machine import PICKS, JournalMachine

USAGE = billing_tables.storage_usage
HOUR = timedelta(hours=1)


class CrashError(Exception):
    """The process ended before the commit."""


@dataclass
class Kept:
    """Bytes that were kept from one moment to another; None is for ever."""

    path: CheckpointPath
    size: int
    since: datetime
    until: datetime | None

    def seconds_in(self, hour: datetime) -> int:
        """Whole seconds of the clock that it was kept in this hour."""
        end = hour + HOUR
        until = end if self.until is None else min(end, self.until)
        return max(0, int(until.timestamp()) - int(max(hour, self.since).timestamp()))


class KeepingMachine(JournalMachine):
    """Runs that keep checkpoints."""

    def __init__(self, storage: Storage) -> None:
        self.kept: list[Kept] = []
        super().__init__(storage)

    @rule(
        place=st.integers(0, 1),
        name=st.sampled_from(["one", "two"]),
        size=st.integers(0, 10**12),
        ttl_s=st.none() | st.sampled_from([1, 2000, 9000]),
        crashes=st.booleans(),
    )
    def save(self, place: int, name: str, size: int, ttl_s: int | None, *, crashes: bool) -> None:
        """A worker stores weights under a name, perhaps one that is taken; it may be killed before it commits."""
        run = self.runs[place]
        path = CheckpointPath(run.id, "weights", name)
        key = keys.checkpoint_key(run.id, "weights", name, "state")
        self.storage.payloads.put_object(b"weights", key)
        with contextlib.suppress(CrashError), self.database.begin() as tx:
            now = self.database.now(tx)
            expires_at = None if ttl_s is None else now + timedelta(seconds=ttl_s)
            values: dict[str, Any] = {"base_model": run.base_model, "lora": run.lora, "user_metadata": {}}
            values |= {"object_key": key, "files": {}, "size_bytes": size, "overwrite": True}
            checkpoints.publish(tx, account_id=run.account_id, path=path, now=now, expires_at=expires_at, **values)
            if crashes:
                raise CrashError
            self._ended(path, now)
            self.kept.append(Kept(path, size, now, expires_at))

    @precondition(lambda self: self._living())
    @rule(pick=PICKS, crashes=st.booleans())
    def delete(self, pick: int, *, crashes: bool) -> None:
        """A client deletes a checkpoint."""
        living = self._living()
        path = living[pick % len(living)].path
        with contextlib.suppress(CrashError), self.database.begin() as tx:
            now = self.database.now(tx)
            checkpoints.remove(tx, self.runs[0].account_id, path, now=now)
            if crashes:
                raise CrashError
            self._ended(path, now)

    @rule(seconds=st.sampled_from([1800.25, 3600.0, 10_000.5]))
    def keep(self, seconds: float) -> None:
        """Hours pass."""
        self.wait(seconds)

    @rule(page_runs=st.integers(1, 2), wholly=st.booleans(), crashes=st.booleans())
    def meter(self, page_runs: int, *, wholly: bool, crashes: bool) -> None:
        """Storage is metered, or a part of it; the worker may be killed before it commits a page."""
        charge = storage_metering._charge

        def crash(*arguments: Any, **named: Any) -> None:
            charge(*arguments, **named)
            raise CrashError

        with contextlib.suppress(CrashError), contextlib.ExitStack() as stack:
            if crashes:
                stack.enter_context(mock.patch.object(storage_metering, "_charge", crash))
            storage_metering.meter(self.database, pass_s=60 if wholly else 0, page_runs=page_runs)

    @invariant()
    def hours_hold_what_was_kept(self) -> None:
        """An hour that was metered has all of it, the one under way nothing else; none has anything twice."""
        with self.database.read() as tx:
            metered = set(tx.execute(select(billing_tables.storage_hour.c.hour)).scalars())
            rows = tx.execute(select(USAGE).where(USAGE.c.kind == "checkpoint")).all()
        found = {(row.hour, row.run_id): row.byte_seconds for row in rows}
        assert len(found) == len(rows)
        expected: dict[tuple[datetime, str], int] = {}
        for hour in metered | {row.hour for row in rows}:
            for kept in self.kept:
                if seconds := kept.seconds_in(hour) * kept.size:
                    place = hour, kept.path.run
                    expected[place] = expected.get(place, 0) + seconds
        assert found.items() <= expected.items()
        assert {place for place in expected if place[0] in metered} <= found.keys()

    def _living(self) -> list[Kept]:
        now = self.database.clock.now()
        return [kept for kept in self.kept if kept.until is None or kept.until > now]

    def _ended(self, path: CheckpointPath, now: datetime) -> None:
        for kept in self._living():
            if kept.path == path:
                kept.until = now
