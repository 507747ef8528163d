"""usage × rate card → charge. Pure arithmetic."""

from __future__ import annotations

from decimal import Decimal

from billing.money import round_charge
from billing.rate_cards import RateCard
from billing.usage import UsageTotal

NS_PER_SECOND = Decimal(10**9)
MILLION = Decimal(10**6)


def charge(usage: UsageTotal, card: RateCard) -> Decimal:
    """What usage costs: `device_s x price + sum over kinds of tokens / 10^6 x price`, rounded once."""
    tokens = {
        "trained": usage.tokens_trained,
        "prefilled": usage.tokens_prefilled,
        "cached": usage.tokens_cached,
        "sampled": usage.tokens_sampled,
    }
    by_time = Decimal(usage.device_ns) / NS_PER_SECOND * card.device_second(usage.device)
    by_token = sum(
        (card.million(usage.base_model, kind) * count / MILLION for kind, count in tokens.items()), Decimal(0)
    )
    return round_charge(by_time + by_token)


def device_seconds(device_ns: int) -> Decimal:
    """Nanoseconds as seconds, exactly."""
    return Decimal(device_ns) / NS_PER_SECOND
