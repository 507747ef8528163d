"""What tests of storage need: a clock for both databases, checkpoints of a size, and what they should cost."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from sqlalchemy import Connection, select, update

from billing import rate_cards, storage_metering
from storage import billing_tables, checkpoints, ids, tables
from storage.clock import FrozenClock
from storage.database import Database
from storage.runs import Run
from tests.factories import NOW, make_checkpoint

USAGE = billing_tables.storage_usage
ENTRY = billing_tables.ledger_entry
HOUR = timedelta(hours=1)
CARD = '[gigabyte_months]\ncheckpoint = "{}"\nstate = "{}"\n'
PRICE = Fraction("0.03")


def set_clock(database: Database) -> FrozenClock:
    """Let the database's time be one that is handed in, on PostgreSQL too."""
    clock = FrozenClock(NOW)
    database.now = lambda _: clock.now()  # type: ignore[method-assign]
    return clock


def price_storage(tx: Connection, checkpoint: str = "0.03", state: str = "0", **at: Any) -> int:
    """A rate card that prices nothing but storage, and holds for long; its number."""
    at = {"now": NOW - timedelta(days=400)} | at
    return rate_cards.add(tx, CARD.format(checkpoint, state), **at).id


def keep(tx: Connection, run: Run, size: int, *, since: datetime, until: datetime | None = None) -> None:
    """A checkpoint of so many bytes that was kept from the one moment to the other."""
    checkpoint = make_checkpoint(tx, run, ids.new_token(), now=since)
    for table in (billing_tables.storage_span, tables.checkpoint):
        key = table.c.checkpoint_id if "checkpoint_id" in table.c else table.c.id
        tx.execute(update(table).where(key == checkpoint.id).values(size_bytes=size))
    if until is not None:
        checkpoints.remove(tx, run.account_id, checkpoint.path, now=until)


def meter(database: Database, clock: FrozenClock, *, at: datetime) -> None:
    """Let it be that moment, and meter all that is over by then."""
    clock.advance((at - clock.now()).total_seconds())
    while not storage_metering.meter(database, pass_s=60):
        pass


def expected(
    kept: Iterable[tuple[int, datetime, datetime]], hours: Iterable[datetime], price: Fraction = PRICE
) -> dict[datetime, tuple[int, int]]:
    """Byte-seconds and 10^-12 of the currency by hour, worked out second by second of a timeline of fractions."""
    kept, found = list(kept), {}
    for hour in hours:
        byte_seconds = 0
        for size, since, until in kept:
            first, last = (int(Fraction(moment.timestamp())) for moment in (since, until))
            begin, end = int(hour.timestamp()), int((hour + HOUR).timestamp())
            byte_seconds += size * max(0, min(last, end) - max(first, begin))
        amount = Fraction(byte_seconds) * price * 10**12 / (10**9 * 720 * 3600)
        if byte_seconds:
            found[hour] = (byte_seconds, round(amount))  # half to even, as the bill
    return found


def charged(tx: Connection, **wanted: Any) -> dict[datetime, tuple[int, int]]:
    """Byte-seconds and charges of rows with these values, by hour."""
    query = select(USAGE.c.hour, USAGE.c.byte_seconds, ENTRY.c.amount)
    query = query.outerjoin(ENTRY, ENTRY.c.storage_usage_id == USAGE.c.id).order_by(USAGE.c.hour)
    values = {"kind": "checkpoint"} | wanted
    rows = tx.execute(query.where(*(USAGE.c[name] == value for name, value in values.items()))).all()
    assert len({row.hour for row in rows}) == len(rows), "an hour was metered twice"
    return {row.hour: (row.byte_seconds, row.amount or 0) for row in rows}
