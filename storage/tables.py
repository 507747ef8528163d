"""Every row there is. Changes to these tables go through `migrations/`.

Times are integers (microseconds since 1970, UTC), device time is integer nanoseconds, money is an integer in units of
`billing.money.SCALE`: no floating-point number decides anything here.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Timestamp(TypeDecorator[datetime]):
    """An aware UTC time as integer microseconds: the same on every database, exact, ordered."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Microseconds since 1970."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """The aware time."""
        return None if value is None else _EPOCH + int(value) * _MICROSECOND


Json = JSON().with_variant(JSONB(), "postgresql")
# SQLite numbers rows by itself only in a column declared INTEGER.
BigId = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

account = Table(
    "account",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("created_at", Timestamp, nullable=False),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("revoked_at", Timestamp),
)

base_model = Table(
    "base_model",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("source", Text, nullable=False),
    Column("tokenizer_id", Text, nullable=False),
    Column("architecture", String(128), nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("context_length", Integer, nullable=False),
    Column("vocab_size", Integer, nullable=False),
    Column("num_parameters", BigInteger, nullable=False),
    Column("tied_embeddings", Boolean, nullable=False),
    Column("files", Json, nullable=False),  # {relative path: {"key": object key, "size": bytes}}
    Column("created_at", Timestamp, nullable=False),
)

session = Table(
    "session",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("project_id", String(64)),
    Column("api_key_id", BigInteger),
    Column("idempotency_key", String(128)),
    Column("tags", Json, nullable=False),
    Column("user_metadata", Json, nullable=False),
    Column("display_name", Text),
    Column("sdk_version", String(64), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("heartbeat_at", Timestamp, nullable=False),
    Column("finished_at", Timestamp),
    Column("finish_reason", String(32)),
    Column("finish_detail", Text),
    Column("batch", String(128)),  # what its tag `batch:NAME` names: sessions with the same one are charged together
    UniqueConstraint("account_id", "idempotency_key"),
    Index("ix_session_account_created", "account_id", "created_at"),
)

run = Table(
    "run",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("session_id", String(64), ForeignKey("session.id"), nullable=False, index=True),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("lora", Json, nullable=False),
    Column("optimizer", String(32), nullable=False),
    Column("user_metadata", Json, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("last_request_at", Timestamp, nullable=False),
    # state_seq: the last operation whose effect is committed; -1 before the run's first.
    Column("state_seq", BigInteger, nullable=False, server_default="-1"),
    # num_failures: failures recorded so far; an operation remembers the number it was accepted under.
    Column("num_failures", BigInteger, nullable=False, server_default="0"),
    Column("lease_worker", String(128)),
    Column("lease_epoch", BigInteger, nullable=False, server_default="0"),
    Column("lease_expires_at", Timestamp),
    Column("replayed_by", String(128)),  # the worker that computes its tail again
    Column("replays_alone", Boolean, nullable=False, server_default=text("false")),
    Column("replay_blame", Integer, nullable=False, server_default="0"),  # deaths while it was replayed alone
    # The `seq` that was last answered 402, and when: its place is no gap as long as its client asks again.
    Column("budget_refused_seq", BigInteger),
    Column("budget_refused_at", Timestamp),
    UniqueConstraint("session_id", "model_seq_id"),
    Index("ix_run_account_created", "account_id", "created_at"),
    Index("ix_run_lease_worker", "lease_worker"),
)

sampling_session = Table(
    "sampling_session",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("session_id", String(64), ForeignKey("session.id"), nullable=False, index=True),
    Column("sampling_session_seq_id", BigInteger, nullable=False),
    Column("run_id", String(128)),  # the account's run that the weights are from
    Column("base_model", String(256), nullable=False),
    Column("model_path", Text),
    Column("object_key", Text),  # adapter weights; null samples from the base model
    Column("lora", Json),
    Column("num_clones", Integer, nullable=False, server_default="0"),
    Column("created_at", Timestamp, nullable=False),
    Column("ended_at", Timestamp),  # its weights may be gone
    Index("ix_sampling_session_object_key", "object_key"),
)

# What waits or runs. The second half always holds; for want of it no query but the one that counts takes the index.
OPEN = text("finished_at IS NULL AND payload_bytes >= 0")
_OPEN_SAMPLES = text("sampling_session_id IS NOT NULL AND finished_at IS NULL")

_SUSPECT_SAMPLES = text("suspect AND sampling_session_id IS NOT NULL AND finished_at IS NULL")

operation = Table(
    "operation",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("request_id", String(192), nullable=False, unique=True),
    Column("account_id", String(64), nullable=False),
    Column("run_id", String(128), ForeignKey("run.id")),
    Column("sampling_session_id", String(128), ForeignKey("sampling_session.id")),
    Column("seq", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("status", String(16), nullable=False),
    Column("payload", LargeBinary),
    Column("payload_key", Text),
    Column("payload_bytes", BigInteger, nullable=False, server_default="0"),
    Column("outcome", LargeBinary),
    Column("outcome_key", Text),
    Column("outcome_bytes", BigInteger, nullable=False, server_default="0"),
    Column("error", Text),
    Column("error_category", String(16)),
    Column(
        "loads_key", Text
    ),  # weights a load_state reads: a checkpoint's object, kept as long as a replay may need it
    Column("failures_seen", BigInteger, nullable=False, server_default="0"),
    Column("failure_number", BigInteger),
    Column("num_sequences", Integer, nullable=False, server_default="1"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("suspect", Boolean, nullable=False, server_default=text("false")),  # a worker died with it: runs alone now
    Column("alone", Boolean, nullable=False, server_default=text("false")),  # the attempt that runs has no company
    Column("blame", Integer, nullable=False, server_default="0"),  # deaths while it ran alone: suspects.py
    Column("worker_id", String(128)),
    Column("claim_expires_at", Timestamp),
    Column("accepted_at", Timestamp, nullable=False),
    Column("started_at", Timestamp),
    Column("finished_at", Timestamp),
    Column("expired", Boolean, nullable=False, server_default=text("false")),
    UniqueConstraint("run_id", "seq"),
    UniqueConstraint("sampling_session_id", "seq"),
    Index("ix_operation_waiting", "status", "kind", "base_model"),
    Index("ix_operation_account_finished", "account_id", "finished_at"),
    Index("ix_operation_open_samples", "status", "id", sqlite_where=_OPEN_SAMPLES, postgresql_where=_OPEN_SAMPLES),
    Index(
        "ix_operation_open_samples_by_account",
        "status",
        "account_id",
        "id",
        sqlite_where=_OPEN_SAMPLES,
        postgresql_where=_OPEN_SAMPLES,
    ),
    Index("ix_operation_open", "finished_at", "account_id", "payload_bytes", sqlite_where=OPEN, postgresql_where=OPEN),
    Index(
        "ix_operation_suspect_samples", "status", "id", sqlite_where=_SUSPECT_SAMPLES, postgresql_where=_SUSPECT_SAMPLES
    ),
    Index(
        "ix_operation_finished", "finished_at", sqlite_where=text("NOT expired"), postgresql_where=text("NOT expired")
    ),
    Index("ix_operation_loads_key", "loads_key"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("account_id", String(64), nullable=False),
    Column("run_id", String(128), ForeignKey("run.id"), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("name", String(256), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("lora", Json, nullable=False),
    Column("object_key", Text, nullable=False),
    Column("files", Json, nullable=False),  # {file name: {"key": object key, "size": bytes}} for downloads
    Column("size_bytes", BigInteger, nullable=False),
    Column("user_metadata", Json, nullable=False),
    Column("public", Boolean, nullable=False, server_default=text("false")),
    Column("created_at", Timestamp, nullable=False),
    Column("expires_at", Timestamp),
    UniqueConstraint("run_id", "kind", "name"),
    Index("ix_checkpoint_account_created", "account_id", "created_at"),
    Index("ix_checkpoint_expires", "expires_at"),
    Index("ix_checkpoint_object_key", "object_key"),
)

snapshot = Table(
    "snapshot",
    metadata,
    Column("run_id", String(128), ForeignKey("run.id"), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("object_key", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Timestamp, nullable=False),
)

# An object is announced here before it is put, and becomes a reference in the transaction that names it.
stored_object = Table(
    "stored_object",
    metadata,
    Column("key", String(1024), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),
    Column("sha256", String(64)),  # null: nobody verifies it by this row
    Column("created_at", Timestamp, nullable=False),
    Column("expires_at", Timestamp),
    Index("ix_stored_object_state_expires", "state", "expires_at"),
)

worker = Table(
    "worker",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("host", String(256), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", String(128), nullable=False),
    Column("started_at", Timestamp, nullable=False),
    Column("seen_at", Timestamp, nullable=False),
    Column("stopped_at", Timestamp),
    Column("busy_ns", BigInteger, nullable=False, server_default="0"),
    Column("overhead_ns", BigInteger, nullable=False, server_default="0"),
    Column("ended_by", String(16)),  # how it died, as far as is known
    Column("num_replayed", BigInteger, nullable=False, server_default="0"),
    Column("num_replay_mismatches", BigInteger, nullable=False, server_default="0"),
    Column("tail_p95_ns", BigInteger, nullable=False, server_default="0"),  # device time a death would replay
    Column("num_damaged_snapshots", BigInteger, nullable=False, server_default="0"),
    Column("work_number", BigInteger, nullable=False, server_default="0"),  # the last report that was added
    Column("under_way_ns", BigInteger, nullable=False, server_default="0"),  # device time of what is not done yet
    Column("rolled_up_ns", BigInteger, nullable=False, server_default="0"),  # billed device time that is rolled up
)
