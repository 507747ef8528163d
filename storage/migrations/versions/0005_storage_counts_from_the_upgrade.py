"""State storage counts from the upgrade on, as checkpoints do: no hour before it is metered.

Only where there were snapshots before the bill, and nothing has been metered since.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

HOUR_US = 3_600_000_000


def upgrade() -> None:
    """Count the hours before this one as metered."""
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
    """Nothing to undo: what was metered stays."""
