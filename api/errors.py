"""Every error of ours → status and body; the only translator.

    ApiError                     answered with its own status
    ├── UnauthorizedError        401: no valid API key
    ├── BadRequestError          400: what was asked makes no sense; says what to change
    ├── NotFoundError            404: never existed, or is another account's
    ├── GoneError                410: existed, and its time is over
    ├── TooLargeError            413: over a limit
    └── UnsupportedEncodingError 415: a body in an encoding that is not read

Errors of the folders below are answered 400 (an operation that makes no sense), 402 (a cap has no room for it: the SDK
asks again), 404 (no such row), 429 (too much waits)
and 503 (storage is away or full), the last two with Retry-After.

What always holds: no 409 (the SDK would retry it for minutes), no empty body (it takes an empty 400 for a broken
proxy), and nothing of our insides in a 500.
"""

from __future__ import annotations

import asyncio
import random
import traceback
from typing import ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from billing.holds import OverBudgetError
from jobs.backlog import BacklogFullError
from jobs.validation import InvalidOperationError
from storage.errors import RowNotFoundError, StorageError

log = structlog.get_logger()

RETRY_AFTER_S = "1"
POLL_HELD_BACK_S = 1.0


class ApiError(Exception):
    """The request cannot be answered."""

    status: ClassVar[int] = 500


class UnauthorizedError(ApiError):
    """The X-API-Key header holds no valid API key; keys are made with `piecework keys create`."""

    status = 401

    def __init__(self) -> None:
        super().__init__(self.__doc__)


class BadRequestError(ApiError):
    """The request makes no sense."""

    status = 400


class NotFoundError(ApiError):
    """There is no such thing in this account."""

    status = 404


class GoneError(ApiError):
    """It existed, and its time is over."""

    status = 410


class TooLargeError(ApiError):
    """The body is over the limit."""

    status = 413


class UnsupportedEncodingError(ApiError):
    """The body's Content-Encoding is not read."""

    status = 415


def install(app: FastAPI) -> None:
    """Let the app answer every error in the one form: `{"detail": "…"}`."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(InvalidOperationError, _answer_bad_request)
    app.add_exception_handler(BacklogFullError, _answer_backlog_full)
    app.add_exception_handler(OverBudgetError, _answer_over_budget)
    app.add_exception_handler(RequestValidationError, _answer_bad_parameter)
    app.add_exception_handler(StorageError, _answer_storage_error)
    app.add_exception_handler(PoolTimeoutError, _answer_busy)
    app.add_exception_handler(IntegrityError, _answer_busy)  # two of the same request at once: the next finds a row
    app.add_exception_handler(DataError, _answer_unstorable)
    app.add_exception_handler(OverflowError, _answer_unstorable)  # SQLite's driver, and times beyond the year 9999
    app.add_exception_handler(Exception, _answer_unexpected)


def _detail(status: int, text: str, **headers: str) -> JSONResponse:
    return JSONResponse({"detail": text}, status_code=status, headers=headers)


async def _answer_api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _detail(error.status, str(error))


async def _answer_bad_request(_request: Request, error: Exception) -> JSONResponse:
    return _detail(400, str(error))


async def _answer_backlog_full(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BacklogFullError)
    log.info("submission_refused", path=request.url.path, reason=str(error))
    return _detail(429, str(error), **{"Retry-After": str(error.retry_after_s)})


async def _answer_over_budget(request: Request, error: Exception) -> JSONResponse:
    log.info("submission_refused", path=request.url.path, reason=str(error))
    return _detail(402, str(error))


async def _answer_bad_parameter(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _detail(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _answer_storage_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StorageError)
    if isinstance(error, RowNotFoundError):
        return _detail(404, str(error))
    if error.retryable:
        log.warning("storage_unavailable", path=request.url.path, error=str(error))
        request.app.state.services.health.note(error)
        await _hold_back(request)
        return _detail(503, "storage is not available at the moment; try again", **{"Retry-After": RETRY_AFTER_S})
    return await _answer_unexpected(request, error)


async def _answer_busy(request: Request, _error: Exception) -> JSONResponse:
    log.warning("database_busy", path=request.url.path)
    await _hold_back(request)
    return _detail(503, "the service is busy; try again", **{"Retry-After": RETRY_AFTER_S})


async def _answer_unstorable(request: Request, error: Exception) -> JSONResponse:
    log.warning("request_unstorable", path=request.url.path, error=type(error).__name__)
    return _detail(
        400, "a text or a number in the request cannot be stored: NUL characters and huge numbers are refused"
    )


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    # as text: a formatter that shows local variables would show credentials
    log.error("request_failed", path=request.url.path, traceback="".join(traceback.format_exception(error)))
    await _hold_back(request)
    return _detail(500, "internal error; the service's log says more")


async def _hold_back(request: Request) -> None:
    """Keep a poll's 5xx back for a moment, holding no thread: the SDK repeats it at once, thousands do together."""
    if request.url.path.endswith("/retrieve_future"):
        await asyncio.sleep(POLL_HELD_BACK_S * random.uniform(0.5, 1.5))  # noqa: S311
