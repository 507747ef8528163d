"""Operations, for who comes back, or never held their futures: listed by run, looked up, their results as JSON."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response

from api import futures, schemas
from api.dependencies import CurrentKey, Joined
from billing import usage
from storage import journal, runs
from storage.journal import FINAL

router = APIRouter(prefix="/api/v1")


@router.get("/training_runs/{run_id}/operations")
def list_operations(
    services: Joined,
    key: CurrentKey,
    run_id: str,
    after: Annotated[int, Query(ge=-1, le=2**62)] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """A run's operations after a `seq`, in order; `next_after` asks for the following page, null after the last."""
    with services.database.read() as tx:
        runs.get_run(tx, run_id, account_id=key.account_id)
        found = journal.page_of_run(tx, run_id, limit=limit + 1, after_seq=after)
        page = found[:limit]
        used = usage.of_operations(tx, [row.id for row in page])
    return {
        "operations": [schemas.operation(row, used.get(row.id)) for row in page],
        "next_after": page[-1].seq if len(found) > limit else None,
    }


@router.get("/operations/{request_id}")
def get_operation(services: Joined, key: CurrentKey, request_id: str) -> dict[str, Any]:
    """One operation, of a run or of a sampling session."""
    with services.database.read() as tx:
        row = journal.get_operation(tx, request_id, account_id=key.account_id)
        used = usage.of_operations(tx, [row.id])
    return schemas.operation(row, used.get(row.id))


@router.get("/operations/{request_id}/result")
def get_result(services: Joined, key: CurrentKey, request_id: str) -> Response:
    """What its future resolves to, as JSON; 202 while it has no outcome."""
    with services.database.read() as tx:
        row = journal.get_operation(tx, request_id, account_id=key.account_id)
    if row.status not in FINAL:
        return JSONResponse({"request_id": request_id, "status": row.status}, status_code=202)
    time.sleep(futures.held_back_s(services, row))
    return futures.answer(services, row, accept="application/json")
