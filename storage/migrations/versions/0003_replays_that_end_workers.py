"""Which run a worker is replaying, and what deaths during replays are held against."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    with op.batch_alter_table("run") as table:
        table.add_column(sa.Column("replayed_by", sa.String(length=128)))
        table.add_column(sa.Column("replays_alone", sa.Boolean(), nullable=False, server_default=sa.text("false")))
        table.add_column(sa.Column("replay_blame", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Undo."""
    with op.batch_alter_table("run") as table:
        for column in ("replay_blame", "replays_alone", "replayed_by"):
            table.drop_column(column)
