"""Budgets keep when they last had no room for something."""

import sqlalchemy as sa
from alembic import op

from storage.tables import Timestamp

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("budget", sa.Column("refused_at", Timestamp()))


def downgrade() -> None:
    """Undo."""
    op.drop_column("budget", "refused_at")
