"""What the account's usage costs so far."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from api.dependencies import CurrentKey, Joined
from billing import budgets, cost

router = APIRouter(prefix="/api/v1")


@router.get("/cost")
def get_cost(
    services: Joined,
    key: CurrentKey,
    run: Annotated[str | None, Query(max_length=192)] = None,
    session: Annotated[str | None, Query(max_length=192)] = None,
    since: AwareDatetime | None = None,
) -> dict[str, Any]:
    """Usage and cost by run and kind of operation, of one run or session if asked; amounts are decimal strings."""
    since_at: datetime | None = since
    with services.database.read() as tx:
        report = cost.report(tx, account_id=key.account_id, run_id=run, session_id=session, since=since_at)
    return report.as_json()


@router.get("/budgets")
def get_budgets(services: Joined, key: CurrentKey) -> dict[str, Any]:
    """The account's caps, and what of them is spent and held."""
    with services.database.read() as tx:
        found = budgets.list_budgets(tx, [key.account_id], now=services.database.now(tx))
    return {"budgets": [budget.as_json() for budget in found]}
