"""Rate cards in the database: which prices hold from when, and for whom. A card is added, never changed.

The card in force for an account at a moment is, of its own cards that hold by then, the one that began last (of equals
the one added last); if it has none, of the general ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select

from billing import rate_card_file
from billing.rate_card_file import RateCard, RateCardError
from billing.settings import BillingSettings
from storage import billing_tables

DEFAULT_CARD = Path(__file__).parent / "default_rate_card.toml"
ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
LEAD_S = 15.0
"""A card begins no sooner: what is being priced while it is added is done by then, so no price changes afterwards.

It is more than a transaction may stand still for (`storage.database.POSTGRES_IDLE_S`), also that which adds the card.
"""

_table = billing_tables.rate_card


@dataclass(frozen=True)
class DatedCard:
    """A card and when it holds.

    Attributes:
        id: its version.
        account_id: whose it is; None is for all that have none of their own.
        effective_at: from when on it holds.
        content: the TOML text that it was given as.
    """

    id: int
    account_id: str | None
    effective_at: datetime
    content: str
    created_at: datetime

    @property
    def card(self) -> RateCard:
        """The prices."""
        return rate_card_file.parse(self.content, f"rate card {self.id}")


def add(
    tx: Connection,
    content: str,
    *,
    now: datetime,
    effective_at: datetime | None = None,
    account_id: str | None = None,
    name: str = "rate card",
    lead_s: float = LEAD_S,
) -> DatedCard:
    """Add a card.

    Args:
        effective_at: None is as soon as possible.
        name: of the file, for messages.

    Raises:
        RateCardError: it holds what is not a price, begins in the past, or is in another currency.
    """
    card = rate_card_file.parse(content, name)
    soonest = now + timedelta(seconds=lead_s)
    effective_at = soonest if effective_at is None else effective_at
    if effective_at < soonest:
        raise RateCardError(
            f"{name}: a card cannot begin at {effective_at:%Y-%m-%d %H:%M:%S %Z}: what is priced stays as it is; "
            f"the soonest is {lead_s:g} s from now"
        )
    install_first(tx, now=now)
    if card.currency != currency(tx):
        raise RateCardError(
            f"{name}: currency: this deployment bills in {currency(tx)}, the card is in {card.currency}"
        )
    return _insert(tx, content, account_id=account_id, effective_at=effective_at, now=now)


def in_force(tx: Connection, account_id: str | None, *, at: datetime) -> DatedCard:
    """The card by which usage of this moment is priced; the first one is that of the settings.

    Args:
        account_id: None looks at the general cards alone.
    """
    own = None if account_id is None else _newest(tx, _table.c.account_id == account_id, at)
    return own or _newest(tx, _table.c.account_id.is_(None), at) or install_first(tx, now=at)


def currency(tx: Connection) -> str:
    """What this deployment bills in."""
    first = tx.execute(select(_table.c.currency).order_by(_table.c.id).limit(1)).scalar_one_or_none()
    return first or rate_card_file.parse(read_card()).currency


def list_cards(tx: Connection) -> Sequence[DatedCard]:
    """All cards, newest first."""
    return [DatedCard(**row._mapping) for row in tx.execute(_cards().order_by(_table.c.id.desc()))]


def install_first(tx: Connection, *, now: datetime, settings: BillingSettings | None = None) -> DatedCard:
    """Add the card of the settings, or the one that ships with piecework, unless there is a general one.

    Raises:
        RateCardError: the file is missing or holds what is not a price.
    """
    there = _newest(tx, _table.c.account_id.is_(None), now)
    if there is not None:
        return there
    content = read_card(settings)
    return _insert(tx, content, account_id=None, effective_at=ALWAYS, now=now)


def install_from_settings(tx: Connection, *, now: datetime, settings: BillingSettings | None = None) -> None:
    """Add the card of the settings if it has never been added; it holds from now on, or always if it is the first.

    Raises:
        RateCardError: the file is missing, holds what is not a price, or is in another currency than the first card.
    """
    settings = settings or BillingSettings()
    install_first(tx, now=now, settings=settings)
    if settings.rate_card is None:
        return
    content = read_card(settings)
    general = select(_table.c.id).where(_table.c.account_id.is_(None), _table.c.sha256 == _digest(content))
    if tx.execute(general.limit(1)).first() is None:
        add(tx, content, now=now, name=str(settings.rate_card))


def read_card(settings: BillingSettings | None = None) -> str:
    """The text of the settings' card, checked.

    Raises:
        RateCardError: the file is missing or holds what is not a price.
    """
    path = (settings or BillingSettings()).rate_card or DEFAULT_CARD
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RateCardError(f"{path}: cannot be read ({error}); correct PIECEWORK_RATE_CARD") from error
    rate_card_file.parse(content, str(path))
    return content


def _insert(
    tx: Connection, content: str, *, account_id: str | None, effective_at: datetime, now: datetime
) -> DatedCard:
    values = {"account_id": account_id, "effective_at": effective_at, "content": content, "created_at": now}
    facts = {
        "currency": rate_card_file.parse(content).currency,
        "sha256": _digest(content),
    }
    card_id = tx.execute(insert(_table).values(**values, **facts).returning(_table.c.id)).scalar_one()
    return DatedCard(card_id, account_id, effective_at, content, now)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _newest(tx: Connection, whose: ColumnElement[bool], at: datetime) -> DatedCard | None:
    query = _cards().where(whose, _table.c.effective_at <= at)
    row = tx.execute(query.order_by(_table.c.effective_at.desc(), _table.c.id.desc()).limit(1)).one_or_none()
    return None if row is None else DatedCard(**row._mapping)


def _cards() -> Any:
    return select(_table.c.id, _table.c.account_id, _table.c.effective_at, _table.c.content, _table.c.created_at)
