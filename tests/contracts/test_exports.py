"""Exports hold every line of a period once, exactly: read back, they add up to the ledger."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet
from sqlalchemy import select

from billing import export_files, ledger, money, rate_cards, storage_metering, usage_lines
from billing.export_files import COLUMNS, Format
from billing.usage import COUNTS
from storage import billing_tables
from storage.clock import FrozenClock
from storage.database import Database
from tests.contracts.storage_kit import keep, set_clock
from tests.factories import NOW, bill, make_account, make_operation, make_run, make_session, make_usage

CARD = """
[device_seconds]
"*" = "0.000813"
[million_tokens."*"]
trained = "0.7"
[gigabyte_months]
checkpoint = "0.03"
"""
HOUR = timedelta(hours=1)
NUM_SEQS = 7
ALL = (NOW - HOUR, NOW + 9 * HOUR)


@pytest.fixture
def account_id(database: Database) -> Iterator[str]:
    """Of two accounts with operations, some of them at the same moment, and checkpoints."""
    now, clock = database.now, set_clock(database)
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - timedelta(days=400))
        runs = [make_run(tx, session=make_session(tx, make_account(tx, name), api_key_id=7)) for name in ("a", "b")]
        for run in runs:
            keep(tx, run, 10**9 + 1, since=NOW)
            for seq in range(NUM_SEQS):
                used = make_usage(device_ns=10**9 + 7 * seq, tokens_trained=3 * seq)
                bill(tx, run, make_operation(tx, run, seq), used, now=NOW + timedelta(minutes=30 * (seq // 3)))
    meter(database, clock)
    yield runs[0].account_id
    database.now = now  # type: ignore[method-assign]


def meter(database: Database, clock: FrozenClock) -> None:
    clock.advance((5 * HOUR).total_seconds())
    while not storage_metering.meter(database, pass_s=60):
        pass


def written(
    database: Database, file_format: Format, *, page: int = 2, period: tuple[datetime, datetime] = ALL
) -> bytes:
    file = io.BytesIO()
    pages = usage_lines.pages(database, since=period[0], until=period[1], page=page)
    export_files.write(file, pages, file_format, source="/here")
    return file.getvalue()


def charged_units(database: Database) -> int:
    with database.read() as tx:
        return ledger.total_units(tx)


@pytest.mark.usefixtures("account_id")
def test_csv_read_back_adds_up_to_the_ledger(database: Database) -> None:
    # When
    rows = list(csv.DictReader(io.StringIO(written(database, Format.CSV).decode())))
    # Then
    assert sum(money.to_units(Decimal(row["charge"])) for row in rows) == charged_units(database) > 0
    assert_usage(database, {name: sum(int(row[name]) for row in rows) for name in (*COUNTS, "byte_seconds")})
    assert len({row["id"] for row in rows}) == len(rows) == 2 * NUM_SEQS + num_stored(database)
    assert {row["currency"] for row in rows} == {"USD"}


@pytest.mark.usefixtures("account_id")
def test_parquet_read_back_adds_up_to_the_ledger_in_exact_types(database: Database) -> None:
    # When
    table = parquet.read_table(io.BytesIO(written(database, Format.PARQUET)))
    # Then
    assert table.schema.field("charge").type == pyarrow.decimal128(38, 12)
    assert table.schema.field("device_ns").type == pyarrow.int64()
    assert table.schema.field("at").type == pyarrow.timestamp("us", tz="UTC")
    rows = table.to_pylist()
    assert money.to_units(sum((row["charge"] for row in rows), Decimal(0))) == charged_units(database)
    assert_usage(database, {name: sum(row[name] for row in rows) for name in (*COUNTS, "byte_seconds")})
    # And: it says the same as the CSV
    from_csv = csv.DictReader(io.StringIO(written(database, Format.CSV).decode()))
    assert [(row["id"], datetime.fromisoformat(row["at"])) for row in from_csv] == [
        (row["id"], row["at"]) for row in rows
    ]


@pytest.mark.usefixtures("account_id")
def test_events_read_back_add_up_to_the_ledger(database: Database) -> None:
    # When
    events = [json.loads(line) for line in written(database, Format.CLOUDEVENTS).decode().splitlines()]
    # Then
    assert sum(money.to_units(Decimal(event["data"]["charge"])) for event in events) == charged_units(database)
    assert {(event["specversion"], event["source"]) for event in events} == {("1.0", "/here")}
    assert {event["data"]["kind"] for event in events} == {"forward_backward", "checkpoint_storage"}


@pytest.mark.usefixtures("account_id")
@pytest.mark.parametrize("file_format", Format)
def test_the_same_usage_gives_the_same_bytes(database: Database, file_format: Format) -> None:
    assert written(database, file_format) == written(database, file_format)


@pytest.mark.usefixtures("account_id")
def test_pages_of_any_size_hold_the_same_lines(database: Database) -> None:
    whole = written(database, Format.CSV, page=1000)
    assert [written(database, Format.CSV, page=page) for page in (1, 2, 3, 7)] == [whole] * 4


@pytest.mark.usefixtures("account_id")
def test_periods_that_follow_each_other_share_no_line_and_leave_none_out(database: Database) -> None:
    cut = NOW + HOUR / 2
    parts = [written(database, Format.CSV, period=period) for period in ((ALL[0], cut), (cut, ALL[1]))]
    lines = [line for part in parts for line in part.decode().splitlines()[1:]]
    assert sorted(lines) == sorted(written(database, Format.CSV).decode().splitlines()[1:])
    assert all(len(part.splitlines()) > 1 for part in parts)


def test_an_account_is_exported_alone(database: Database, account_id: str) -> None:
    found = [
        line for page in usage_lines.pages(database, since=ALL[0], until=ALL[1], account_id=account_id) for line in page
    ]
    assert {line.account_id for line in found} == {account_id}
    num = usage_lines.count(database, since=ALL[0], until=ALL[1], account_id=account_id)
    everything = usage_lines.count(database, since=ALL[0], until=ALL[1])
    assert (len(found), everything) == (num, 2 * num)


@pytest.mark.parametrize("name", ["a\rb", "a\nb", 'a,"b"\r\n', "ä €"])
def test_whatever_a_batch_is_called_csv_read_back_has_its_name(database: Database, name: str) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx, session=make_session(tx, tags=[f"batch:{name}"]))
        bill(tx, run, make_operation(tx, run, 0))
    # When
    text = io.StringIO(written(database, Format.CSV).decode(), newline="")
    # Then
    (row,) = csv.DictReader(text)
    assert row["batch"] == name
    assert row["currency"] == "USD"


def test_nothing_is_a_file_with_its_columns(database: Database) -> None:
    assert written(database, Format.CSV).decode() == ",".join(COLUMNS) + "\n"
    assert parquet.read_table(io.BytesIO(written(database, Format.PARQUET))).column_names == list(COLUMNS)
    assert written(database, Format.CLOUDEVENTS) == b""


def num_stored(database: Database) -> int:
    with database.read() as tx:
        return len(tx.execute(select(billing_tables.storage_usage.c.id)).all())


def assert_usage(database: Database, sums: dict[str, int]) -> None:
    """The sums are those of the rows."""
    record, stored = billing_tables.usage_record, billing_tables.storage_usage
    with database.read() as tx:
        expected = {name: sum(tx.execute(select(record.c[name])).scalars()) for name in COUNTS}
        expected["byte_seconds"] = sum(tx.execute(select(stored.c.byte_seconds)).scalars())
    assert sums == expected
    assert sums["byte_seconds"] > 0
