"""Holds: what an accepted operation may cost at most, set aside on every budget that covers it until it ends.

Tokens are bounded exactly, so priced by tokens alone operations never cost more than was held for them. Device time is
estimated, from what the account's last operations of that kind have taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection, func, select

from billing import budgets, money, rate_cards, rating
from billing.budgets import Budget, Period, Scope
from billing.dimensions import Dimensions
from billing.rate_card_file import RateCard
from billing.usage import Usage
from storage import billing_tables

_record = billing_tables.usage_record

LOOKED_AT = 200
"""So many of the account's last operations of a kind are looked at for the time that one takes."""


class OverBudgetError(Exception):
    """A hard cap has no room for an operation; says which, and how it goes on.

    Attributes:
        budget: the one that has none; None where an earlier operation of the run is waited for.
        units: what it may cost at most, in `money.SCALE`-ths.
    """

    def __init__(self, message: str, budget: Budget | None = None, units: int = 0) -> None:
        super().__init__(message)
        self.budget = budget
        self.units = units

    @classmethod
    def of(cls, budget: Budget, units: int) -> OverBudgetError:
        """The error for an operation that may cost this much."""
        spent, held, more = (money.plain(money.from_units(one)) for one in (budget.spent, budget.held, units))
        top_up = {Scope.ACCOUNT: "top the account up, ", Scope.PROJECT: "top the account up for this project, "}
        wait = "" if budget.period == Period.NONE else ", or wait for its next period"
        return cls(
            f"budget: {budget.name} has no room: {spent} spent, {held} held for what is accepted, {more} wanted; the "
            f"request is tried again until there is: {top_up.get(Scope(budget.scope), '')}raise the cap{wait}",
            budget,
            units,
        )


@dataclass(frozen=True)
class Wanted:
    """What an operation wants to hold.

    Attributes:
        whom: what it will be charged to.
        bound: its tokens at most; device and device time are estimated here.
    """

    whom: Dimensions
    kind: str
    base_model: str
    bound: Usage


def place(tx: Connection, locked: Sequence[Budget], operation_id: int, wanted: Wanted, *, now: datetime) -> None:
    """Hold what an operation may cost, in the transaction that accepts it.

    Args:
        locked: the budgets that cover it.

    Raises:
        OverBudgetError: a hard cap has no room for it.
    """
    if locked:
        budgets.hold(tx, locked, operation_id, check(tx, locked, wanted, now=now))


def check(tx: Connection, covering: Sequence[Budget], wanted: Wanted, *, now: datetime) -> int:
    """What an operation may cost at most, in `money.SCALE`-ths, if there is room for that.

    Args:
        covering: the budgets that cover it.

    Raises:
        OverBudgetError: a hard cap has no room for it.
    """
    if not covering:
        return 0
    account_id = wanted.whom.account_id
    card = rate_cards.in_force(tx, account_id, at=now).card
    units = most_units(tx, account_id, wanted.bound, card, kind=wanted.kind, base_model=wanted.base_model)
    for budget in covering:
        if not budget.has_room_for(units):
            raise OverBudgetError.of(budget, units)
    return units


def most_units(tx: Connection, account_id: str, bound: Usage, card: RateCard, *, kind: str, base_model: str) -> int:
    """What an operation may cost at most, as far as is known, in `money.SCALE`-ths."""
    cached = replace(bound, tokens_prefilled=0, tokens_cached=bound.tokens_prefilled)
    expected = [bound, cached]
    if any(card.device_seconds.values()):
        expected += _with_device_time(tx, account_id, bound, kind=kind, base_model=base_model)
    return max(min(money.UNITS_MAX, int(rating.charge(one, base_model, card) * money.SCALE)) for one in expected)


def _with_device_time(tx: Connection, account_id: str, bound: Usage, *, kind: str, base_model: str) -> list[Usage]:
    """The bound with the device time it would take on each device that was used lately."""
    tokens = (_record.c.tokens_trained, _record.c.tokens_prefilled, _record.c.tokens_sampled)
    last = (
        select(_record.c.device, _record.c.device_ns, *tokens)
        .where(_record.c.account_id == account_id, _record.c.kind == kind, _record.c.base_model == base_model)
        .order_by(_record.c.finished_at.desc())
        .limit(LOOKED_AT)
        .subquery()
    )
    work = func.sum(last.c.tokens_trained + last.c.tokens_prefilled + last.c.tokens_sampled)
    query = select(last.c.device, func.sum(last.c.device_ns), work, func.count()).group_by(last.c.device)
    wanted = bound.tokens_trained + bound.tokens_prefilled + bound.tokens_sampled
    return [
        replace(
            bound, device=device, device_ns=int(ns) * max(wanted, 1) // max(int(done), int(number) * (not wanted), 1)
        )
        for device, ns, done, number in tx.execute(query)
    ]
