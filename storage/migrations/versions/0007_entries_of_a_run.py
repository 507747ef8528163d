"""A run's entries of the ledger are found in the order of their times, so that a page of them reads no others."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

BEFORE, INDEX, TABLE = "ix_ledger_entry_run", "ix_ledger_entry_run_created", "ledger_entry"


def upgrade() -> None:
    """Apply."""
    op.create_index(INDEX, TABLE, ["run_id", "created_at"])
    op.drop_index(BEFORE, TABLE)


def downgrade() -> None:
    """Undo."""
    op.create_index(BEFORE, TABLE, ["run_id"])
    op.drop_index(INDEX, TABLE)
