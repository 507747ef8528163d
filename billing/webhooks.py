"""Webhooks: who is told of which events, and what of that is still to be delivered.

An event is announced in the transaction that makes it so: a delivery is a row, and whoever sends it claims it first.
What always holds: of an event a webhook has one delivery, however often it is announced; an attempt is claimed once;
secrets are in the rows alone, as signing needs them, and in no log, listing or error.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, Row, delete, func, insert, or_, select, update

from storage import billing_tables, rows
from storage.database import Database
from storage.errors import RowNotFoundError

SECRET_PREFIX = "whsec_"  # noqa: S105 (what secrets begin with)
URL_CHARACTERS_MAX = 2_000
ERROR_CHARACTERS_MAX = 300
LABEL_CHARACTERS_MAX = 63
"""Of a part of a host's name: RFC 1035, section 2.3.4."""

ATTEMPTS_MAX = 12
FIRST_RETRY_S = 5.0
RETRY_FACTOR = 4.0
RETRY_MAX_S = 6 * 3600.0
CLAIM_S = 120.0
"""A claimed attempt is nobody else's for so long: several times what sending may take."""
REMOVED = "the webhook was removed"
KEPT = timedelta(days=30)
"""Deliveries that are done are kept for so long, to be looked at."""

_table = billing_tables.webhook
_delivery = billing_tables.webhook_delivery


class Kind(StrEnum):
    """What a webhook may be told of."""

    BUDGET = "budget"
    USAGE = "usage"
    TEST = "test"


class WebhookError(ValueError):
    """A webhook cannot be added as asked; the message says what to change."""


@dataclass(frozen=True)
class Webhook:
    """A receiver of events.

    Attributes:
        account_id: whose events it is told of; None is every account's.
        events: kinds of them.
    """

    id: int
    account_id: str | None
    url: str
    events: Sequence[str]
    created_at: datetime


@dataclass(frozen=True)
class Attempt:
    """A delivery that has been claimed for one attempt.

    Attributes:
        number: 1 is the first.
        at: when it was claimed.
    """

    id: int
    number: int
    at: datetime
    url: str
    secret: str = field(repr=False)
    body: str = field(repr=False)
    content_type: str


@dataclass(frozen=True)
class Delivery:
    """How far an event has got to a webhook.

    Attributes:
        next_at: when it is tried again, if it is waiting.
    """

    id: int
    webhook_id: int
    event_id: str
    attempts: int
    created_at: datetime
    next_at: datetime
    last_error: str | None
    delivered_at: datetime | None
    given_up_at: datetime | None

    @property
    def state(self) -> str:
        """`delivered`, `given up` or `waiting`."""
        return "delivered" if self.delivered_at else "given up" if self.given_up_at else "waiting"


# ------------------------------------------------------------------------------------------------------- webhooks


def add(
    tx: Connection, account_id: str | None, url: str, events: Iterable[str], *, now: datetime
) -> tuple[Webhook, str]:
    """Add a webhook.

    Returns:
        It, and its secret, which is shown now and never again.

    Raises:
        WebhookError: the URL is none that can be told anything, or no kind of event is named.
    """
    kinds = sorted({str(Kind(event)) for event in events})
    if not kinds:
        raise WebhookError("name at least one kind of event")
    check_url(url)
    secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
    values: dict[str, Any] = {"account_id": account_id, "url": url, "events": kinds, "created_at": now}
    added = insert(_table).values(**values, secret=secret).returning(_table.c.id)
    return Webhook(id=tx.execute(added).scalar_one(), **values), secret


def check_url(url: str) -> None:
    """Refuse what cannot be posted to, and what would show a password in listings.

    Raises:
        WebhookError: says what to change.
    """
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError as error:
        raise WebhookError(f"the URL cannot be read: {error}") from error
    if parts.scheme not in ("https", "http") or not parts.hostname or not port_is_right:
        raise WebhookError("the URL must be https://host/path, or http://host/path")
    if not all(0 < len(label) <= LABEL_CHARACTERS_MAX for label in parts.hostname.removesuffix(".").split(".")):
        raise WebhookError(f"the URL's host must have 1 to {LABEL_CHARACTERS_MAX} characters between its dots")
    if parts.username is not None or parts.password is not None:
        raise WebhookError("the URL must have no user and password: receivers verify the signature instead")
    if len(url) > URL_CHARACTERS_MAX or any(character.isspace() for character in url):
        raise WebhookError(f"the URL must have no spaces and at most {URL_CHARACTERS_MAX} characters")


