"""Usage and checkpoint storage as the SDK's `tinker billing` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection

from api.dependencies import CurrentKey, Joined
from api.errors import BadRequestError
from api.parameters import Moment
from billing import checkpoint_storage, rate_cards, usage_events
from billing.rating import gigabyte_hours
from billing.usage_events import EventKind, UsageEvent
from billing.usage_totals import HOUR, hour_of
from storage import accounts, runs
from storage.runs import Session

router = APIRouter(prefix="/api/v1/billing/usage")

WINDOW_MAX = timedelta(days=14)
BYTES_PER_GIGABYTE = 10**9


@router.get("/events")
def list_usage_events(services: Joined, key: CurrentKey, starting_on: Moment, ending_before: Moment) -> dict[str, Any]:
    """The account's usage of whole hours, with costs in US dollars if that is what the deployment bills in."""
    with services.database.read() as tx:
        _check_window(starting_on, ending_before, now=services.database.now(tx))
        events = usage_events.list_events(
            tx, key.account_id, since=starting_on.astimezone(UTC), until=ending_before.astimezone(UTC)
        )
        return _usage(tx, key.account_id, events)


@router.get("/checkpoints/current")
def get_checkpoint_storage(
    services: Joined, key: CurrentKey, project_id: Annotated[str | None, Query(max_length=64)] = None
) -> dict[str, Any]:
    """What the account keeps in checkpoints, by project, and what 720 hours of it cost at today's price."""
    with services.database.read() as tx:
        now = services.database.now(tx)
        kept = checkpoint_storage.list_kept(tx, key.account_id, now=now, project_id=project_id)
        card = checkpoint_storage.card_now(tx, key.account_id, now=now)
        name = accounts.name_of(tx, key.account_id)
    dollars = card.currency == "USD"
    rows = [
        {
            "project_id": part.project_id,
            "org_user_urn": key.account_id,
            "user_name": name,
            "checkpoint_count": part.num_checkpoints,
            "size_bytes": part.size_bytes,
            "size_gigabytes": part.size_bytes / BYTES_PER_GIGABYTE,
            "estimated_monthly_cost_usd": float(part.month_cost(card)) if dollars else None,
        }
        for part in kept
    ]
    rate = float(card.gigabyte_month(checkpoint_storage.STORAGE_KIND)) if dollars else None
    return {"effective_rate_usd_per_gigabyte_month": rate, "data": rows}


def _check_window(since: datetime, until: datetime, *, now: datetime) -> None:
    if since > now:
        raise BadRequestError(f"starting_on {since.isoformat()} is in the future")
    if hour_of(since) != since or hour_of(until) != until:
        raise BadRequestError("starting_on and ending_before must be whole hours of UTC, e.g. 2026-01-31T12:00:00Z")
    if not timedelta(0) < until - since <= WINDOW_MAX:
        raise BadRequestError(f"ending_before must come after starting_on, by at most {WINDOW_MAX.days} days")


def _usage(tx: Connection, account_id: str, events: Sequence[UsageEvent]) -> dict[str, Any]:
    name = accounts.name_of(tx, account_id)
    dollars = rate_cards.currency(tx) == "USD"
    ids = sorted({event.session_id for event in events})
    sessions = {session_id: runs.get_session(tx, account_id, session_id) for session_id in ids}
    common = {"user_id": account_id, "user_name": name}
    data = [common | _event(event, sessions[event.session_id], dollars=dollars) for event in events]
    told = {id_: {"user_metadata": dict(session.user_metadata) or None} for id_, session in sessions.items()}
    return {"data": data, "sessions": told}


def _event(event: UsageEvent, session: Session, *, dollars: bool) -> dict[str, Any]:
    costs = event.kind != EventKind.CHECKPOINT or event.charge
    stored = event.kind in usage_events.STORED
    return {
        "bucket_start": event.hour.isoformat(),
        "bucket_end": (event.hour + HOUR).isoformat(),
        "base_model": event.base_model,
        "session_id": event.session_id,
        "project_id": session.project_id,
        "estimated_cost_usd": float(event.cost) if dollars and costs else None,
        "effective_rate_usd_per_million_tokens": _float(event.price_of_million) if dollars else None,
        "effective_rate_usd_per_gigabyte_month": float(event.price_of_gigabyte_month) if dollars and stored else None,
        "event_info": _event_info(event),
    }


def _event_info(event: UsageEvent) -> dict[str, Any]:
    match event.kind:
        case EventKind.CHECKPOINT:
            return {"type": "checkpoint", "count": event.count}
        case EventKind.PREFILL | EventKind.CACHED_PREFILL:
            cached = event.kind == EventKind.CACHED_PREFILL
            return {"type": "sampling_prefill", "cached": cached, "token_count": event.count}
        case EventKind.STORAGE | EventKind.STATE:
            free = {} if event.price_of_gigabyte_month else {"free": True}  # early SDKs know no `free`
            return {"type": "storage", "gigabyte_hours": float(gigabyte_hours(event.count)), **free}
        case _:
            return {"type": str(event.kind), "token_count": event.count}


def _float(amount: Decimal | None) -> float | None:
    return None if amount is None else float(amount)
