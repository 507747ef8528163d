"""Prices: per device-second by device class and per million tokens by kind, read from a TOML file.

currency = "USD"

[device_seconds]            # the longest prefix of the device's name that is listed decides; "*" is any other
"*" = "0.0001"
"cuda:NVIDIA H100" = "0.0011"

[million_tokens."*"]        # base model, or "*" for any other
trained = "0.40"
prefilled = "0.10"
cached = "0.02"
sampled = "0.60"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from billing.settings import BillingSettings

DEFAULT_CARD = Path(__file__).parent / "default_rate_card.toml"
ANY = "*"
TOKEN_KINDS = ("trained", "prefilled", "cached", "sampled")


class RateCardError(ValueError):
    """A rate card cannot be used; the message names the file and the entry to correct."""


@dataclass(frozen=True)
class RateCard:
    """Prices in one currency.

    Attributes:
        device_seconds: device class → price of a device-second.
        million_tokens: base model → token kind → price of a million tokens.
    """

    currency: str
    device_seconds: Mapping[str, Decimal]
    million_tokens: Mapping[str, Mapping[str, Decimal]]

    def device_second(self, device: str) -> Decimal:
        """Price of a second on this device."""
        matching = [name for name in self.device_seconds if name != ANY and device.startswith(name)]
        return self.device_seconds.get(max(matching, key=len, default=ANY), Decimal(0))

    def million(self, base_model: str, token_kind: str) -> Decimal:
        """Price of a million tokens of this kind with this base model."""
        prices = self.million_tokens.get(base_model, self.million_tokens.get(ANY, {}))
        return prices.get(token_kind, Decimal(0))


def load_rate_card(settings: BillingSettings | None = None) -> RateCard:
    """The card of the settings, or the one that ships with piecework.

    Raises:
        RateCardError: the file is missing or holds what is not a price.
    """
    path = (settings or BillingSettings()).rate_card or DEFAULT_CARD
    try:
        card = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RateCardError(f"{path}: there is no such file; correct PIECEWORK_RATE_CARD") from error
    except tomllib.TOMLDecodeError as error:
        raise RateCardError(f"{path}: {error}") from error
    unknown = set(card) - {"currency", "device_seconds", "million_tokens"}
    if unknown:
        raise RateCardError(f"{path}: unknown entries {sorted(unknown)}")
    currency = card.get("currency", "USD")
    if not (isinstance(currency, str) and len(currency) == 3 and currency.isupper()):
        raise RateCardError(f"{path}: currency must be three capital letters such as USD, not {currency!r}")
    return RateCard(
        currency=currency,
        device_seconds=_prices(path, "device_seconds", card.get("device_seconds", {})),
        million_tokens={
            model: _prices(path, f"million_tokens.{model}", prices, names=TOKEN_KINDS)
            for model, prices in card.get("million_tokens", {}).items()
        },
    )


def _prices(path: Path, entry: str, table: Any, names: tuple[str, ...] | None = None) -> dict[str, Decimal]:
    if not isinstance(table, dict):
        raise RateCardError(f"{path}: [{entry}] must be a table of prices")
    return {name: _price(path, f"{entry}.{name}", name, text, names) for name, text in table.items()}


def _price(path: Path, entry: str, name: str, text: Any, names: tuple[str, ...] | None) -> Decimal:
    if names is not None and name not in names:
        raise RateCardError(f"{path}: {entry}: the kinds of tokens are {', '.join(names)}")
    try:
        price = Decimal(text) if isinstance(text, str | int) else None
    except InvalidOperation:
        price = None
    if price is None or not price.is_finite() or price < 0:
        raise RateCardError(f'{path}: {entry} = {text!r} is not a price; write it as a string, e.g. "0.40"')
    return price
