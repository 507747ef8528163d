"""What every database promises, on SQLite and on PostgreSQL: tables, transactions, time, and who is first."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from billing import storage_metering, usage_totals
from billing.usage_totals import Scope
from storage import accounts, base_models, billing_tables, checkpoints, claims, journal, runs, tables, workers
from storage.database import Database
from storage.errors import DatabaseUnavailableError, RowNotFoundError
from storage.migrate import is_current, migrate, revisions
from storage.workers import Alarms, Work
from tests.factories import (
    LATER,
    LORA,
    MODEL,
    NOW,
    PAYLOAD,
    bill,
    make_account,
    make_base_model,
    make_checkpoint,
    make_operation,
    make_run,
    make_sampling_session,
    make_session,
    make_upload,
    make_usage,
)

T = TypeVar("T")
AT_ONCE = 4
STANDING = 16


def at_once(call: Callable[[int], T], num: int = AT_ONCE) -> list[T]:
    """Run `call(0) … call(num - 1)` in threads that begin together."""
    together = threading.Barrier(num)

    def begin(place: int) -> T:
        together.wait()
        return call(place)

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(begin, range(num)))


# --------------------------------------------------------------------------------------------------------- migrations


def test_migrated_tables_are_those_of_the_code(empty_url: str) -> None:
    # Given
    database = Database(empty_url)
    assert not is_current(database)
    # When
    migrate(database)
    # Then
    assert is_current(database)
    with database.begin() as tx:
        context = MigrationContext.configure(tx, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, tables.metadata) == []
    database.close()


def _fill(database: Database) -> None:
    """One row in each table that others refer to, whatever columns it has: every text "x", every number 1."""
    there = sqlalchemy.MetaData()
    with database.begin() as tx:
        there.reflect(tx)
        for name in ("account", "session", "run", "operation", "usage_record", "snapshot"):
            columns = [c for c in there.tables[name].columns if not (c.nullable or c.server_default)]
            texts = (sqlalchemy.String, sqlalchemy.JSON)
            values = {c.name: ("x" if isinstance(c.type, texts) else 1) for c in columns} | (
                {"id": 1} if name in ("operation", "usage_record") else {}
            )
            if name == "operation":
                values["run_id"] = "x"
            tx.execute(sqlalchemy.insert(there.tables[name]).values(values))


FIRST_WITH_A_BILL = "0005"
"""The revision that begins to charge what is stored."""


@pytest.mark.parametrize("revision", revisions()[:-1])
def test_a_database_with_rows_is_upgraded_from_every_revision(empty_url: str, revision: str) -> None:
    # Given
    database = Database(empty_url)
    migrate(database, revision=revision)
    _fill(database)
    # When
    migrate(database)
    # Then
    with database.read() as tx:
        run = runs.get_run(tx, "x")
        assert (run.replays_alone, run.replay_blame) == (False, 0)
        assert journal.get_operation(tx, "x").blame == 0
        assert tx.execute(sqlalchemy.select(billing_tables.usage_record.c.operation_id)).scalar_one() == 1
        # and: storage of before there was a bill is never charged
        since = storage_metering.next_hour(tx)
        assert since is not None
        assert revision >= FIRST_WITH_A_BILL or timedelta(0) <= database.now(tx) - since < timedelta(hours=2)
    database.close()


def test_migrating_again_changes_nothing(database: Database) -> None:
    # Given
    with database.begin() as tx:
        make_account(tx, "stays")
    # When
    migrate(database)
    # Then
    with database.read() as tx:
        assert accounts.find_account(tx, "stays") is not None


def test_processes_that_migrate_at_once_all_find_the_tables(empty_url: str) -> None:
    # Given
    databases = [Database(empty_url) for _ in range(AT_ONCE)]
    # When
    at_once(lambda place: migrate(databases[place]))
    # Then
    assert all(is_current(database) for database in databases)
    for database in databases:
        database.close()


# ------------------------------------------------------------------------------------------------------- transactions


def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    # When
    with pytest.raises(ZeroDivisionError), database.begin() as tx:  # noqa: PT012
        make_account(tx, "gone")
        raise ZeroDivisionError
    # Then
    with database.read() as tx:
        assert accounts.find_account(tx, "gone") is None


def test_a_reader_neither_waits_for_a_writer_nor_sees_what_is_not_committed(database: Database) -> None:
    with database.begin() as writer:
        # Given
        make_account(writer, "new")
        # When
        with database.read() as reader:
            found = accounts.find_account(reader, "new")
        # Then
        assert found is None
    with database.read() as reader:
        assert accounts.find_account(reader, "new") is not None


def test_a_writer_goes_on_while_a_reader_reads(database: Database) -> None:
    with database.read() as reader:
        # Given
        assert accounts.list_accounts(reader) == []
        # When
        with database.begin() as writer:
            make_account(writer, "new")
    # Then
    with database.read() as reader:
        assert len(accounts.list_accounts(reader)) == 1


def test_counting_in_transactions_at_once_loses_nothing(database: Database) -> None:
    # Given
    with database.begin() as tx:
        sampling = make_sampling_session(tx)

    def join(_: int) -> int:
        with database.begin() as tx:
            return runs.join_sampling_session(tx, sampling.id)

    # When
    numbers = at_once(join, 8)
    # Then
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_time_is_aware_and_exact(database: Database) -> None:
    # Given
    at = datetime(2031, 5, 4, 3, 2, 1, 987_654, tzinfo=UTC)
    # When
    with database.begin() as tx:
        stored = make_account(tx, "timed", now=at)
        read = accounts.get_account_by_id(tx, stored.id).created_at
        now, after = database.now(tx), database.after(tx, 60)
    # Then
    assert read == at
    assert read.tzinfo is UTC
    assert now.utcoffset() == timedelta(0)
    assert timedelta(seconds=60) <= after - now < timedelta(seconds=90)


def test_a_database_that_is_away_says_so_without_the_password() -> None:
    # Given
    database = Database("postgresql+psycopg://piecework:top-secret@127.0.0.1:1/none")
    # When
    with pytest.raises(DatabaseUnavailableError) as raised, database.begin():
        pass
    # Then
    assert "top-secret" not in str(raised.value)
    assert raised.value.retryable
    database.close()


@pytest.mark.servers
def test_a_server_that_no_longer_leads_counts_as_unavailable_and_is_connected_to_anew(fresh_database_url: str) -> None:
    # Given
    database = Database(fresh_database_url)
    migrate(database)
    with database.read() as tx:
        before = tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    # When
    with pytest.raises(DatabaseUnavailableError, match="read-only"), database.begin() as tx:  # noqa: PT012
        tx.exec_driver_sql("SET TRANSACTION READ ONLY")
        make_account(tx)
    # Then
    with database.read() as tx:
        assert tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() != before
    database.close()


@pytest.mark.servers
def test_a_connection_that_is_cut_in_mid_transaction_counts_as_unavailable(fresh_database_url: str) -> None:
    # Given
    database = Database(fresh_database_url)
    # When
    with pytest.raises(DatabaseUnavailableError), database.begin() as tx:  # noqa: PT012
        pid = tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        with database.begin() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 10000)")
        tx.exec_driver_sql("SELECT 1")
    # Then
    with database.begin() as tx:
        tx.exec_driver_sql("SELECT 1")
    database.close()


@pytest.mark.servers
def test_a_transaction_that_stands_still_lets_go_of_what_it_locked(
    fresh_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a process that stands still in a transaction, as one that was stopped does
    monkeypatch.setattr("storage.database.POSTGRES_IDLE_S", 0.5)
    database = Database(fresh_database_url)
    migrate(database)
    with database.begin() as tx:
        make_account(tx)
    standing = database.engine.connect()
    standing.execute(sqlalchemy.update(tables.account).values(name="old"))

    # when another changes the same row
    with database.begin() as tx:
        tx.execute(sqlalchemy.update(tables.account).values(name="new"))

    # then it waits for moments only, and the first one's change is gone
    with pytest.raises(sqlalchemy.exc.DBAPIError, match="idle-in-transaction"):
        standing.commit()
    standing.close()
    with database.read() as tx:
        assert tx.execute(sqlalchemy.select(tables.account.c.name)).scalars().all() == ["new"]
    database.close()


@pytest.mark.servers
def test_a_transaction_that_stands_still_after_many_rows_lets_go_of_them_too(
    fresh_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given processes that stand still after they have written many rows in one call; whether the server's clock for
    # idle transactions ran was a matter of luck, so there are many of them
    monkeypatch.setattr("storage.database.POSTGRES_IDLE_S", 0.5)
    database = Database(fresh_database_url, pool_size=STANDING)
    migrate(database)
    standing = [database.engine.connect() for _ in range(STANDING)]
    for number, connection in enumerate(standing):
        rows = [{"id": f"{number}-{i}", "name": f"{number}-{i}", "created_at": NOW} for i in range(2)]
        connection.execute(sqlalchemy.insert(tables.account), rows)

    # when somebody waits for what they hold
    with database.begin() as tx:
        tx.exec_driver_sql("LOCK TABLE account IN EXCLUSIVE MODE")

    # then all of them have been ended
    for connection in standing:
        with pytest.raises(sqlalchemy.exc.DBAPIError, match="idle-in-transaction"):
            connection.execute(sqlalchemy.text("SELECT 1"))
        connection.close()
    database.close()


def test_a_row_that_is_refused_does_not_count_as_unavailable(database: Database) -> None:
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.begin() as tx:
        tx.execute(sqlalchemy.insert(tables.account).values(id="a", name=None, created_at=NOW))


def test_a_pool_without_a_free_connection_counts_as_unavailable(database: Database) -> None:
    # Given
    database.engine.pool._timeout = 0.01  # type: ignore[attr-defined]
    held = [database.engine.connect() for _ in range(_connections_max(database))]
    # When
    with pytest.raises(DatabaseUnavailableError, match="QueuePool limit"), database.begin():
        pass
    # Then
    for connection in held:
        connection.close()
    with database.read() as tx:
        assert accounts.list_accounts(tx) == []


def _connections_max(database: Database) -> int:
    pool = database.engine.pool
    return int(pool.size() + pool._max_overflow)  # type: ignore[attr-defined]


def test_names_that_look_like_statements_are_only_names(database: Database) -> None:
    # Given
    name = "Robert'); DROP TABLE account;-- é \U0001f9ea"
    # When
    with database.begin() as tx:
        make_account(tx, name)
    # Then
    with database.read() as tx:
        assert [account.name for account in accounts.list_accounts(tx)] == [name]


# ------------------------------------------------------------------------------------- two processes do the same thing


def test_the_same_seq_from_two_processes_at_once_is_one_operation(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)

    def accept(place: int) -> tuple[str, bool]:
        with database.begin() as tx:
            return journal.accept_training(
                tx,
                account_id=run.account_id,
                run_id=run.id,
                seq=0,
                kind="optim_step",
                base_model=run.base_model,
                payload=PAYLOAD,
                now=NOW + timedelta(seconds=place),
            )

    # When
    accepted = at_once(accept)
    # Then
    assert {request_id for request_id, _ in accepted} == {f"{run.id}:0"}
    assert sorted(new for _, new in accepted) == [False] * (AT_ONCE - 1) + [True]
    with database.read() as tx:
        assert len(journal.list_operations(tx, run.id, limit=10)) == 1


def test_operations_of_one_run_accepted_at_once_all_stand_and_no_failure_is_counted_twice(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
    refusal = journal.Refusal("bad", "user")

    def accept(place: int) -> None:
        with database.begin() as tx:
            make_operation(tx, run, place, refusal=refusal)

    # When
    at_once(accept, 6)
    # Then
    with database.read() as tx:
        operations = journal.list_operations(tx, run.id, limit=10)
        assert [operation.seq for operation in operations] == [0, 1, 2, 3, 4, 5]
        assert sorted(operation.failure_number or 0 for operation in operations) == [1, 2, 3, 4, 5, 6]
        assert runs.get_run(tx, run.id).num_failures == 6


def test_the_same_model_seq_id_from_two_processes_at_once_is_one_run(database: Database) -> None:
    # Given
    with database.begin() as tx:
        session = make_session(tx)

    def create(place: int) -> runs.Run:
        with database.begin() as tx:
            return make_run(tx, session=session, lora={**LORA, "seed": place})

    # When
    made = at_once(create)
    # Then
    assert {run.id for run in made} == {f"{session.id}:train:0"}
    assert len({run.lora["seed"] for run in made}) == 1


def test_the_same_idempotency_key_from_two_processes_at_once_is_one_session(database: Database) -> None:
    # Given
    with database.begin() as tx:
        account = make_account(tx)

    def create(_: int) -> str:
        with database.begin() as tx:
            return make_session(tx, account, idempotency_key="k").id

    # When
    session_ids = at_once(create)
    # Then
    assert len(set(session_ids)) == 1


def test_the_same_sampling_session_from_two_processes_at_once_is_one(database: Database) -> None:
    # Given
    with database.begin() as tx:
        session = make_session(tx)

    def create(place: int) -> str | None:
        with database.begin() as tx:
            return make_sampling_session(tx, session, model_path=str(place)).model_path

    # When
    paths = at_once(create)
    # Then
    assert len(set(paths)) == 1


def test_a_checkpoint_name_taken_by_two_at_once_goes_to_one(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)

    def publish(place: int) -> bool:
        try:
            with database.begin() as tx:
                make_checkpoint(tx, run, "same", key=f"key-{place}")
        except checkpoints.CheckpointExistsError:
            return False
        return True

    # When
    published = at_once(publish)
    # Then
    assert sorted(published) == [False] * (AT_ONCE - 1) + [True]
    with database.read() as tx:
        (checkpoint,) = checkpoints.list_of_run(tx, run.account_id, run.id, now=NOW)
        assert checkpoint.object_key == f"key-{published.index(True)}"


def test_weights_stay_if_a_sampling_session_is_opened_while_their_checkpoint_is_deleted(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        checkpoint = make_checkpoint(tx, run, key="w")
        session = runs.get_session(tx, run.account_id, run.session_id)
    opened, deleting = threading.Event(), threading.Event()

    def delete() -> None:
        opened.wait()
        with database.begin() as tx:
            deleting.set()
            checkpoints.remove(tx, run.account_id, checkpoint.path, now=NOW)

    # When
    deleter = threading.Thread(target=delete)
    deleter.start()
    with database.begin() as tx:
        found = checkpoints.get(tx, checkpoint.path, now=NOW, reader=run.account_id)
        opened.set()
        if not database.is_sqlite:  # there, the deleter cannot even begin until this transaction ends
            deleting.wait()
        make_sampling_session(tx, session, object_key=found.object_key)
    deleter.join()
    # Then
    with database.read() as tx:
        assert _state(tx, "w") == "referenced"
        assert checkpoints.find(tx, checkpoint.path, now=NOW) is None


def test_weights_stay_if_a_load_is_recorded_while_their_checkpoint_is_deleted(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        checkpoint = make_checkpoint(tx, run, key="w")
        load = make_operation(tx, run, 0, "load_state")

    def act(place: int) -> None:
        with database.begin() as tx:
            if place == 0:
                journal.record_load(tx, load, "w")
            else:
                checkpoints.remove(tx, run.account_id, checkpoint.path, now=NOW)

    # When
    at_once(act, 2)
    # Then whoever came first
    with database.read() as tx:
        assert _state(tx, "w") == "referenced"


def _state(tx: Connection, key: str) -> str | None:
    row = tables.stored_object
    return tx.execute(sqlalchemy.select(row.c.state).where(row.c.key == key)).scalar_one_or_none()


def test_a_sample_is_claimed_by_one_of_those_who_ask_at_once(database: Database) -> None:
    # Given
    with database.begin() as tx:
        sampling = make_sampling_session(tx)
        for seq in range(8):
            journal.accept_sample(
                tx,
                account_id=sampling.account_id,
                sampling_session_id=sampling.id,
                seq=seq,
                kind="sample",
                base_model=MODEL,
                payload=PAYLOAD,
                num_sequences=1,
                now=NOW,
            )

    def claim(place: int) -> list[int]:
        with database.begin() as tx:
            claimed = claims.claim_samples(
                tx,
                worker_id=f"w{place}",
                limit=4,
                now=NOW,
                expires_at=LATER,
                skip_locked=not database.is_sqlite,
            )
            return [operation.seq for operation in claimed]

    # When
    taken_at_once = at_once(claim)
    # Then
    taken = [seq for claimed in taken_at_once for seq in claimed]
    assert len(taken) == len(set(taken))


# ------------------------------------------------------------------------------------------------- accounts and keys


def test_a_key_opens_its_account_and_its_secret_is_stored_nowhere(database: Database) -> None:
    # Given
    with database.begin() as tx:
        account = make_account(tx)
        # When
        secret = accounts.create_key(tx, account.id, name="laptop", now=NOW)
        # Then
        key = accounts.find_key(tx, secret)
        assert key is not None
        assert (key.account_id, key.name, key.hint) == (account.id, "laptop", secret[-4:])
        assert secret.startswith("tml-")
        for table in tables.metadata.sorted_tables:
            for row in tx.execute(sqlalchemy.select(table)):
                assert all(secret not in str(value) for value in row)


def test_a_revoked_or_foreign_secret_opens_nothing(database: Database) -> None:
    with database.begin() as tx:
        # Given
        account = make_account(tx)
        secret = accounts.create_key(tx, account.id, name="old", now=NOW)
        (key,) = accounts.list_keys(tx, account.id)
        # When
        accounts.revoke_key(tx, key.id, now=NOW)
        accounts.revoke_key(tx, key.id, now=LATER)
        # Then
        assert accounts.find_key(tx, secret) is None
        assert accounts.find_key(tx, secret + "x") is None
        assert [key.revoked_at for key in accounts.list_keys(tx, account.id)] == [NOW]
        with pytest.raises(RowNotFoundError):
            accounts.revoke_key(tx, key.id + 1, now=NOW)


def test_an_account_name_is_taken_once(database: Database) -> None:
    with database.begin() as tx:
        make_account(tx, "acme")
        with pytest.raises(accounts.AccountExistsError, match="acme"):
            accounts.create_account(tx, "acme", now=NOW)
        with pytest.raises(RowNotFoundError, match="nobody"):
            accounts.get_account(tx, "nobody")


# -------------------------------------------------------------------------------------------------- usage and workers


def test_an_operation_has_one_usage_record(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        operation = make_operation(tx, run)
        bill(tx, run, operation, make_usage())
        record = dict(tx.execute(sqlalchemy.select(billing_tables.usage_record)).one()._mapping)
    # When
    del record["id"]
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.begin() as tx:
        tx.execute(sqlalchemy.insert(billing_tables.usage_record).values(**record))
    # Then
    with database.read() as tx:
        (total,) = usage_totals.totals(tx)
        assert (total.operations, total.device_ns) == (1, 1_000)


def test_totals_add_up_by_run_and_kind(database: Database) -> None:
    # Given
    with database.begin() as tx:
        session = make_session(tx)
        first, second = (make_run(tx, session=session, model_seq_id=place) for place in (0, 1))
        other = make_run(tx, make_account(tx, "other"))
        for seq in range(3):
            bill(tx, first, make_operation(tx, first, seq), make_usage(device_ns=10**18, tokens_trained=7))
        bill(tx, second, make_operation(tx, second, 0, "optim_step"), make_usage(device_ns=3), now=LATER)
        bill(tx, other, make_operation(tx, other), make_usage(device_ns=5))
    # When
    with database.read() as tx:
        everything = usage_totals.totals(tx)
        of_first = usage_totals.totals(tx, Scope(run_id=first.id))
        of_account = usage_totals.totals(tx, Scope(account_id=session.account_id))
        of_session = usage_totals.totals(tx, Scope(session_id=session.id))
        late = usage_totals.totals(tx, Scope(since=LATER))
    # Then
    assert [(total.account_id, total.run_id, total.kind, total.device_ns) for total in everything] == sorted(
        [
            (first.account_id, first.id, "forward_backward", 3 * 10**18),
            (first.account_id, second.id, "optim_step", 3),
            (other.account_id, other.id, "forward_backward", 5),
        ]
    )
    assert [(total.operations, total.tokens_trained) for total in of_first] == [(3, 21)]
    assert of_account == of_session == [total for total in everything if total.account_id == first.account_id]
    assert [total.run_id for total in late] == [second.id]


def test_a_worker_that_was_given_its_id_may_start_again(database: Database) -> None:
    with database.begin() as tx:
        # Given
        workers.register(tx, worker_id="gpu-0", host="h", pid=1, device="cpu", now=NOW)
        workers.add_work(tx, "gpu-0", Work(busy_ns=10, overhead_ns=4), number=1, under_way_ns=3, tail_p95_ns=7)
        workers.record_stopped(tx, "gpu-0", ended_by="fault", now=NOW)
        assert workers.list_workers(tx, seen_after=NOW - timedelta(seconds=1)) == []
        # When
        workers.register(tx, worker_id="gpu-0", host="h", pid=2, device="cpu", now=LATER)
        workers.add_work(tx, "gpu-0", Work(busy_ns=1, num_replayed=3), number=2, under_way_ns=0, tail_p95_ns=5)
        # Then
        (worker,) = workers.list_workers(tx, seen_after=NOW)
        assert (worker.pid, worker.started_at, worker.stopped_at, worker.ended_by) == (2, LATER, None, None)
        assert (worker.busy_ns, worker.overhead_ns, worker.under_way_ns) == (11, 4 + 3, 0)
        assert (worker.num_replayed, worker.tail_p95_ns) == (3, 5)


def test_alarms_outlive_the_worker_that_raised_them(database: Database) -> None:
    with database.begin() as tx:
        # Given
        assert workers.count_alarms(tx) == Alarms(0, 0)
        for name in ("a", "b"):
            workers.register(tx, worker_id=name, host="h", pid=1, device="cpu", now=NOW)
            workers.add_work(
                tx,
                name,
                Work(num_replay_mismatches=2, num_damaged_snapshots=1),
                number=1,
                under_way_ns=0,
                tail_p95_ns=0,
            )
        # When
        workers.record_stopped(tx, "a", ended_by="fault", now=NOW)
        # Then
        assert workers.count_alarms(tx) == Alarms(replay_mismatches=4, damaged_snapshots=2)


def test_only_workers_seen_lately_count(database: Database) -> None:
    with database.begin() as tx:
        # Given
        for name in ("a", "b"):
            workers.register(tx, worker_id=name, host="h", pid=1, device="cpu", now=NOW)
        # When
        workers.record_seen(tx, "b", now=LATER)
        # Then
        assert [worker.id for worker in workers.list_workers(tx, seen_after=NOW)] == ["b"]


# -------------------------------------------------------------------------------------------------------- base models


def test_a_base_model_comes_back_and_its_files_go_with_it(database: Database) -> None:
    with database.begin() as tx:
        # Given
        files = {"model.safetensors": base_models.StoredFile(make_upload(tx, "weights"), 2**33)}
        # When
        added = make_base_model(tx, files=files, num_parameters=7 * 10**9)
        # Then
        assert base_models.list_base_models(tx) == [added]
        with pytest.raises(base_models.BaseModelExistsError, match="--name"):
            make_base_model(tx)
        base_models.remove_base_model(tx, MODEL)
        assert _state(tx, "weights") == "released"
        with pytest.raises(RowNotFoundError):
            base_models.get_base_model(tx, MODEL)
