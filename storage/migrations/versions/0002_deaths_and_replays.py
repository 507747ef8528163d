"""What a worker's death is held against, what replays have shown, checksums of objects, and what waits, by account."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("operation", sa.Column("suspect", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("operation", sa.Column("alone", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("operation", sa.Column("blame", sa.Integer(), nullable=False, server_default="0"))
    is_open = sa.text("finished_at IS NULL AND payload_bytes >= 0")
    op.create_index(
        "ix_operation_open",
        "operation",
        ["finished_at", "account_id", "payload_bytes"],
        sqlite_where=is_open,
        postgresql_where=is_open,
    )
    is_suspect = sa.text("suspect AND sampling_session_id IS NOT NULL AND finished_at IS NULL")
    op.create_index(
        "ix_operation_suspect_samples",
        "operation",
        ["status", "id"],
        sqlite_where=is_suspect,
        postgresql_where=is_suspect,
    )
    op.add_column("stored_object", sa.Column("sha256", sa.String(length=64)))
    op.add_column("worker", sa.Column("ended_by", sa.String(length=16)))
    op.add_column("worker", sa.Column("num_replayed", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("worker", sa.Column("num_replay_mismatches", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("worker", sa.Column("tail_p95_ns", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("worker", sa.Column("num_damaged_snapshots", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Undo."""
    for column in ("num_damaged_snapshots", "tail_p95_ns", "num_replay_mismatches", "num_replayed", "ended_by"):
        op.drop_column("worker", column)
    op.drop_index("ix_operation_suspect_samples", "operation")
    op.drop_index("ix_operation_open", "operation")
    op.drop_column("stored_object", "sha256")
    for column in ("blame", "alone", "suspect"):
        op.drop_column("operation", column)
