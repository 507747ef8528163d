"""An index for estimates of device time; and state storage counts from the upgrade on, as checkpoints do."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INDEX = "ix_usage_record_account_kind"
HOUR_US = 3_600_000_000


def upgrade() -> None:
    """Apply; hours before this one count as metered where snapshots are older than the bill."""
    op.create_index(INDEX, "usage_record", ["account_id", "kind", "base_model", "finished_at"])
    sqlite = op.get_bind().dialect.name == "sqlite"
    now_s = "strftime('%s', 'now')" if sqlite else "floor(extract(epoch FROM clock_timestamp()))"
    this_hour = f"(CAST({now_s} AS BIGINT) * 1000000 / {HOUR_US} * {HOUR_US})"
    metered = (
        "INSERT INTO storage_hour (hour) SELECT :this_hour - :an_hour "
        "WHERE EXISTS (SELECT 1 FROM snapshot) AND NOT EXISTS (SELECT 1 FROM storage_hour) "
        "AND NOT EXISTS (SELECT 1 FROM storage_span WHERE since < :this_hour)"
    )
    op.execute(metered.replace(":this_hour", this_hour).replace(":an_hour", str(HOUR_US)))


def downgrade() -> None:
    """Undo; what was metered stays."""
    op.drop_index(INDEX, "usage_record")
