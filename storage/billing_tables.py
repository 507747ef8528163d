"""Rows of the bill: usage, prices, charges, budgets, invoices. See `tables.py` for what times and amounts are.

Money is an integer in units of `billing.money.SCALE`, in columns named `amount`, `charge`, `cap`, `spent` and `total`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from storage.tables import BigId, Json, Timestamp, metadata

NOT_ROLLED_UP = text("NOT rolled_up")
NOT_METERED = text("NOT metered")

usage_record = Table(
    "usage_record",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("operation_id", BigInteger, ForeignKey("operation.id"), nullable=False, unique=True),
    Column("account_id", String(64), nullable=False),
    Column("project_id", String(64)),
    Column("api_key_id", BigInteger),
    Column("session_id", String(64), nullable=False),
    Column("batch", String(128)),
    Column("run_id", String(128)),
    Column("sampling_session_id", String(128)),
    Column("kind", String(32), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("device", String(128), nullable=False),
    Column("device_ns", BigInteger, nullable=False),
    Column("tokens_trained", BigInteger, nullable=False),
    Column("tokens_prefilled", BigInteger, nullable=False),
    Column("tokens_cached", BigInteger, nullable=False),
    Column("tokens_sampled", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker_id", String(128), nullable=False),
    Column("finished_at", Timestamp, nullable=False),
    Column("rolled_up", Boolean, nullable=False, server_default=text("false")),
    Column("announced", Boolean, nullable=False, server_default=text("false")),  # webhooks are told of it, once
    Index("ix_usage_record_account_finished", "account_id", "finished_at"),
    Index("ix_usage_record_account_kind", "account_id", "kind", "base_model", "finished_at"),
    Index("ix_usage_record_run", "run_id"),
    Index(
        "ix_usage_record_open_account",
        "account_id",
        "finished_at",
        sqlite_where=NOT_ROLLED_UP,
        postgresql_where=NOT_ROLLED_UP,
    ),
    Index("ix_usage_record_open_run", "run_id", sqlite_where=NOT_ROLLED_UP, postgresql_where=NOT_ROLLED_UP),
    Index("ix_usage_record_open_worker", "worker_id", sqlite_where=NOT_ROLLED_UP, postgresql_where=NOT_ROLLED_UP),
)

# Usage of an hour, added up; what is not rolled up yet is added to it by whoever asks. "" and 0 stand for none.
usage_rollup = Table(
    "usage_rollup",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("hour", Timestamp, nullable=False),
    Column("account_id", String(64), nullable=False),
    Column("project_id", String(64), nullable=False),
    Column("api_key_id", BigInteger, nullable=False),
    Column("session_id", String(64), nullable=False),
    Column("batch", String(128), nullable=False),
    Column("run_id", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("device", String(128), nullable=False),
    Column("operations", BigInteger, nullable=False),
    Column("device_ns", BigInteger, nullable=False),
    Column("tokens_trained", BigInteger, nullable=False),
    Column("tokens_prefilled", BigInteger, nullable=False),
    Column("tokens_cached", BigInteger, nullable=False),
    Column("tokens_sampled", BigInteger, nullable=False),
    Column("charge", BigInteger, nullable=False),
    UniqueConstraint(
        "account_id",
        "hour",
        "session_id",
        "run_id",
        "kind",
        "base_model",
        "device",
        "project_id",
        "api_key_id",
        "batch",
        name="uq_usage_rollup_dimensions",
    ),
    Index("ix_usage_rollup_run", "run_id"),
)

# From when to when a checkpoint's bytes are kept; `metered` once all its hours were.
storage_span = Table(
    "storage_span",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("checkpoint_id", BigInteger, unique=True),  # null once its row is gone: SQLite gives numbers again
    Column("account_id", String(64), nullable=False),
    Column("run_id", String(128), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("since", Timestamp, nullable=False),
    Column("until", Timestamp),
    Column("metered", Boolean, nullable=False, server_default=text("false")),
    Index("ix_storage_span_run", "run_id", "until"),
    Index("ix_storage_span_open_run", "run_id", sqlite_where=NOT_METERED, postgresql_where=NOT_METERED),
    Index("ix_storage_span_open_until", "until", sqlite_where=NOT_METERED, postgresql_where=NOT_METERED),
)

# What an account's run kept in an hour: `kind` is `checkpoint` or `state`.
storage_usage = Table(
    "storage_usage",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("hour", Timestamp, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("account_id", String(64), nullable=False),
    Column("project_id", String(64)),
    Column("api_key_id", BigInteger),
    Column("session_id", String(64), nullable=False),
    Column("batch", String(128)),
    Column("run_id", String(128), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("byte_seconds", BigInteger, nullable=False),
    UniqueConstraint("hour", "run_id", "kind"),
    Index("ix_storage_usage_account_hour", "account_id", "hour"),
    Index("ix_storage_usage_run", "run_id"),
)

# Hours whose storage has been metered.
storage_hour = Table("storage_hour", metadata, Column("hour", Timestamp, primary_key=True))

rate_card = Table(
    "rate_card",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),  # the version: of two in force the later one counts
    Column("account_id", String(64), ForeignKey("account.id")),  # null: every account that has none of its own
    Column("effective_at", Timestamp, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("content", Text, nullable=False),  # TOML, as it was given
    Column("sha256", String(64), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Index("ix_rate_card_account_effective", "account_id", "effective_at"),
)

invoice = Table(
    "invoice",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("number", BigInteger, nullable=False, unique=True),  # 1, 2, 3 … without a gap
    Column("kind", String(16), nullable=False),  # `invoice` or `credit_note`
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("period_start", Timestamp, nullable=False),
    Column("period_end", Timestamp, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("corrects_id", BigInteger, ForeignKey("invoice.id")),
    Column("reference", String(128)),  # of a credit note: the same one again gets the same note
    Column("asked_for", Text),  # of a credit note with a reference: what it was asked for with, as JSON
    Column("document", Text, nullable=False),  # JSON, as it was issued
    Column("sha256", String(64), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Index("ix_invoice_account_period", "account_id", "period_end"),
    Index("ix_invoice_corrects_reference", "corrects_id", "reference", unique=True),
)

# One row: the number of the newest invoice.
invoice_number = Table(
    "invoice_number",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("last", BigInteger, nullable=False),
)

_NOT_INVOICED = text("invoice_id IS NULL")
_CORRECTING = text("corrects_id IS NOT NULL")

# Appended to, never edited: triggers of the database refuse it. Positive amounts are owed by the account.
ledger_entry = Table(
    "ledger_entry",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("source", String(192), nullable=False, unique=True),  # what it is for: a second entry for it is refused
    Column("kind", String(16), nullable=False),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("operation_id", BigInteger, unique=True),  # of a charge for an operation
    Column("storage_usage_id", BigInteger, unique=True),  # of a charge for storage
    Column("rate_card_id", BigInteger, ForeignKey("rate_card.id")),
    Column("corrects_id", BigInteger, ForeignKey("ledger_entry.id")),
    Column("project_id", String(64)),
    Column("api_key_id", BigInteger),
    Column("session_id", String(64)),
    Column("batch", String(128)),
    Column("run_id", String(128)),
    Column("note", Text),
    # Set once: entries are put on an invoice before it is written, since it adds them up.
    Column("invoice_id", BigInteger, ForeignKey("invoice.id", deferrable=True, initially="DEFERRED")),
    Index("ix_ledger_entry_account_created", "account_id", "created_at"),
    Index("ix_ledger_entry_run_created", "run_id", "created_at"),
    Index("ix_ledger_entry_invoice", "invoice_id"),
    Index("ix_ledger_entry_corrects", "corrects_id", sqlite_where=_CORRECTING, postgresql_where=_CORRECTING),
    Index(
        "ix_ledger_entry_open",
        "account_id",
        "created_at",
        sqlite_where=_NOT_INVOICED,
        postgresql_where=_NOT_INVOICED,
    ),
)

_LIVE = text("removed_at IS NULL")
_EXHAUSTED = text("removed_at IS NULL AND is_hard AND spent >= cap")

budget = Table(
    "budget",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("scope", String(16), nullable=False),  # account, project, key, session, run or batch
    Column("scope_id", String(128), nullable=False),
    Column("period", String(8), nullable=False),  # none, day or month (UTC)
    Column("cap", BigInteger, nullable=False),
    Column("is_hard", Boolean, nullable=False),  # pauses what it covers; a soft one only tells
    Column("thresholds", Json, nullable=False),  # whole per cent of the cap at which it tells
    Column("created_at", Timestamp, nullable=False),
    Column("removed_at", Timestamp),
    Column("period_start", Timestamp, nullable=False),
    Column("spent", BigInteger, nullable=False, server_default="0"),  # in the period: the sum of its ledger entries
    Column("held", BigInteger, nullable=False, server_default="0"),  # the sum of its holds
    Column("told_percent", Integer, nullable=False, server_default="0"),  # highest threshold told of in the period
    Column("refused_at", Timestamp),  # when there was last no room for something that was asked for
    Index("ix_budget_covering", "account_id", "scope", "scope_id", sqlite_where=_LIVE, postgresql_where=_LIVE),
    Index("ix_budget_exhausted", "id", sqlite_where=_EXHAUSTED, postgresql_where=_EXHAUSTED),
)

# What accepted operations that are not done yet may cost at most.
budget_hold = Table(
    "budget_hold",
    metadata,
    Column("operation_id", BigInteger, ForeignKey("operation.id"), primary_key=True),
    Column("budget_id", BigInteger, ForeignKey("budget.id"), primary_key=True),
    Column("amount", BigInteger, nullable=False),
    Index("ix_budget_hold_budget", "budget_id"),
)

webhook = Table(
    "webhook",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("account_id", String(64), ForeignKey("account.id")),  # null: every account's events
    Column("url", Text, nullable=False),
    Column("secret", Text, nullable=False),  # as it is: signing needs it
    Column("events", Json, nullable=False),  # kinds of event it is told of
    Column("created_at", Timestamp, nullable=False),
    Column("removed_at", Timestamp),
)

_WAITING = text("delivered_at IS NULL AND given_up_at IS NULL")

webhook_delivery = Table(
    "webhook_delivery",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("webhook_id", BigInteger, ForeignKey("webhook.id"), nullable=False),
    Column("event_id", String(192), nullable=False),
    Column("body", Text, nullable=False),
    Column("content_type", String(128), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("next_at", Timestamp, nullable=False),
    Column("last_error", Text),
    Column("delivered_at", Timestamp),
    Column("given_up_at", Timestamp),
    UniqueConstraint("webhook_id", "event_id"),
    Index("ix_webhook_delivery_created", "created_at"),
    Index("ix_webhook_delivery_waiting", "webhook_id", "next_at", sqlite_where=_WAITING, postgresql_where=_WAITING),
)

quote = Table(
    "quote",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", String(64), ForeignKey("account.id"), nullable=False),
    Column("base_model", String(256), nullable=False),
    Column("device", String(128), nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("device_ns", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("rate_card_id", BigInteger, ForeignKey("rate_card.id"), nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Index("ix_quote_account_created", "account_id", "created_at"),
)

# What holding billed device time and overhead against the busy clocks has shown, of the time since the row before.
reconciliation = Table(
    "reconciliation",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("created_at", Timestamp, nullable=False),
    Column("num_workers", Integer, nullable=False),
    Column("busy_ns", BigInteger, nullable=False),
    Column("billed_ns", BigInteger, nullable=False),
    Column("overhead_ns", BigInteger, nullable=False),
    Column("drift_ppm", BigInteger, nullable=False),  # of the worker that is furthest off
    Column("alarm", Boolean, nullable=False),
)

# A worker that was off by too much in a row of `reconciliation`.
drift_alarm = Table(
    "drift_alarm",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("reconciliation_id", BigInteger, ForeignKey("reconciliation.id"), nullable=False),
    Column("worker_id", String(128)),  # null: all that were hardly busy, together
    Column("busy_ns", BigInteger, nullable=False),
    Column("drift_ns", BigInteger, nullable=False),
    Column("drift_ppm", BigInteger, nullable=False),
)

# What stood of each worker when it was last in a row of `reconciliation`.
reconciled_worker = Table(
    "reconciled_worker",
    metadata,
    Column("worker_id", String(128), primary_key=True),
    Column("busy_ns", BigInteger, nullable=False),
    Column("billed_ns", BigInteger, nullable=False),
    Column("overhead_ns", BigInteger, nullable=False),
    Column("under_way_ns", BigInteger, nullable=False),
)
