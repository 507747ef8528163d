"""Training runs, listed and looked up."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection

from api import schemas
from api.dependencies import CurrentKey, Joined
from api.parameters import Offset
from api.services import Services
from billing import cost
from storage import checkpoints, runs
from storage.runs import Run

router = APIRouter(prefix="/api/v1")


@router.get("/training_runs")
def list_training_runs(
    services: Joined,
    key: CurrentKey,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Offset = 0,
) -> dict[str, Any]:
    """The account's runs, newest first."""
    with services.database.read() as tx:
        rows = runs.list_runs(tx, key.account_id, limit=limit, offset=offset)
        total = runs.count_runs(tx, key.account_id)
        listed = _training_runs(tx, services, rows)
    return {"training_runs": listed, "cursor": schemas.cursor(offset=offset, limit=limit, total=total)}


@router.get("/training_runs/{run_id}")
def get_training_run(services: Joined, key: CurrentKey, run_id: str) -> dict[str, Any]:
    """One run."""
    with services.database.read() as tx:
        (run,) = _training_runs(tx, services, [runs.get_run(tx, run_id, account_id=key.account_id)])
    return run


def _training_runs(tx: Connection, services: Services, rows: Sequence[Run]) -> list[dict[str, Any]]:
    now = services.database.now(tx)
    costs: dict[str, Decimal] = {}
    for account_id in {run.account_id for run in rows}:
        costs |= cost.of_runs(tx, account_id, [run.id for run in rows if run.account_id == account_id])
    return [
        schemas.training_run(run, checkpoints.list_of_run(tx, run.account_id, run.id, now=now), cost=costs[run.id])
        for run in rows
    ]
