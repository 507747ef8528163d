"""Usage as the SDK's `tinker billing usage` shows it: a row per hour, kind of usage, base model and session.

The costs of an hour's rows add up to its charges. A charge is shared by the rows that it is for, in proportion to what
their tokens cost by themselves: so device time is borne by tokens, and a step by what was trained in its hour.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from sqlalchemy import Connection

from billing import metering, rate_cards, usage_totals
from billing.money import SCALE_DIGITS, from_units
from billing.rate_card_file import RateCard
from billing.usage_totals import STORAGE_KINDS, Scope, UsageTotal

BY = ("hour", "session_id", "base_model", "kind")


class EventKind(StrEnum):
    """What is counted."""

    TRAINING = "training"
    PREFILL = "sampling_prefill"
    CACHED_PREFILL = "sampling_prefill_cached"
    SAMPLED = "sampling_sample"
    CHECKPOINT = "checkpoint"
    STORAGE = "checkpoint_storage"
    STATE = "state_storage"


TOKENS: Mapping[EventKind, str] = {
    EventKind.TRAINING: "trained",
    EventKind.PREFILL: "prefilled",
    EventKind.CACHED_PREFILL: "cached",
    EventKind.SAMPLED: "sampled",
}
STORED: Mapping[str, str] = {name: kind for kind, name in STORAGE_KINDS.items()}
"""Kinds of event that are storage, and what their bytes are in a rate card."""
_SAMPLING = (EventKind.PREFILL, EventKind.CACHED_PREFILL, EventKind.SAMPLED)
_SAVING = ("save_state", "save_weights_for_sampler", "save_weights_external")

Place = tuple[datetime, str, str, EventKind]


@dataclass(frozen=True)
class UsageEvent:
    """Usage of one kind in an hour.

    Attributes:
        hour: its beginning.
        count: tokens, checkpoints saved, or byte-seconds kept.
        charge: in `money.SCALE`-ths.
        price_of_gigabyte_month: of storage, in the currency; 0 of what is none, or free.
    """

    hour: datetime
    session_id: str
    base_model: str
    kind: EventKind
    count: int
    charge: int
    price_of_gigabyte_month: Decimal = Decimal(0)

    @property
    def cost(self) -> Decimal:
        """The charge in the currency."""
        return from_units(self.charge)

    @property
    def price_of_million(self) -> Decimal | None:
        """What a million of its tokens has cost; None if there are none."""
        return self.cost * 10**6 / self.count if self.count and self.kind in TOKENS else None


def list_events(tx: Connection, account_id: str, *, since: datetime, until: datetime) -> Sequence[UsageEvent]:
    """An account's usage from the one moment on and before the other: by hour, then the largest count first."""
    counts: dict[Place, int] = defaultdict(int)
    charges: dict[Place, int] = defaultdict(int)
    cards: dict[datetime, RateCard] = {}
    for total in usage_totals.totals(tx, Scope(account_id=account_id, since=since, until=until), by=BY):
        if total.hour is None or total.session_id is None or total.base_model is None:
            raise ValueError(f"usage without an hour, a session or a base model: {total}")
        if total.hour not in cards:
            cards[total.hour] = rate_cards.in_force(tx, account_id, at=total.hour).card
        kinds = _counts_of(total)
        shares = metering.split_ns(total.charge, _weights(kinds, cards[total.hour], total.base_model))
        for (kind, count), share in zip(kinds.items(), shares, strict=True):
            place = (total.hour, total.session_id, total.base_model, kind)
            counts[place] += count
            charges[place] += share
    events = [
        UsageEvent(*place, counts[place], charges[place], _gigabyte_month(place[-1], cards[place[0]]))
        for place in counts
    ]
    told = [event for event in events if event.count or event.charge]
    return sorted(told, key=lambda event: (event.hour, -event.count, event.kind, event.session_id, event.base_model))


def _gigabyte_month(kind: EventKind, card: RateCard) -> Decimal:
    return card.gigabyte_month(STORED[kind]) if kind in STORED else Decimal(0)


def _counts_of(total: UsageTotal) -> Mapping[EventKind, int]:
    if total.kind == "sample":
        numbers = (total.tokens_prefilled, total.tokens_cached, total.tokens_sampled)
        return dict(zip(_SAMPLING, numbers, strict=True))
    if total.kind in _SAVING:
        return {EventKind.CHECKPOINT: total.operations}
    if total.kind is not None and total.kind in STORED:
        return {EventKind(total.kind): total.byte_seconds}
    return {EventKind.TRAINING: total.tokens_trained}


def _weights(counts: Mapping[EventKind, int], card: RateCard, base_model: str) -> list[int]:
    """What the tokens cost by themselves, or how many they are where they cost nothing."""
    prices = [card.million(base_model, TOKENS[kind]) if kind in TOKENS else Decimal(0) for kind in counts]
    costs = [int(price.scaleb(SCALE_DIGITS)) * count for price, count in zip(prices, counts.values(), strict=True)]
    return costs if any(costs) else list(counts.values())