def get(tx: Connection, webhook_id: int) -> Webhook:
    """A webhook that has not been removed.

    Raises:
        RowNotFoundError: there is none.
    """
    row = tx.execute(_live().where(_table.c.id == webhook_id)).one_or_none()
    if row is None:
        raise RowNotFoundError("webhook", str(webhook_id))
    return Webhook(**row._mapping)


def list_webhooks(tx: Connection, *, account_id: str | None = None) -> Sequence[Webhook]:
    """Webhooks, oldest first: all, or those that are told of an account's events."""
    query = _live() if account_id is None else _live().where(_of(account_id))
    return [Webhook(**row._mapping) for row in tx.execute(query)]


def remove(tx: Connection, webhook_id: int, *, now: datetime) -> None:
    """End a webhook; what it has not been told of yet is given up.

    Raises:
        RowNotFoundError: there is none.
    """
    get(tx, webhook_id)
    tx.execute(update(_table).where(_table.c.id == webhook_id).values(removed_at=now))
    waiting = update(_delivery).where(_delivery.c.webhook_id == webhook_id, *_waiting())
    tx.execute(waiting.values(given_up_at=now, last_error=REMOVED))


# --------------------------------------------------------------------------------------------------------- events


def announce(
    tx: Connection, *, account_id: str, kind: str, event_id: str, body: str, content_type: str, now: datetime
) -> int:
    """Have every webhook that is told of such events of the account told of this one.

    Returns:
        How many are told; none of those that have been told of an event of this id.
    """
    told = [webhook for webhook in list_webhooks(tx, account_id=account_id) if kind in webhook.events]
    return sum(announce_to(tx, webhook.id, event_id, body, content_type, now=now) for webhook in told)


def announce_to(tx: Connection, webhook_id: int, event_id: str, body: str, content_type: str, *, now: datetime) -> bool:
    """Have one webhook told of an event; returns whether it is new to it."""
    values = {"webhook_id": webhook_id, "event_id": event_id, "body": body, "content_type": content_type}
    return rows.insert_if_absent(tx, _delivery, **values, created_at=now, next_at=now)


def wants(tx: Connection, kind: str) -> bool:
    """Whether any webhook is told of such events."""
    return any(kind in webhook.events for webhook in list_webhooks(tx))


def list_deliveries(tx: Connection, *, webhook_id: int | None = None, limit: int) -> Sequence[Delivery]:
    """Deliveries, newest first."""
    query = select(*(_delivery.c[name] for name in Delivery.__dataclass_fields__)).order_by(_delivery.c.id.desc())
    query = query if webhook_id is None else query.where(_delivery.c.webhook_id == webhook_id)
    return [Delivery(**row._mapping) for row in tx.execute(query.limit(limit))]


# -------------------------------------------------------------------------------------------------------- attempts


def due_webhooks(tx: Connection, *, now: datetime) -> Sequence[int]:
    """Webhooks that are to be told of something now."""
    query = select(_delivery.c.webhook_id).where(_delivery.c.next_at <= now, *_waiting()).distinct()
    return sorted(tx.execute(query).scalars())


