"""Device time is reconciled since the record before, and a credit note is made once for a reference."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

INDEX = "ix_invoice_corrects_reference"


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
    op.add_column("reconciliation", sa.Column("worst_worker", sa.String(length=128)))
    op.add_column("invoice", sa.Column("reference", sa.String(length=128)))
    op.create_index(INDEX, "invoice", ["corrects_id", "reference"], unique=True)


def downgrade() -> None:
    """Undo."""
    op.drop_index(INDEX, "invoice")
    op.drop_column("invoice", "reference")
    op.drop_column("reconciliation", "worst_worker")
    op.drop_table("reconciled_worker")
