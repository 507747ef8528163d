"""Time to read a day's usage, by how much usage there is already.

Two databases with the same usage a day, one with ten times as many days. In turns, the last whole day is read from
both, as `tinker billing usage` asks for it (`billing.usage_events`) and as `piecework cost` does. The newest records
are not rolled up yet. The ratio should be about 1, and the target is 1.5 at most.

Usage records, their charges and, but for the last day's, their rollups are written in SQL; the last day is rolled up by
`billing.rollups`. They name operations that do not exist: these are no part of what is read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event, text

from benchmarks.conditions import OthersLoad, describe, table
from billing import rate_cards, rollups, usage_events, usage_totals
from billing.usage_totals import Scope, hour_of
from storage.database import Database
from storage.migrate import migrate
from tests.factories import make_account, make_session
from tests.servers import PostgresServer

NUM_SESSIONS = 20
DAY = timedelta(days=1)
DAY_US = DAY // timedelta(microseconds=1)
HOUR_US = DAY_US // 24
KIND = "CASE WHEN i % 4 < 2 THEN 'forward_backward' WHEN i % 4 = 2 THEN 'optim_step' ELSE 'sample' END"
CHARGE = "1000 + i % 7"
CARD = """
[million_tokens."*"]
trained = "2"
sampled = "3"
"""

_NUMBERS = "WITH RECURSIVE n(i) AS (SELECT CAST(:first AS BIGINT) UNION ALL SELECT i + 1 FROM n WHERE i < :last)"
_RECORDS = f"""
INSERT INTO usage_record (operation_id, account_id, session_id, run_id, kind, base_model, device, device_ns,
    tokens_trained, tokens_prefilled, tokens_cached, tokens_sampled, attempt, worker_id, finished_at, rolled_up)
{_NUMBERS}
SELECT i, :account, s.session_id, s.session_id || ':train:0', {KIND}, 'model', 'cpu', 1000000 + i % 1000,
    CASE WHEN i % 4 < 2 THEN 512 ELSE 0 END, CASE WHEN i % 4 = 3 THEN 64 ELSE 0 END, 0,
    CASE WHEN i % 4 = 3 THEN 32 ELSE 0 END, 1, 'w', :start + (i - :first) * :step_us, :rolled_up
FROM n JOIN bench_session s ON s.number = (i / 7) % {NUM_SESSIONS}
"""
_CHARGES = f"""
INSERT INTO ledger_entry (source, kind, account_id, amount, created_at, operation_id, rate_card_id, session_id, run_id)
{_NUMBERS}
SELECT 'operation:' || i, 'usage', :account, {CHARGE}, :start + (i - :first) * :step_us, i, :card, s.session_id,
    s.session_id || ':train:0'
FROM n JOIN bench_session s ON s.number = (i / 7) % {NUM_SESSIONS}
"""
_ROLLUPS = """
INSERT INTO usage_rollup (hour, account_id, project_id, api_key_id, session_id, batch, run_id, kind, base_model, device,
    operations, device_ns, tokens_trained, tokens_prefilled, tokens_cached, tokens_sampled, charge)
SELECT r.finished_at - r.finished_at % :hour_us, r.account_id, '', 0, r.session_id, '', r.run_id, r.kind, r.base_model,
    r.device, count(*), sum(r.device_ns), sum(r.tokens_trained), sum(r.tokens_prefilled), sum(r.tokens_cached),
    sum(r.tokens_sampled), sum(e.amount)
FROM usage_record r JOIN ledger_entry e ON e.operation_id = r.operation_id
WHERE r.account_id = :account AND r.finished_at >= :start AND r.finished_at < :start + :day_us
GROUP BY r.finished_at - r.finished_at % :hour_us, r.account_id, r.session_id, r.run_id, r.kind, r.base_model, r.device
"""


@dataclass(frozen=True)
class History:
    """A database with usage.

    Attributes:
        day: the beginning of the last day, all of it in the past.
        cost: of that day, in units of the ledger.
    """

    database: Database
    account_id: str
    num_records: int
    day: datetime
    cost: int


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000_000, help="usage records of the long history")
    parser.add_argument("--short", type=int, default=10, help="how many times fewer the short one has")
    parser.add_argument("--per-day", type=int, default=100_000, help="usage records a day")
    parser.add_argument("--open", type=int, default=1_000, help="of the last day's records, not rolled up yet")
    parser.add_argument("--repeats", type=int, default=40, help="reads of each, in turns, after two to warm up")
    parser.add_argument("--databases", nargs="+", choices=("sqlite", "postgres"), default=["sqlite", "postgres"])
    parser.add_argument("--directory", type=Path, help="where SQLite's files go (1 KB a record); default: temporary")
    parser.add_argument("--explain", action="store_true", help="print the plan of the day's query, too")
    options = parser.parse_args(arguments)
    if options.records % (options.short * options.per_day):
        parser.error("--records must be whole days for both: a multiple of --short times --per-day")
    return options


def make_history(database: Database, num_records: int, *, per_day: int, num_open: int) -> History:
    """Fill a new database."""
    migrate(database)
    with database.begin() as tx:
        now = database.now(tx)
        num_days = num_records // per_day
        start = hour_of(now) - num_days * DAY
        account = make_account(tx, "acme", now=now)
        card = rate_cards.add(tx, CARD, now=start).id
        sessions = [make_session(tx, account, now=now).id for _ in range(NUM_SESSIONS)]
        tx.execute(text("CREATE TABLE bench_session (number BIGINT PRIMARY KEY, session_id TEXT NOT NULL)"))
        rows = [{"number": number, "session_id": session_id} for number, session_id in enumerate(sessions)]
        tx.execute(text("INSERT INTO bench_session VALUES (:number, :session_id)"), rows)
    for number in range(num_days):
        moment = start + number * DAY
        values = {
            "first": 1 + number * per_day,
            "last": (number + 1) * per_day,
            "account": account.id,
            "card": card,
            "start": _microseconds(moment),
            "step_us": DAY_US // per_day,
        }
        is_last = number == num_days - 1
        with _without_foreign_keys(database.engine) as tx:
            tx.execute(text(_RECORDS), {**values, "rolled_up": not is_last})
            tx.execute(text(_CHARGES), values)
            if not is_last:
                day = {"hour_us": HOUR_US, "account": account.id, "start": values["start"], "day_us": DAY_US}
                tx.execute(text(_ROLLUPS), day)
        print(f"{num_records} records: day {number + 1} of {num_days}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    _roll_up_all_but(database, num_open)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    cost = sum(1000 + number % 7 for number in range(num_records - per_day + 1, num_records + 1))
    return History(database, account.id, num_records, start + (num_days - 1) * DAY, cost)


def _microseconds(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@contextmanager
def _without_foreign_keys(engine: Engine) -> Iterator[Connection]:
    """A transaction in which operations may be named that do not exist."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            raw = connection.connection.driver_connection
            raw.execute("PRAGMA foreign_keys = OFF")  # type: ignore[union-attr]
        else:
            connection.execute(text("SET session_replication_role = replica"))
        yield connection
        connection.commit()
        connection.invalidate()  # with its settings


