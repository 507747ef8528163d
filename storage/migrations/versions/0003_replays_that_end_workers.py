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
    op.add_column("run", sa.Column("replayed_by", sa.String(length=128)))
    op.add_column("run", sa.Column("replays_alone", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("run", sa.Column("replay_blame", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Undo."""
    for column in ("replay_blame", "replays_alone", "replayed_by"):
        op.drop_column("run", column)
