"""What usage costs so far: the table that `piecework cost` and `GET /api/v1/cost` show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, select

from billing import rate_cards, rating, usage_totals
from billing.money import from_units, plain
from billing.rate_card_file import TOKEN_KINDS
from billing.usage_totals import Scope, UsageTotal
from storage import tables


@dataclass(frozen=True)
class CostRow:
    """Usage of one account, run and kind of operation or storage, and what it costs."""

    account: str
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
    def tokens(self) -> Mapping[str, int]:
        """By kind."""
        counted: Counter[str] = Counter(dict.fromkeys(TOKEN_KINDS, 0))
        for row in self.rows:
            counted.update(rating.tokens(row.usage))
        return counted

    @property
    def byte_seconds(self) -> int:
        """What was kept, for how long."""
        return sum(row.usage.byte_seconds for row in self.rows)

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
                **_tokens_json(self.tokens),
                "byte_seconds": self.byte_seconds,
                "cost": plain(self.cost),
            },
        }


def report(tx: Connection, scope: Scope | None = None) -> CostReport:
    """What was used, by account, run and kind of operation, and what was charged for it."""
    names = {row.id: row.name for row in tx.execute(select(tables.account.c.id, tables.account.c.name))}
    rows = [CostRow(names[total.account_id or ""], total) for total in usage_totals.totals(tx, scope)]
    return CostReport(rate_cards.currency(tx), sorted(rows, key=lambda row: row.account))


def of_runs(tx: Connection, account_id: str, run_ids: Sequence[str]) -> Mapping[str, Decimal]:
    """What each of these runs has cost so far, samples drawn from its weights included; in one statement."""
    found = usage_totals.totals(tx, Scope(account_id=account_id, run_ids=run_ids), by=("run_id",))
    costs = {total.run_id: from_units(total.charge) for total in found}
    return {run_id: costs.get(run_id, Decimal(0)) for run_id in run_ids}


def _row_json(row: CostRow) -> dict[str, Any]:
    total = row.usage
    return {
        "account": row.account,
        "run": total.run_id,
        "kind": total.kind,
        "base_model": total.base_model,
        "device": total.device,
        "operations": total.operations,
        "device_seconds": plain(rating.device_seconds(total.device_ns)),
        **_tokens_json(rating.tokens(total)),
        "byte_seconds": total.byte_seconds,
        "cost": plain(row.cost),
    }


def _tokens_json(tokens: Mapping[str, int]) -> dict[str, int]:
    return {f"tokens_{kind}": number for kind, number in tokens.items()}
