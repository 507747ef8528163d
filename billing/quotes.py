"""Quotes: what training would use and cost, from what this deployment has measured, and how far off earlier ones were.

    device_ns = tokens x (device_ns per trained token of forward_backward) + steps x (device_ns per optim_step)
    amount    = what the rate card in force makes of tokens and device_ns

A script whose session has the tag `batch:QUOTE_ID` is held against its quote: what it was charged per token, over what
was quoted per token, says how far off it was, whether it has ended or not.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import Connection, insert, select

from billing import money, rate_cards, rating, usage_totals
from billing.money import AmountError
from billing.usage import Usage
from billing.usage_totals import Scope, UsageTotal
from storage import billing_tables

MEASURED_OVER = timedelta(days=30)
"""How far back device time is looked at."""

PAST_MAX = 100
"""So many of an account's newest quotes for a base model are held against what became of them."""

COUNT_MAX = 2**63 - 1
"""The largest number of tokens, or of nanoseconds, that a row can hold."""

_table = billing_tables.quote
_PASSES, _STEP = "forward_backward", "optim_step"


@dataclass(frozen=True)
class Work:
    """What is to be trained.

    Attributes:
        tokens: of one epoch.
        steps: optimizer steps of one epoch.
    """

    examples: int
    tokens: int
    epochs: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs; the last batch of an epoch may be smaller."""
        return self.epochs * -(-self.examples // self.batch_size)

    @property
    def total_tokens(self) -> int:
        """Of all epochs."""
        return self.epochs * self.tokens


@dataclass(frozen=True)
class Speed:
    """What this deployment has measured for a base model on one device.

    Attributes:
        tokens, passes_ns: trained by `forward_backward`, and the device time of it in nanoseconds.
        steps, steps_ns: the same for `optim_step`.
    """

    device: str
    tokens: int
    passes_ns: int
    steps: int
    steps_ns: int

    def device_ns(self, work: Work) -> int:
        """How long the work would take, rounded up."""
        passes = -(-work.total_tokens * self.passes_ns // self.tokens)
        return passes + (-(-work.steps * self.steps_ns // self.steps) if self.steps else 0)


@dataclass(frozen=True)
class Quote:
    """What was quoted.

    Attributes:
        device: "" where nothing was measured yet; only tokens are priced then.
        tokens: trained tokens of all epochs.
        units: the amount in `money.SCALE`-ths.
    """

    id: str
    account_id: str
    base_model: str
    device: str
    tokens: int
    device_ns: int
    units: int
    rate_card_id: int
    created_at: datetime

    @property
    def amount(self) -> Decimal:
        """In the currency of the rate card."""
        return money.from_units(self.units)


@dataclass(frozen=True)
class Past:
    """A quote and what its batch has come to.

    Attributes:
        tokens: trained tokens of the batch.
        units: what was charged for training them, in `money.SCALE`-ths.
    """

    quote: Quote
    tokens: int
    device_ns: int
    units: int

    @property
    def error(self) -> float | None:
        """Charged per token over quoted per token, less one: 0.1 is 10 % more than quoted; None if nothing tells."""
        if not self.tokens or not self.quote.units or not self.quote.tokens:
            return None
        return (self.units * self.quote.tokens) / (self.tokens * self.quote.units) - 1


@dataclass(frozen=True)
class Errors:
    """How far off past quotes were, as fractions of what was quoted; of `number` that are known."""

    number: int
    median: float
    worst: float


def make(tx: Connection, account_id: str, base_model: str, work: Work, speed: Speed | None, *, now: datetime) -> Quote:
    """Quote the work and keep the quote.

    Args:
        speed: what `find_speed` has found, in a transaction of its own: it reads for long, and this one writes.

    Raises:
        AmountError: it takes or costs more than a row can hold.
    """
    device, device_ns = ("", 0) if speed is None else (speed.device, speed.device_ns(work))
    if max(work.total_tokens, device_ns) > COUNT_MAX:
        raise AmountError(f"{work.total_tokens} tokens are too much work for one quote: quote a part of it")
    dated = rate_cards.in_force(tx, account_id, at=now)
    used = Usage(device, device_ns, attempt=1, worker_id="", tokens_trained=work.total_tokens)
    quote = Quote(
        id=f"quote-{secrets.token_hex(6)}",
        account_id=account_id,
        base_model=base_model,
        device=device,
        tokens=work.total_tokens,
        device_ns=device_ns,
        units=money.to_units(rating.charge(used, base_model, dated.card)),
        rate_card_id=dated.id,
        created_at=now,
    )
    values = dict(quote.__dict__)
    tx.execute(insert(_table).values(amount=values.pop("units"), **values))
    return quote


def find_speed(tx: Connection, base_model: str, *, now: datetime, device: str | None = None) -> Speed | None:
    """What was measured lately on this device, or on the one that has trained most tokens of the base model.

    It reads the usage of everyone; ask in a transaction that only reads.
    """
    measured = [one for one in speeds(tx, base_model, now=now) if device in (None, one.device)]
    return max(measured, key=lambda one: one.tokens, default=None)


def speeds(tx: Connection, base_model: str, *, now: datetime) -> Sequence[Speed]:
    """What was measured lately for a base model, over all accounts, per device."""
    since = usage_totals.hour_of(now - MEASURED_OVER)
    scope = Scope(since=since, base_model=base_model, kinds=(_PASSES, _STEP))
    by_device = {
        (total.device or "", total.kind): total for total in usage_totals.totals(tx, scope, by=("kind", "device"))
    }
    measured = []
    for device in sorted({device for device, _ in by_device}):
        passes, steps = by_device.get((device, _PASSES)), by_device.get((device, _STEP))
        if passes is not None and passes.tokens_trained:
            taken = (steps.operations, steps.device_ns) if steps is not None else (0, 0)
            measured.append(Speed(device, passes.tokens_trained, passes.device_ns, *taken))
    return measured


def past(tx: Connection, account_id: str, base_model: str | None = None) -> Sequence[Past]:
    """The account's newest quotes, and what became of them; newest first."""
    names = [name for name in Quote.__dataclass_fields__ if name != "units"]
    query = select(*(_table.c[name] for name in names), _table.c.amount.label("units"))
    query = query.where(_table.c.account_id == account_id).order_by(_table.c.created_at.desc(), _table.c.id)
    if base_model is not None:
        query = query.where(_table.c.base_model == base_model)
    quotes = [Quote(**row._mapping) for row in tx.execute(query.limit(PAST_MAX)).all()]
    if not quotes:
        return []
    scope = Scope(
        account_id=account_id,
        batches=[quote.id for quote in quotes],
        kinds=(_PASSES, _STEP),
        since=usage_totals.hour_of(quotes[-1].created_at),  # no script knew its tag before
    )
    done = {(one.batch, one.base_model): one for one in usage_totals.totals(tx, scope, by=("batch", "base_model"))}
    return [_past(quote, done.get((quote.id, quote.base_model))) for quote in quotes]


def errors(found: Sequence[Past]) -> Errors | None:
    """How far off they were; None if none can be told."""
    known = [one.error for one in found if one.error is not None]
    if not known:
        return None
    return Errors(len(known), statistics.median(abs(error) for error in known), max(known, key=abs))


def _past(quote: Quote, trained: UsageTotal | None) -> Past:
    if trained is None:
        return Past(quote, tokens=0, device_ns=0, units=0)
    return Past(quote, tokens=trained.tokens_trained, device_ns=trained.device_ns, units=trained.charge)
