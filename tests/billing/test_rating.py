"""Usage times prices, by hand."""

from decimal import Decimal
from typing import Any

from billing.rate_card_file import RateCard
from billing.rating import charge, device_seconds, storage_charge
from tests.factories import make_usage

CARD = RateCard(
    "USD",
    device_seconds={"*": Decimal("0.001"), "cuda:": Decimal("0.01"), "cuda:NVIDIA H100": Decimal("0.1")},
    million_tokens={"*": {"trained": Decimal("0.4")}, "special": {"sampled": Decimal(6)}},
    gigabyte_months={"checkpoint": Decimal("0.72")},
)


def _charge(*, base_model: str = "any", card: RateCard = CARD, **used: Any) -> Decimal:
    return charge(make_usage(**{"device_ns": 0, **used}), base_model, card)


def test_device_time_costs_what_its_device_costs() -> None:
    # 1.5 s at 0.001, 0.01 and 0.1
    assert _charge(device_ns=1_500_000_000) == Decimal("0.0015")
    assert _charge(device_ns=1_500_000_000, device="cuda:NVIDIA A100") == Decimal("0.015")
    assert _charge(device_ns=1_500_000_000, device="cuda:NVIDIA H100 80GB") == Decimal("0.15")


def test_tokens_cost_by_the_million_and_by_base_model() -> None:
    # 2.5 million at 0.4; the special model has its own prices alone
    assert _charge(tokens_trained=2_500_000, tokens_sampled=10) == Decimal("1.0")
    assert _charge(base_model="special", tokens_trained=2_500_000, tokens_sampled=500_000) == Decimal(3)


def test_one_nanosecond_and_one_token_are_not_lost() -> None:
    assert _charge(device_ns=1, tokens_trained=1) == Decimal("0.000000400001")


def test_storage_costs_by_the_gigabyte_month_of_720_hours() -> None:
    # 2.5 GB for an hour at 0.72 a month, 2.5 x 0.001; state is free unless it has a price
    assert storage_charge("checkpoint", 2_500_000_000 * 3600, CARD) == Decimal("0.0025")
    assert storage_charge("state", 2_500_000_000 * 3600, CARD) == 0


def test_a_card_without_prices_costs_nothing() -> None:
    assert _charge(device_ns=10**18, tokens_trained=10**12, card=RateCard("USD", {}, {})) == 0


def test_nanoseconds_are_exact_seconds() -> None:
    assert device_seconds(1_234_567_890) == Decimal("1.23456789")
    assert str(device_seconds(1)) == "1E-9"
