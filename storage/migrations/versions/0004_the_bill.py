"""The bill: charges, rate cards, budgets, invoices, rollups, storage over time, webhooks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")

# What may not change once it is written. Of a ledger entry only the invoice that it is on is filled in, once.
_KEYS = ("operation_id", "storage_usage_id", "rate_card_id", "corrects_id")
_DIMENSIONS = ("project_id", "api_key_id", "session_id", "batch", "run_id")
_FIXED = ("id", "source", "kind", "account_id", "amount", "created_at", *_KEYS, *_DIMENSIONS, "note")
GUARDS = {
    "ledger_entry": " OR ".join(
        ["OLD.invoice_id IS NOT NULL", *(f"NEW.{name} IS DISTINCT FROM OLD.{name}" for name in _FIXED)]
    ),
    "invoice": "true",
    "rate_card": "true",
}
NEW_COLUMNS = {
    "run": ("budget_refused_seq", "budget_refused_at"),
    "session": ("batch",),
    "usage_record": ("project_id", "api_key_id", "batch", "rolled_up", "announced"),
    "worker": ("work_number", "under_way_ns", "rolled_up_ns"),
}
NEW_TABLES = (
    *("budget_hold", "webhook_delivery", "quote", "ledger_entry", "webhook", "rate_card", "invoice", "budget"),
    *("usage_rollup", "storage_usage", "storage_span", "storage_hour", "reconciliation", "invoice_number"),
)


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "invoice_number",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invoice_number")),
    )
    op.create_table(
        "reconciliation",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("num_workers", sa.Integer(), nullable=False),
        sa.Column("busy_ns", sa.BigInteger(), nullable=False),
        sa.Column("billed_ns", sa.BigInteger(), nullable=False),
        sa.Column("overhead_ns", sa.BigInteger(), nullable=False),
        sa.Column("drift_ppm", sa.BigInteger(), nullable=False),
        sa.Column("alarm", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reconciliation")),
    )
    op.create_table(
        "storage_hour",
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("hour", name=op.f("pk_storage_hour")),
    )
    op.create_table(
        "storage_span",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("checkpoint_id", sa.BigInteger(), nullable=True),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=True),
        sa.Column("metered", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_storage_span")),
        sa.UniqueConstraint("checkpoint_id", name=op.f("uq_storage_span_checkpoint_id")),
    )
    op.create_index("ix_storage_span_run", "storage_span", ["run_id", "until"], unique=False)
    for column in ("run_id", "until"):
        op.create_index(
            f"ix_storage_span_open_{column.removesuffix('_id')}",
            "storage_span",
            [column],
            unique=False,
            sqlite_where=sa.text("NOT metered"),
            postgresql_where=sa.text("NOT metered"),
        )
    op.create_table(
        "storage_usage",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=True),
        sa.Column("api_key_id", sa.BigInteger(), nullable=True),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("batch", sa.String(length=128), nullable=True),
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("byte_seconds", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_storage_usage")),
        sa.UniqueConstraint("hour", "run_id", "kind", name=op.f("uq_storage_usage_hour_run_id_kind")),
    )
    op.create_index("ix_storage_usage_account_hour", "storage_usage", ["account_id", "hour"], unique=False)
    op.create_index("ix_storage_usage_run", "storage_usage", ["run_id"], unique=False)
    op.create_table(
        "usage_rollup",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("api_key_id", sa.BigInteger(), nullable=False),
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("batch", sa.String(length=128), nullable=False),
        sa.Column("run_id", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("device", sa.String(length=128), nullable=False),
        sa.Column("operations", sa.BigInteger(), nullable=False),
        sa.Column("device_ns", sa.BigInteger(), nullable=False),
        sa.Column("tokens_trained", sa.BigInteger(), nullable=False),
        sa.Column("tokens_prefilled", sa.BigInteger(), nullable=False),
        sa.Column("tokens_cached", sa.BigInteger(), nullable=False),
        sa.Column("tokens_sampled", sa.BigInteger(), nullable=False),
        sa.Column("charge", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_rollup")),
        sa.UniqueConstraint(
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
    )
    op.create_index("ix_usage_rollup_run", "usage_rollup", ["run_id"], unique=False)
    op.create_table(
        "budget",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("scope_id", sa.String(length=128), nullable=False),
        sa.Column("period", sa.String(length=8), nullable=False),
        sa.Column("cap", sa.BigInteger(), nullable=False),
        sa.Column("is_hard", sa.Boolean(), nullable=False),
        sa.Column("thresholds", _JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("removed_at", sa.BigInteger(), nullable=True),
        sa.Column("period_start", sa.BigInteger(), nullable=False),
        sa.Column("spent", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("held", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("told_percent", sa.Integer(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_budget_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budget")),
    )
    op.create_index("ix_budget_account", "budget", ["account_id", "removed_at"], unique=False)
    op.create_index(
        "ix_budget_exhausted",
        "budget",
        ["id"],
        unique=False,
        sqlite_where=sa.text("removed_at IS NULL AND is_hard AND spent >= cap"),
        postgresql_where=sa.text("removed_at IS NULL AND is_hard AND spent >= cap"),
    )
    op.create_table(
        "invoice",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("period_start", sa.BigInteger(), nullable=False),
        sa.Column("period_end", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("corrects_id", sa.BigInteger(), nullable=True),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_invoice_account_id")),
        sa.ForeignKeyConstraint(["corrects_id"], ["invoice.id"], name=op.f("fk_invoice_corrects_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invoice")),
        sa.UniqueConstraint("number", name=op.f("uq_invoice_number")),
    )
    op.create_index("ix_invoice_account_period", "invoice", ["account_id", "period_end"], unique=False)
    op.create_table(
        "rate_card",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=True),
        sa.Column("effective_at", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_rate_card_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rate_card")),
    )
    op.create_index("ix_rate_card_account_effective", "rate_card", ["account_id", "effective_at"], unique=False)
    op.create_table(
        "webhook",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("events", _JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("removed_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_webhook_account_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook")),
    )
    op.create_table(
        "ledger_entry",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("source", sa.String(length=192), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("operation_id", sa.BigInteger(), nullable=True),
        sa.Column("storage_usage_id", sa.BigInteger(), nullable=True),
        sa.Column("rate_card_id", sa.BigInteger(), nullable=True),
        sa.Column("corrects_id", sa.BigInteger(), nullable=True),
        sa.Column("project_id", sa.String(length=64), nullable=True),
        sa.Column("api_key_id", sa.BigInteger(), nullable=True),
        sa.Column("session_id", sa.String(length=64), nullable=True),
        sa.Column("batch", sa.String(length=128), nullable=True),
        sa.Column("run_id", sa.String(length=128), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("invoice_id", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_ledger_entry_account_id")),
        sa.ForeignKeyConstraint(["corrects_id"], ["ledger_entry.id"], name=op.f("fk_ledger_entry_corrects_id")),
        sa.ForeignKeyConstraint(
            ["invoice_id"],
            ["invoice.id"],
            name=op.f("fk_ledger_entry_invoice_id"),
            deferrable=True,
            initially="DEFERRED",
        ),
        sa.ForeignKeyConstraint(["rate_card_id"], ["rate_card.id"], name=op.f("fk_ledger_entry_rate_card_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_entry")),
        sa.UniqueConstraint("operation_id", name=op.f("uq_ledger_entry_operation_id")),
        sa.UniqueConstraint("source", name=op.f("uq_ledger_entry_source")),
        sa.UniqueConstraint("storage_usage_id", name=op.f("uq_ledger_entry_storage_usage_id")),
    )
    op.create_index("ix_ledger_entry_account_created", "ledger_entry", ["account_id", "created_at"], unique=False)
    op.create_index(
        "ix_ledger_entry_corrects",
        "ledger_entry",
        ["corrects_id"],
        unique=False,
        sqlite_where=sa.text("corrects_id IS NOT NULL"),
        postgresql_where=sa.text("corrects_id IS NOT NULL"),
    )
    op.create_index("ix_ledger_entry_invoice", "ledger_entry", ["invoice_id"], unique=False)
    op.create_index(
        "ix_ledger_entry_open",
        "ledger_entry",
        ["account_id", "created_at"],
        unique=False,
        sqlite_where=sa.text("invoice_id IS NULL"),
        postgresql_where=sa.text("invoice_id IS NULL"),
    )
    op.create_index("ix_ledger_entry_run", "ledger_entry", ["run_id"], unique=False)
    op.create_table(
        "quote",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.String(length=256), nullable=False),
        sa.Column("device", sa.String(length=128), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("device_ns", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("rate_card_id", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_quote_account_id")),
        sa.ForeignKeyConstraint(["rate_card_id"], ["rate_card.id"], name=op.f("fk_quote_rate_card_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quote")),
    )
    op.create_index("ix_quote_account_created", "quote", ["account_id", "created_at"], unique=False)
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("webhook_id", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.String(length=192), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("content_type", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("next_at", sa.BigInteger(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("delivered_at", sa.BigInteger(), nullable=True),
        sa.Column("given_up_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhook.id"], name=op.f("fk_webhook_delivery_webhook_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_delivery")),
        sa.UniqueConstraint("webhook_id", "event_id", name=op.f("uq_webhook_delivery_webhook_id_event_id")),
    )
    op.create_index(
        "ix_webhook_delivery_waiting",
        "webhook_delivery",
        ["webhook_id", "next_at"],
        unique=False,
        sqlite_where=sa.text("delivered_at IS NULL AND given_up_at IS NULL"),
        postgresql_where=sa.text("delivered_at IS NULL AND given_up_at IS NULL"),
    )
    op.create_table(
        "budget_hold",
        sa.Column("operation_id", sa.BigInteger(), nullable=False),
        sa.Column("budget_id", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["budget_id"], ["budget.id"], name=op.f("fk_budget_hold_budget_id")),
        sa.ForeignKeyConstraint(["operation_id"], ["operation.id"], name=op.f("fk_budget_hold_operation_id")),
        sa.PrimaryKeyConstraint("operation_id", "budget_id", name=op.f("pk_budget_hold")),
    )
    op.create_index("ix_budget_hold_budget", "budget_hold", ["budget_id"], unique=False)
    op.add_column("run", sa.Column("budget_refused_seq", sa.BigInteger(), nullable=True))
    op.add_column("run", sa.Column("budget_refused_at", sa.BigInteger(), nullable=True))
    op.add_column("session", sa.Column("batch", sa.String(length=128), nullable=True))
    op.add_column("usage_record", sa.Column("project_id", sa.String(length=64), nullable=True))
    op.add_column("usage_record", sa.Column("api_key_id", sa.BigInteger(), nullable=True))
    op.add_column("usage_record", sa.Column("batch", sa.String(length=128), nullable=True))
    for name in ("rolled_up", "announced"):
        op.add_column("usage_record", sa.Column(name, sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index(
        "ix_usage_record_open_account",
        "usage_record",
        ["account_id", "finished_at"],
        unique=False,
        sqlite_where=sa.text("NOT rolled_up"),
        postgresql_where=sa.text("NOT rolled_up"),
    )
    op.create_index(
        "ix_usage_record_open_run",
        "usage_record",
        ["run_id"],
        unique=False,
        sqlite_where=sa.text("NOT rolled_up"),
        postgresql_where=sa.text("NOT rolled_up"),
    )
    op.create_index(
        "ix_usage_record_open_worker",
        "usage_record",
        ["worker_id"],
        unique=False,
        sqlite_where=sa.text("NOT rolled_up"),
        postgresql_where=sa.text("NOT rolled_up"),
    )
    op.add_column("worker", sa.Column("work_number", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("worker", sa.Column("under_way_ns", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("worker", sa.Column("rolled_up_ns", sa.BigInteger(), server_default="0", nullable=False))
    sqlite = op.get_bind().dialect.name == "sqlite"
    op.execute(_open_spans(sqlite=sqlite))
    for table, changed in GUARDS.items():
        for statement in _sqlite_guards(table, changed) if sqlite else _postgres_guards(table, changed):
            op.execute(statement)


def _open_spans(*, sqlite: bool) -> str:
    """Storage counts from now on: nobody was told before that it would be charged."""
    now_s = "strftime('%s', 'now')" if sqlite else "floor(extract(epoch FROM clock_timestamp()))"
    kept = (
        "INSERT INTO storage_span (checkpoint_id, account_id, run_id, size_bytes, since, until) "
        "SELECT id, account_id, run_id, size_bytes, :now, expires_at FROM checkpoint "
        "WHERE expires_at IS NULL OR expires_at > :now"
    )
    return kept.replace(":now", f"CAST({now_s} AS BIGINT) * 1000000")


def _sqlite_guards(table: str, changed: str) -> tuple[str, ...]:
    refuse = f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
    return (
        f"CREATE TRIGGER {table}_not_edited BEFORE UPDATE ON {table} WHEN {changed} {refuse}",
        f"CREATE TRIGGER {table}_not_deleted BEFORE DELETE ON {table} {refuse}",
    )


def _postgres_guards(table: str, changed: str) -> tuple[str, ...]:
    call = f"EXECUTE FUNCTION {table}_refuse()"
    return (
        f"CREATE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$",
        f"CREATE TRIGGER {table}_not_edited BEFORE UPDATE ON {table} FOR EACH ROW WHEN ({changed}) {call}",
        f"CREATE TRIGGER {table}_not_deleted BEFORE DELETE ON {table} FOR EACH ROW {call}",
    )


def downgrade() -> None:
    """Undo."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    for table in NEW_TABLES:
        op.drop_table(table)
        if table in GUARDS and not sqlite:
            op.execute(f"DROP FUNCTION {table}_refuse()")
    for name in ("account", "run", "worker"):
        op.drop_index(f"ix_usage_record_open_{name}", "usage_record")
    for table, columns in NEW_COLUMNS.items():
        for column in columns:
            op.drop_column(table, column)
