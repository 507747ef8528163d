"""Device time is reconciled since the record before; a credit note is made once for a reference; budgets that cover
something are found without the others.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

REFERENCES, COVERING, BEFORE = "ix_invoice_corrects_reference", "ix_budget_covering", "ix_budget_account"
LIVE = sa.text("removed_at IS NULL")


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "reconciled_worker",
        sa.Column("worker_id", sa.String(length=128), nullable=False),
        sa.Column("busy_ns", sa.BigInteger(), nullable=False),
        sa.Column("billed_ns", sa.BigInteger(), nullable=False),
        sa.Column("overhead_ns", sa.BigInteger(), nullable=False),
        sa.Column("under_way_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_reconciled_worker")),
    )
    op.create_table(
        "drift_alarm",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("reconciliation_id", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.String(length=128)),
        sa.Column("busy_ns", sa.BigInteger(), nullable=False),
        sa.Column("drift_ns", sa.BigInteger(), nullable=False),
        sa.Column("drift_ppm", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["reconciliation_id"], ["reconciliation.id"], name=op.f("fk_drift_alarm_reconciliation_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_drift_alarm")),
    )
    op.add_column("invoice", sa.Column("reference", sa.String(length=128)))
    op.add_column("invoice", sa.Column("asked_for", sa.Text()))
    op.create_index(REFERENCES, "invoice", ["corrects_id", "reference"], unique=True)
    op.create_index(COVERING, "budget", ["account_id", "scope", "scope_id"], sqlite_where=LIVE, postgresql_where=LIVE)
    op.drop_index(BEFORE, "budget")


def downgrade() -> None:
    """Undo."""
    op.create_index(BEFORE, "budget", ["account_id", "removed_at"])
    op.drop_index(COVERING, "budget")
    op.drop_index(REFERENCES, "invoice")
    op.drop_column("invoice", "asked_for")
    op.drop_column("invoice", "reference")
    op.drop_table("drift_alarm")
    op.drop_table("reconciled_worker")
