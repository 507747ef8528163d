"""What budgets tell: a threshold that is reached, a refusal, a pause, and its end; in the log and to webhooks.

Webhooks are told in the transaction that makes it so, with the budget's row locked: once, however often that is tried.
The log is told once that transaction is committed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import Connection

from billing import rate_cards, webhooks
from storage.database import after_commit

log = structlog.get_logger()


def threshold_reached(
    tx: Connection, account_id: str, budget: Mapping[str, Any], percent: int, *, now: datetime
) -> None:
    """So many per cent of the cap are spent.

    Args:
        budget: as `Budget.as_json` has it, with its new amounts.
    """
    _log(tx, log.warning, "budget_threshold_reached", budget=budget["id"], account=account_id, percent=percent)
    _announce(tx, account_id, "budget.threshold_reached", budget, now=now, threshold_percent=percent)


def paused(tx: Connection, account_id: str, budget: Mapping[str, Any], *, now: datetime) -> None:
    """What it covers waits from now on."""
    _log(tx, log.warning, "budget_paused", budget=budget["id"], account=account_id)
    _announce(tx, account_id, "budget.paused", budget, now=now)


def refusing(tx: Connection, account_id: str, budget: Mapping[str, Any], *, now: datetime) -> None:
    """It has room, but not enough for something that was asked for: that waits, and is asked for again."""
    _log(tx, log.warning, "budget_refuses", budget=budget["id"], account=account_id)
    _announce(tx, account_id, "budget.refusing", budget, now=now)


def resumed(tx: Connection, account_id: str, budget: Mapping[str, Any], *, now: datetime) -> None:
    """What it covers goes on: a top-up, another cap, a new period, or it was removed."""
    _log(tx, log.info, "budget_resumed", budget=budget["id"], account=account_id)
    _announce(tx, account_id, "budget.resumed", budget, now=now)


def _log(tx: Connection, say: Callable[..., Any], event: str, **fields: Any) -> None:
    after_commit(tx, lambda: say(event, **fields))


def _announce(
    tx: Connection, account_id: str, what: str, budget: Mapping[str, Any], *, now: datetime, **more: int
) -> None:
    told = {name: budget[name] for name in ("scope", "scope_id", "period", "is_hard", "cap", "spent", "held")}
    data = {"account": account_id, "budget": budget["id"], **told, **more, "currency": rate_cards.currency(tx)}
    body = {"type": what, "timestamp": now.isoformat(), "data": data}
    places = (what, budget["id"], more.get("threshold_percent", ""), now.isoformat(), budget["spent"], budget["cap"])
    webhooks.announce(
        tx,
        account_id=account_id,
        kind=webhooks.Kind.BUDGET,
        event_id=":".join(map(str, places)),
        body=json.dumps(body, separators=(",", ":")),
        content_type="application/json",
        now=now,
    )
