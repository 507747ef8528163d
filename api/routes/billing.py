"""What the account's usage costs so far."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from api.dependencies import CurrentKey, Joined
from api.parameters import Moment
from billing import budgets, cost
from billing.usage_totals import Scope

router = APIRouter(prefix="/api/v1")


class CostFilters(BaseModel):
    """Which of the account's usage; all that are given have to fit, and what is misspelt must not be the whole bill."""

    model_config = ConfigDict(extra="forbid")

    run: str | None = Field(None, max_length=192)
    session: str | None = Field(None, max_length=192)
    project: str | None = Field(None, max_length=64)
    key: int | None = Field(None, ge=1, le=2**63 - 1)
    batch: str | None = Field(None, max_length=128)
    since: Moment | None = None


@router.get("/cost")
def get_cost(services: Joined, key: CurrentKey, filters: Annotated[CostFilters, Query()]) -> dict[str, Any]:
    """Usage and cost by run and kind of operation; amounts are decimal strings."""
    scope = Scope(
        account_id=key.account_id,
        project_id=filters.project,
        api_key_id=filters.key,
        session_id=filters.session,
        batch=filters.batch,
        run_id=filters.run,
        since=filters.since,
    )
    with services.database.read() as tx:
        report = cost.report(tx, scope)
    return report.as_json()


@router.get("/budgets")
def get_budgets(services: Joined, key: CurrentKey) -> dict[str, Any]:
    """The account's caps, and what of them is spent and held."""
    with services.database.read() as tx:
        found = budgets.list_budgets(tx, [key.account_id], now=services.database.now(tx))
    return {"budgets": [budget.as_json() for budget in found]}
