"""What an account keeps in checkpoints at the moment, by project, and what a month of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import Connection, func, or_, select

from billing import rate_cards, rating
from billing.rate_card_file import RateCard
from storage import tables

STORAGE_KIND = "checkpoint"
SECONDS_PER_MONTH = 720 * 3600


@dataclass(frozen=True)
class KeptCheckpoints:
    """Checkpoints of one project; None is for those of sessions without one."""

    project_id: str | None
    num_checkpoints: int
    size_bytes: int

    def month_cost(self, card: RateCard) -> Decimal:
        """What keeping them for 720 hours costs."""
        return rating.storage_charge(STORAGE_KIND, self.size_bytes * SECONDS_PER_MONTH, card)


def list_kept(
    tx: Connection, account_id: str, *, now: datetime, project_id: str | None = None
) -> Sequence[KeptCheckpoints]:
    """What is kept and has not expired, by the projects that its sessions are in now."""
    kept, run, session = tables.checkpoint.c, tables.run.c, tables.session.c
    query = (
        select(session.project_id, func.count(), func.sum(kept.size_bytes))
        .join_from(tables.checkpoint, tables.run, run.id == kept.run_id)
        .join(tables.session, session.id == run.session_id)
        .where(kept.account_id == account_id, or_(kept.expires_at.is_(None), kept.expires_at > now))
        .group_by(session.project_id)
        .order_by(session.project_id)
    )
    if project_id is not None:
        query = query.where(session.project_id == project_id)
    return [KeptCheckpoints(project, number, int(size)) for project, number, size in tx.execute(query)]


def card_now(tx: Connection, account_id: str, *, now: datetime) -> RateCard:
    """The prices that count for the account now."""
    return rate_cards.in_force(tx, account_id, at=now).card
