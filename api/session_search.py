"""Search of an account's sessions: pages of rows, newest first, filtered here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from api import schemas
from api.services import Services
from api.wire import bodies
from storage import checkpoints, runs
from storage.checkpoints import Checkpoint
from storage.runs import Session

PAGE = 200
RUNS_MAX = 1000
SCANNED_MAX = 10_000
"""A search looks at the account's newest sessions, so many of them."""


def search(services: Services, account_id: str, query: bodies.SearchSessions) -> dict[str, Any]:
    """One page: `sessions`, and `next_cursor` if there may be more."""
    found: list[Session] = []
    last: Session | None = None
    with services.database.read() as tx:
        for last in _behind_cursor(tx, account_id, query.cursor):
            if _matches(last, query):
                found.append(last)
            if len(found) == query.limit:
                break
        else:
            last = None
        now = services.database.now(tx)
        summaries = [schemas.session_summary(session, _checkpoints(tx, session, now)) for session in found]
    return {"sessions": summaries, "next_cursor": None if last is None else _cursor(last)}


def _behind_cursor(tx: Connection, account_id: str, cursor: bodies.SearchCursor | None) -> Iterator[Session]:
    for offset in range(0, SCANNED_MAX, PAGE):
        page = runs.list_sessions(tx, account_id, limit=PAGE, offset=offset)
        for session in page:
            place = (session.created_at, session.id)
            if cursor is None or place < (cursor.last_created_at, cursor.last_session_id):
                yield session
        if len(page) < PAGE:
            return


def _checkpoints(tx: Connection, session: Session, now: datetime) -> list[Checkpoint]:
    trained = runs.list_runs(tx, session.account_id, limit=RUNS_MAX, session_id=session.id)
    return [row for run in trained for row in checkpoints.list_of_run(tx, session.account_id, run.id, now=now)]


def _matches(session: Session, query: bodies.SearchSessions) -> bool:
    named = [query.session_id == session.id] if query.session_id is not None else []
    if query.display_name is not None:
        name = (session.display_name or "").lower()
        named.append(all(word in name for word in query.display_name.lower().split()))
    return (
        (not named or any(named))
        and (query.project_ids is None or session.project_id in query.project_ids)
        and all(session.user_metadata.get(key) == value for key, value in query.user_metadata.items())
        and (query.owner.type != "user" or session.account_id in query.owner.owner_urns)
        and (query.statuses is None or any(_has(session, status) for status in query.statuses))
    )


def _has(session: Session, status: bodies.StatusQuery) -> bool:
    if status.type == "active":
        return session.finished_at is None
    if status.type != "client_finished" or session.finished_at is None:
        return False
    return not status.reasons or session.finish_reason in status.reasons


def _cursor(session: Session) -> dict[str, str]:
    return {"last_created_at": session.created_at.isoformat(), "last_session_id": session.id}