def _roll_up_all_but(database: Database, num_open: int) -> None:
    newest = "operation_id > (SELECT max(operation_id) - :open FROM usage_record)"
    mark = text(f"UPDATE usage_record SET rolled_up = :rolled_up WHERE {newest}")
    with database.begin() as tx:
        tx.execute(mark, {"rolled_up": True, "open": num_open})
    rollups.roll_up(database, pass_s=float("inf"))
    with database.begin() as tx:
        tx.execute(mark, {"rolled_up": False, "open": num_open})


def read_events(history: History) -> int:
    """Read the day as `tinker billing usage` asks for it."""
    with history.database.read() as tx:
        events = usage_events.list_events(tx, history.account_id, since=history.day, until=history.day + DAY)
    return sum(event.charge for event in events)


def read_cost(history: History) -> int:
    """Read the day as `piecework cost` asks for it."""
    with history.database.read() as tx:
        scope = Scope(account_id=history.account_id, since=history.day, until=history.day + DAY)
        return sum(total.charge for total in usage_totals.totals(tx, scope))


READS: dict[str, Callable[[History], int]] = {"usage events": read_events, "cost": read_cost}


def measure(name: str, short: History, long: History, repeats: int) -> list[tuple[str, ...]]:
    """Rows of one database."""
    others = OthersLoad()
    rows = []
    for what, read in READS.items():
        taken: dict[int, list[float]] = {short.num_records: [], long.num_records: []}
        for number in range(repeats + 2):
            for history in ((short, long), (long, short))[number % 2]:
                start = time.perf_counter()
                cost = read(history)
                taken[history.num_records].append(time.perf_counter() - start)
                if cost != history.cost:
                    raise SystemExit(f"{what}: the day has cost {history.cost}, not {cost}")
        few, many = (statistics.median(times[2:]) * 1e3 for times in taken.values())
        ratio = statistics.median(b / a for a, b in zip(*(times[2:] for times in taken.values()), strict=True))
        rows.append((name, what, f"{few:.1f}", f"{many:.1f}", f"{ratio:.2f}"))
    return [(*row, f"{others.share():.0%}") for row in rows]


def plan_of(history: History) -> str:
    """How the database answers the day's query."""
    statement: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, sql: str, parameters: object, *_: object) -> None:
        statement.append((sql, parameters))

    event.listen(history.database.engine, "before_cursor_execute", note)
    read_cost(history)
    event.remove(history.database.engine, "before_cursor_execute", note)
    sql, parameters = max(statement, key=lambda one: len(one[0]))
    explain = "EXPLAIN QUERY PLAN " if history.database.is_sqlite else "EXPLAIN "
    with history.database.read() as tx:
        rows = tx.exec_driver_sql(explain + sql, parameters).all()
    return "\n".join(str(row[-1]) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse_arguments(arguments)
    rows: list[tuple[str, ...]] = []
    plans = []
    for name in options.databases:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
            server = stack.enter_context(closing(PostgresServer())) if name == "postgres" else None
            histories = []
            for num_records in (options.records // options.short, options.records):
                url = server.create_database() if server else f"sqlite:///{directory / f'{num_records}.db'}"
                database = stack.enter_context(closing(Database(url)))
                histories.append(make_history(database, num_records, per_day=options.per_day, num_open=options.open))
            rows += measure(name, histories[0], histories[1], options.repeats)
            if options.explain:
                plans.append(f"{name}\n{plan_of(histories[1])}")
    print(f"\n{describe()}; {options.per_day} records a day, {NUM_SESSIONS} sessions, {options.open} not rolled up; ")
    print(f"medians of {options.repeats} reads in turns, the ratio that of neighbours\n")
    short, long = f"{options.records // options.short:,}", f"{options.records:,}"
    header = ("database", "a day's", f"ms at {short}", f"ms at {long}", "ratio", "CPU used by others")
    print(table(header, rows))
    for plan in plans:
        print(f"\n{plan}")


if __name__ == "__main__":
    main()
