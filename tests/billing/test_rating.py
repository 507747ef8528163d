"""Usage times prices, by hand."""

from decimal import Decimal

from billing.rate_cards import RateCard
from billing.rating import charge, device_seconds
from billing.usage import UsageTotal

CARD = RateCard(
    "USD",
    device_seconds={"*": Decimal("0.001"), "cuda:": Decimal("0.01"), "cuda:NVIDIA H100": Decimal("0.1")},
    million_tokens={"*": {"trained": Decimal("0.4")}, "special": {"sampled": Decimal(6)}},
)


def _total(**changes: object) -> UsageTotal:
    values: dict[str, object] = {
        "account": "acme",
        "run_id": None,
        "kind": "sample",
        "base_model": "any",
        "device": "cpu",
        "operations": 1,
        "device_ns": 0,
        "tokens_trained": 0,
        "tokens_prefilled": 0,
        "tokens_cached": 0,
        "tokens_sampled": 0,
    }
    return UsageTotal(**{**values, **changes})  # type: ignore[arg-type]


def test_device_time_costs_what_its_device_costs() -> None:
    # 1.5 s at 0.001, 0.01 and 0.1
    assert charge(_total(device_ns=1_500_000_000), CARD) == Decimal("0.0015")
    assert charge(_total(device_ns=1_500_000_000, device="cuda:NVIDIA A100"), CARD) == Decimal("0.015")
    assert charge(_total(device_ns=1_500_000_000, device="cuda:NVIDIA H100 80GB"), CARD) == Decimal("0.15")


def test_tokens_cost_by_the_million_and_by_base_model() -> None:
    # 2.5 million at 0.4; the special model has its own prices alone
    assert charge(_total(tokens_trained=2_500_000, tokens_sampled=10), CARD) == Decimal("1.0")
    special = _total(base_model="special", tokens_trained=2_500_000, tokens_sampled=500_000)
    assert charge(special, CARD) == Decimal(3)


def test_one_nanosecond_and_one_token_are_not_lost() -> None:
    assert charge(_total(device_ns=1, tokens_trained=1), CARD) == Decimal("0.000000400001")


def test_a_card_without_prices_costs_nothing() -> None:
    assert charge(_total(device_ns=10**18, tokens_trained=10**12), RateCard("USD", {}, {})) == 0


def test_nanoseconds_are_exact_seconds() -> None:
    assert device_seconds(1_234_567_890) == Decimal("1.23456789")
    assert str(device_seconds(1)) == "1E-9"