def claim(
    tx: Connection, database: Database, webhook_id: int, *, limit: int, now: datetime, event_id: str | None = None
) -> Sequence[Attempt]:
    """Claim what a webhook is to be told of now, oldest first; committed before anything is sent.

    An attempt whose process dies counts as failed after `CLAIM_S`; if it was the last one, it is given up here. So is
    what was announced while the webhook was being removed.

    Args:
        event_id: only what tells of this event.
    """
    due = select(_delivery).where(_delivery.c.webhook_id == webhook_id, _delivery.c.next_at <= now, *_waiting())
    if event_id is not None:
        due = due.where(_delivery.c.event_id == event_id)
    query = database.for_update(due.order_by(_delivery.c.next_at, _delivery.c.id).limit(limit), skip_locked=True)
    found = tx.execute(query).all()
    if not found:
        return []
    receiver = tx.execute(select(_table).where(_table.c.id == webhook_id)).one()
    if receiver.removed_at is not None:
        _give_up(tx, found, REMOVED, now)
        return []
    _give_up(tx, [row for row in found if row.attempts >= ATTEMPTS_MAX], "the last attempt has not ended", now)
    left = [row for row in found if row.attempts < ATTEMPTS_MAX]
    claimed = update(_delivery).where(_delivery.c.id.in_([row.id for row in left]))
    tx.execute(claimed.values(attempts=_delivery.c.attempts + 1, next_at=now + timedelta(seconds=CLAIM_S)))
    return [
        Attempt(row.id, row.attempts + 1, now, receiver.url, receiver.secret, row.body, row.content_type)
        for row in left
    ]


def note(tx: Connection, attempt: Attempt, error: str | None, *, now: datetime, jitter: float) -> bool:
    """Write down what came of an attempt: delivered, to be tried again, or given up.

    Args:
        error: why it failed; None if it did not.
        jitter: from 0 to 1; spreads retries, so that receivers are not asked by all at once.

    Returns:
        Whether it counted: not if another attempt was claimed meanwhile.
    """
    this = update(_delivery).where(_delivery.c.id == attempt.id, _delivery.c.attempts == attempt.number, *_waiting())
    values: dict[str, Any] = {"last_error": None if error is None else error[:ERROR_CHARACTERS_MAX]}
    if error is None:
        values["delivered_at"] = now
    elif attempt.number >= ATTEMPTS_MAX:
        values["given_up_at"] = now
    else:
        values["next_at"] = now + timedelta(seconds=retry_after_s(attempt.number, jitter))
    return tx.execute(this.values(**values)).rowcount == 1


def retry_after_s(failed: int, jitter: float) -> float:
    """Seconds until the next attempt: four times as long after each, up to six hours, give or take a half.

    Args:
        failed: attempts that have failed, 1 or more.
        jitter: from 0 to 1.
    """
    longest = min(RETRY_MAX_S, FIRST_RETRY_S * RETRY_FACTOR ** (failed - 1))
    return longest * (0.5 + jitter)


def forget_old(tx: Connection, *, now: datetime, limit: int) -> int:
    """Delete deliveries that have been done for long; returns how many."""
    ended = func.coalesce(_delivery.c.delivered_at, _delivery.c.given_up_at)
    old = select(_delivery.c.id).where(_delivery.c.created_at < now - KEPT, ended.is_not(None)).limit(limit)
    return len(tx.execute(delete(_delivery).where(_delivery.c.id.in_(old)).returning(_delivery.c.id)).all())


def signed_headers(attempt: Attempt) -> dict[str, str]:
    """Who a message is, when it was sent, and the proof that it is ours.

    Source: Standard Webhooks, standard-webhooks/standard-webhooks: spec/standard-webhooks.md.
    """
    message_id, timestamp = f"msg_{attempt.id}", str(int(attempt.at.timestamp()))
    key = base64.b64decode(attempt.secret.removeprefix(SECRET_PREFIX))
    signed = f"{message_id}.{timestamp}.{attempt.body}".encode()
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
        "content-type": attempt.content_type,
    }


def _give_up(tx: Connection, deliveries: Sequence[Row[Any]], why: str, now: datetime) -> None:
    these = update(_delivery).where(_delivery.c.id.in_([row.id for row in deliveries]))
    tx.execute(these.values(given_up_at=now, last_error=why))


def _waiting() -> tuple[Any, Any]:
    return _delivery.c.delivered_at.is_(None), _delivery.c.given_up_at.is_(None)


def _of(account_id: str) -> Any:
    return or_(_table.c.account_id == account_id, _table.c.account_id.is_(None))


def _live() -> Any:
    columns = [_table.c[name] for name in Webhook.__dataclass_fields__]
    return select(*columns).where(_table.c.removed_at.is_(None)).order_by(_table.c.id)
