"""Deliveries to webhooks are found by their age, so that forgetting old ones reads no others."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INDEX, TABLE = "ix_webhook_delivery_created", "webhook_delivery"


def upgrade() -> None:
    """Apply."""
    op.create_index(INDEX, TABLE, ["created_at"])


def downgrade() -> None:
    """Undo."""
    op.drop_index(INDEX, TABLE)
