"""What usage costs so far: the table that `piecework cost` and `GET /api/v1/cost` show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection

from billing import rate_cards, rating, usage
from billing.money import from_units, plain
from billing.usage import UsageTotal


@dataclass(frozen=True)
class CostRow:
    """Usage of one account, run and kind of operation, and what it costs."""

    usage: UsageTotal

    @property
    def cost(self) -> Decimal:
        """The sum of its charges."""
        return from_units(self.usage.charge)


@dataclass(frozen=True)
class CostReport:
    """Rows and their total, in one currency."""

    currency: str
    rows: Sequence[CostRow]

    @property
    def operations(self) -> int:
        """Completed operations."""
        return sum(row.usage.operations for row in self.rows)

    @property
    def device_ns(self) -> int:
        """Device time, in nanoseconds."""
        return sum(row.usage.device_ns for row in self.rows)

    @property
    def cost(self) -> Decimal:
        """The sum of the rows' costs."""
        return sum((row.cost for row in self.rows), Decimal(0))

    def as_json(self) -> dict[str, Any]:
        """The report for machines; amounts and seconds are decimal strings."""
        return {
            "currency": self.currency,
            "rows": [_row_json(row) for row in self.rows],
            "total": {
                "operations": self.operations,
                "device_seconds": plain(rating.device_seconds(self.device_ns)),
                "cost": plain(self.cost),
            },
        }


def report(
    tx: Connection,
    *,
    account_id: str | None = None,
    run_id: str | None = None,
    session_id: str | None = None,
    since: datetime | None = None,
) -> CostReport:
    """What was used, by account, run and kind of operation, and what was charged for it."""
    totals = usage.totals(tx, account_id=account_id, run_id=run_id, session_id=session_id, since=since)
    return CostReport(rate_cards.currency(tx), [CostRow(total) for total in totals])


def _row_json(row: CostRow) -> dict[str, Any]:
    total = row.usage
    return {
        "account": total.account,
        "run": total.run_id,
        "kind": total.kind,
        "base_model": total.base_model,
        "device": total.device,
        "operations": total.operations,
        "device_seconds": plain(rating.device_seconds(total.device_ns)),
        "tokens_trained": total.tokens_trained,
        "tokens_prefilled": total.tokens_prefilled,
        "tokens_cached": total.tokens_cached,
        "tokens_sampled": total.tokens_sampled,
        "cost": plain(row.cost),
    }
