"""`retrieve_future` and `cancel_future`.

A poll that waits holds no thread and no database connection: it subscribes, reads the row, and waits for the event.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from api import futures
from api.dependencies import CurrentKey, Joined, json_of
from api.services import Services
from api.wire import bodies
from jobs.cancel import cancel_sample
from storage import journal
from storage.journal import FINAL, Operation

router = APIRouter(prefix="/api/v1")


@router.post("/retrieve_future")
async def retrieve_future(
    services: Joined,
    key: CurrentKey,
    body: Annotated[bodies.RetrieveFuture, Depends(json_of(bodies.RetrieveFuture))],
    accept: Annotated[str, Header()] = "",
) -> Response:
    """The outcome as soon as it is there, or 408 after `poll_s`."""
    operation = await _wait(services, body.request_id, key.account_id)
    if operation.status in FINAL:
        await asyncio.sleep(await run_in_threadpool(futures.held_back_s, services, operation))
        return await run_in_threadpool(futures.answer, services, operation, accept=accept)
    return await run_in_threadpool(futures.try_again, services, operation)


@router.post("/cancel_future")
def cancel_future(
    services: Joined,
    key: CurrentKey,
    body: Annotated[bodies.RequestOnly, Depends(json_of(bodies.RequestOnly))],
) -> dict[str, Any]:
    """Cancel a sample that has no outcome; anything else is left as it is."""
    with services.database.begin() as tx:
        now = services.database.now(tx)
        cancelled = cancel_sample(tx, body.request_id, account_id=key.account_id, now=now)
    if cancelled:
        services.waiters.wake_from_thread([body.request_id])
    return {}


async def _wait(services: Services, request_id: str, account_id: str) -> Operation:
    async with services.waiters.subscribed(request_id) as outcome_is_there:
        operation = await run_in_threadpool(_read, services, request_id, account_id)
        if operation.status in FINAL:
            return operation
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(outcome_is_there.wait(), services.settings.poll_s)
        return await run_in_threadpool(_read, services, request_id, account_id)


def _read(services: Services, request_id: str, account_id: str) -> Operation:
    with services.database.read() as tx:
        return journal.get_operation(tx, request_id, account_id=account_id)
