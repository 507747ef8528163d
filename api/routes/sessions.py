"""Sessions: opened, kept by heartbeats, finished, listed and searched."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response

from api import schemas, session_search
from api.dependencies import CurrentKey, Joined, json_of
from api.errors import GoneError
from api.parameters import Offset
from api.wire import bodies
from storage import runs

router = APIRouter(prefix="/api/v1")

RUNS_MAX = 1000


@router.post("/create_session")
def create_session(
    services: Joined,
    key: CurrentKey,
    body: Annotated[bodies.CreateSession, Depends(json_of(bodies.CreateSession))],
    x_idempotency_key: Annotated[str | None, Header(max_length=128)] = None,
) -> dict[str, Any]:
    """Open a session."""
    with services.database.begin() as tx:
        session = runs.create_session(
            tx,
            account_id=key.account_id,
            api_key_id=key.id,
            now=services.database.now(tx),
            sdk_version=body.sdk_version[:64],
            project_id=body.project_id,
            tags=body.tags,
            user_metadata=body.user_metadata,
            display_name=body.display_name,
            idempotency_key=x_idempotency_key,
        )
    return {"type": "create_session", "session_id": session.id}


@router.post("/session_heartbeat")
def session_heartbeat(
    services: Joined, key: CurrentKey, body: Annotated[bodies.SessionOnly, Depends(json_of(bodies.SessionOnly))]
) -> dict[str, Any]:
    """Note that the client is there; 410 tells it that the session was finished."""
    with services.database.begin() as tx:
        alive = runs.record_heartbeat(tx, key.account_id, body.session_id, now=services.database.now(tx))
    if not alive:
        raise GoneError("the session was finished")
    return {"type": "session_heartbeat"}


@router.post("/sessions/search")
def search_sessions(
    services: Joined, key: CurrentKey, body: Annotated[bodies.SearchSessions, Depends(json_of(bodies.SearchSessions))]
) -> dict[str, Any]:
    """One page of the account's sessions that match."""
    return session_search.search(services, key.account_id, body)


@router.get("/sessions")
def list_sessions(
    services: Joined,
    key: CurrentKey,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Offset = 0,
) -> dict[str, Any]:
    """The account's sessions, newest first."""
    with services.database.read() as tx:
        return {"sessions": [s.id for s in runs.list_sessions(tx, key.account_id, limit=limit, offset=offset)]}


@router.get("/sessions/{session_id}")
def get_session(services: Joined, key: CurrentKey, session_id: str) -> dict[str, Any]:
    """Runs and sampling sessions of a session."""
    with services.database.read() as tx:
        session = runs.get_session(tx, key.account_id, session_id)
        trained = runs.list_runs(tx, key.account_id, limit=RUNS_MAX, session_id=session_id)
        sampled = runs.list_sampling_sessions(tx, key.account_id, session_id)
    return {
        "training_run_ids": [run.id for run in reversed(trained)],
        "sampler_ids": [sampler.id for sampler in sampled],
        "user_metadata": schemas.metadata(session.user_metadata),
        "display_name": session.display_name,
    }


@router.post("/sessions/{session_id}/finish", status_code=204)
def finish_session(
    services: Joined,
    key: CurrentKey,
    session_id: str,
    body: Annotated[bodies.FinishSession, Depends(json_of(bodies.FinishSession))],
) -> Response:
    """End a session; what was accepted before still completes."""
    with services.database.begin() as tx:
        now = services.database.now(tx)
        runs.finish_session(tx, key.account_id, session_id, reason=body.reason.type, detail=body.detail, now=now)
    return Response(status_code=204)
