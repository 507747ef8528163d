"""Joins settings, storage, waiters and routers; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from anyio import to_thread
from fastapi import FastAPI

from api import errors
from api.routes import (
    auth,
    billing,
    billing_usage,
    files,
    futures,
    invoices,
    models,
    operations,
    quotes,
    sampling,
    service,
    sessions,
    training,
    training_runs,
    weights,
)
from api.services import Services, open_services

ROUTERS = (
    service,
    auth,
    sessions,
    models,
    training,
    weights,
    sampling,
    futures,
    operations,
    training_runs,
    billing,
    billing_usage,
    invoices,
    quotes,
    files,
)


def create_app(services: Services | None = None) -> FastAPI:
    """The HTTP service.

    Args:
        services: what the routes work with; None opens it as set in the environment.
    """
    joined = services or open_services()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = joined.settings.api_threads
        if joined.subscription is not None:
            joined.subscription.start()
        safety_reads = asyncio.create_task(joined.waiters.safety_reads())
        yield
        safety_reads.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await safety_reads
        joined.close()

    app = FastAPI(title="piecework", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.services = joined
    for module in ROUTERS:
        app.include_router(module.router)
    errors.install(app)
    return app
