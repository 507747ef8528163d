"""usage × rate card → charge. Pure arithmetic."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from typing import Protocol

from billing import money
from billing.rate_card_file import RateCard

NS_PER_SECOND = Decimal(10**9)
MILLION = Decimal(10**6)
BYTE_SECONDS_PER_GB_HOUR = Decimal(10**9 * 3600)
BYTE_SECONDS_PER_GB_MONTH = BYTE_SECONDS_PER_GB_HOUR * 720
_EXACT = Context(prec=60)  # products of prices and counts stay exact; only the charge is rounded


class Counted(Protocol):
    """Tokens by kind."""

    @property
    def tokens_trained(self) -> int: ...
    @property
    def tokens_prefilled(self) -> int: ...
    @property
    def tokens_cached(self) -> int: ...
    @property
    def tokens_sampled(self) -> int: ...


class Used(Counted, Protocol):
    """What is priced: device time and tokens."""

    @property
    def device(self) -> str: ...
    @property
    def device_ns(self) -> int: ...


def tokens(used: Counted) -> dict[str, int]:
    """Tokens by the kinds that have prices of their own."""
    return {
        "trained": used.tokens_trained,
        "prefilled": used.tokens_prefilled,
        "cached": used.tokens_cached,
        "sampled": used.tokens_sampled,
    }


def charge(used: Used, base_model: str, card: RateCard) -> Decimal:
    """What usage costs: `device_s x price + sum over kinds of tokens / 10^6 x price`, rounded once."""
    counts = tokens(used).items()
    with localcontext(_EXACT):
        by_time = Decimal(used.device_ns) / NS_PER_SECOND * card.device_second(used.device)
        by_token = sum((card.million(base_model, kind) * count for kind, count in counts), Decimal(0)) / MILLION
        return money.round_charge(by_time + by_token)


def storage_charge(storage_kind: str, byte_seconds: int, card: RateCard) -> Decimal:
    """What storage costs: `byte_seconds / (10^9 x 720 x 3600) x price`, rounded once."""
    with localcontext(_EXACT):
        return money.round_charge(gigabyte_months(byte_seconds) * card.gigabyte_month(storage_kind))


def gigabyte_months(byte_seconds: int) -> Decimal:
    """Byte-seconds as months of 10⁹ bytes, to 60 digits."""
    return _EXACT.divide(Decimal(byte_seconds), BYTE_SECONDS_PER_GB_MONTH)


def gigabyte_hours(byte_seconds: int) -> Decimal:
    """Byte-seconds as hours of 10⁹ bytes, to 60 digits."""
    return _EXACT.divide(Decimal(byte_seconds), BYTE_SECONDS_PER_GB_HOUR)


def device_seconds(device_ns: int) -> Decimal:
    """Nanoseconds as seconds, exactly."""
    return Decimal(device_ns) / NS_PER_SECOND
