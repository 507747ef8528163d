"""Whom a charge is for: account, project, API key, session, batch and run."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from storage import tables


@dataclass(frozen=True)
class Dimensions:
    """Whom a charge is for; None where it is for none in particular.

    Attributes:
        batch: what sessions with the tag `batch:NAME` do together.
    """

    account_id: str
    project_id: str | None = None
    api_key_id: int | None = None
    session_id: str | None = None
    batch: str | None = None
    run_id: str | None = None


def of_session(tx: Connection, session_id: str) -> Dimensions:
    """Whom what a session does is charged to, as it stands now: a session may be moved to another project."""
    table = tables.session.c
    columns = (table.account_id, table.project_id, table.api_key_id, table.id.label("session_id"), table.batch)
    return Dimensions(**tx.execute(select(*columns).where(table.id == session_id)).one()._mapping)
