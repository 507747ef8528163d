"""JSON of what is listed: sessions, training runs, checkpoints. Names are the wire's, times ISO 8601 with zone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from billing import quotes
from billing.invoices import Invoice
from billing.money import from_units, plain
from billing.rating import device_seconds
from billing.usage import Usage
from storage.checkpoints import Checkpoint
from storage.journal import Operation
from storage.runs import Run, Session

CHECKPOINT_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def checkpoint(row: Checkpoint) -> dict[str, Any]:
    """A `Checkpoint`."""
    return {
        "checkpoint_id": row.path.checkpoint_id,
        "checkpoint_type": CHECKPOINT_TYPES[row.kind],
        "time": row.created_at.isoformat(),
        "tinker_path": str(row.path),
        "size_bytes": row.size_bytes,
        "public": row.public,
        "user_metadata": metadata(row.user_metadata),
        "expires_at": None if row.expires_at is None else row.expires_at.isoformat(),
    }


def training_run(run: Run, checkpoints: Sequence[Checkpoint], *, cost: Decimal) -> dict[str, Any]:
    """A `TrainingRun`, and what it has cost so far: a field that the SDK passes over.

    Args:
        checkpoints: of this run, newest first.
        cost: in the currency of the deployment.
    """
    return {
        "cost": plain(cost),
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.account_id,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora["rank"],
        "last_request_time": run.last_request_at.isoformat(),
        "last_checkpoint": _newest(checkpoints, "weights"),
        "last_sampler_checkpoint": _newest(checkpoints, "sampler_weights"),
        "user_metadata": metadata(run.user_metadata),
    }


def operation(row: Operation, used: Usage | None) -> dict[str, Any]:
    """An operation as it stands: no field of the SDK's, but what somebody who comes back wants to know.

    Args:
        used: what it used; None unless it is completed.
    """
    return {
        "request_id": row.request_id,
        "training_run_id": row.run_id,
        "sampling_session_id": row.sampling_session_id,
        "seq": row.seq,
        "kind": row.kind,
        "status": row.status,
        "attempts": row.attempts,
        "accepted_at": row.accepted_at.isoformat(),
        "started_at": None if row.started_at is None else row.started_at.isoformat(),
        "finished_at": None if row.finished_at is None else row.finished_at.isoformat(),
        "tokens_trained": 0 if used is None else used.tokens_trained,
        "tokens_prefilled": 0 if used is None else used.tokens_prefilled,
        "tokens_cached": 0 if used is None else used.tokens_cached,
        "tokens_sampled": 0 if used is None else used.tokens_sampled,
        "device_seconds": None if used is None else plain(device_seconds(used.device_ns)),
        "error": row.error,
        "error_category": row.error_category,
        "result_expired": row.expired,
    }


def session_summary(session: Session, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """A `SessionSummary`."""
    return {
        "session_id": session.id,
        "created_at": session.created_at.isoformat(),
        "owner": session.account_id,
        "project_id": session.project_id or "",
        "status": session_status(session),
        "checkpoints_count": len(checkpoints),
        "checkpoint_storage_bytes": sum(row.size_bytes for row in checkpoints),
        "display_name": session.display_name,
        "user_metadata": metadata(session.user_metadata),
    }


def session_status(session: Session) -> dict[str, Any]:
    """A `SessionStatus`."""
    if session.finished_at is None:
        return {"type": "active"}
    reason = {"type": session.finish_reason or "success"}
    return {"type": "client_finished", "reason": reason, "detail": session.finish_detail}


def cursor(*, offset: int, limit: int, total: int) -> dict[str, int]:
    """A `Cursor`."""
    return {"offset": offset, "limit": limit, "total_count": total}


def metadata(pairs: Mapping[str, str]) -> dict[str, str] | None:
    """User metadata, or null where there is none."""
    return dict(pairs) or None


def _newest(checkpoints: Sequence[Checkpoint], kind: str) -> dict[str, Any] | None:
    return next((checkpoint(row) for row in checkpoints if row.kind == kind), None)


def invoice(row: Invoice) -> dict[str, Any]:
    """An invoice without its lines; the total is a decimal string."""
    return {
        "number": row.number,
        "kind": row.kind,
        "account": row.account_id,
        "period": {"start": row.period_start.isoformat(), "end": row.period_end.isoformat()},
        "currency": row.currency,
        "total": plain(row.total),
        "issued_at": row.created_at.isoformat(),
    }


def quote(row: quotes.Quote, currency: str) -> dict[str, Any]:
    """A quote; `device` is None where no device time was measured yet."""
    return {
        "id": row.id,
        "base_model": row.base_model,
        "device": row.device or None,
        "tokens": row.tokens,
        "device_seconds": str(device_seconds(row.device_ns)) if row.device else None,
        "amount": plain(row.amount),
        "currency": currency,
        "tag": f"batch:{row.id}",
        "created_at": row.created_at.isoformat(),
    }


def past_quote(row: quotes.Past, currency: str) -> dict[str, Any]:
    """A quote and what became of it; `error` is a fraction of what was quoted per token."""
    became = {
        "tokens": row.tokens,
        "device_seconds": str(device_seconds(row.device_ns)),
        "amount": plain(from_units(row.units)),
    }
    return quote(row.quote, currency) | {"became": became, "error": row.error}


def new_quote(
    row: quotes.Quote, work: quotes.Work, speed: quotes.Speed | None, past: quotes.Errors | None, currency: str
) -> dict[str, Any]:
    """A quote as it is made: `measured` is from how much its device time is known, None where it is not."""
    measured = None if speed is None else {"trained_tokens": speed.tokens, "steps": speed.steps}
    return quote(row, currency) | {"steps": work.steps, "measured": measured, "past": quote_errors(past)}


def quote_errors(found: quotes.Errors | None) -> dict[str, Any] | None:
    """How far off past quotes were, as fractions of what was quoted per token."""
    return None if found is None else {"quotes": found.number, "median_error": found.median, "worst_error": found.worst}
