"""Prices, as a TOML text: per device-second by device class, per million tokens by kind, per gigabyte-month.

currency = "USD"

[device_seconds]            # the longest prefix of the device's name that is listed decides; "*" is any other
"*" = "0.0001"
"cuda:NVIDIA H100" = "0.0011"

[million_tokens."*"]        # base model, or "*" for any other
trained = "0.40"
prefilled = "0.10"
cached = "0.02"
sampled = "0.60"

[gigabyte_months]           # 10⁹ bytes for 720 hours
checkpoint = "0.10"
state = "0"
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from types import MappingProxyType
from typing import Any

ANY = "*"
TOKEN_KINDS = ("trained", "prefilled", "cached", "sampled")
STORAGE_KINDS = ("checkpoint", "state")
_DEVICES, _TOKENS, _STORAGE = "device_seconds", "million_tokens", "gigabyte_months"
PRICE_MAX = Decimal(10**6)
DEVICE_PRICE_MAX = Decimal(1000)
"""Of a device-second: a row holds the charge for two hours and a half of it."""
PRICE_DIGITS_MAX = 12
_NONE: Mapping[str, Decimal] = MappingProxyType({})


class RateCardError(ValueError):
    """A rate card cannot be used; the message names the file, the line and the entry to correct."""


@dataclass(frozen=True)
class RateCard:
    """Prices in one currency.

    Attributes:
        device_seconds: device class → price of a device-second.
        million_tokens: base model → token kind → price of a million tokens.
        gigabyte_months: kind of storage → price of 10⁹ bytes for 720 hours.
    """

    currency: str
    device_seconds: Mapping[str, Decimal]
    million_tokens: Mapping[str, Mapping[str, Decimal]]
    gigabyte_months: Mapping[str, Decimal] = field(default_factory=dict)

    def device_second(self, device: str) -> Decimal:
        """Price of a second on this device."""
        matching = [name for name in self.device_seconds if name != ANY and device.startswith(name)]
        return self.device_seconds.get(max(matching, key=len, default=ANY), Decimal(0))

    def prices_device(self, device: str | None) -> bool:
        """Whether time on this device, on one whose name begins so, or on any if none is named, has a price."""
        of_class = any(price for name, price in self.device_seconds.items() if name.startswith(device or ""))
        return of_class or bool(device and self.device_second(device))

    def million(self, base_model: str, token_kind: str) -> Decimal:
        """Price of a million tokens of this kind with this base model."""
        prices = self.million_tokens.get(base_model, self.million_tokens.get(ANY, _NONE))
        return prices.get(token_kind, Decimal(0))

    def gigabyte_month(self, storage_kind: str) -> Decimal:
        """Price of 10⁹ bytes kept for 720 hours."""
        return self.gigabyte_months.get(storage_kind, Decimal(0))


@functools.lru_cache(maxsize=128)
def parse(content: str, name: str = "rate card") -> RateCard:
    """The card that a TOML text is.

    Args:
        name: of the file, for messages.

    Raises:
        RateCardError: it holds what is not a price.
    """
    try:
        card = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise RateCardError(f"{name}: {error}") from error
    reader = _Reader(content, name)
    known = {"currency", _DEVICES, _TOKENS, _STORAGE}
    for entry in card:
        if entry not in known:
            raise reader.error((entry,), f"unknown entry; a card has {', '.join(sorted(known))}")
    currency = card.get("currency", "USD")
    if not (isinstance(currency, str) and len(currency) == 3 and currency.isascii() and currency.isupper()):
        raise reader.error(("currency",), f"must be three capital letters such as USD, not {currency!r}")
    models = reader.table((_TOKENS,), card.get(_TOKENS, {}))
    return RateCard(
        currency=currency,
        device_seconds=reader.prices((_DEVICES,), card.get(_DEVICES, {})),
        million_tokens={model: reader.prices((_TOKENS, model), models[model], TOKEN_KINDS) for model in models},
        gigabyte_months=reader.prices((_STORAGE,), card.get(_STORAGE, {}), STORAGE_KINDS),
    )


class _Reader:
    """Reads prices; what is wrong is said with its line."""

    def __init__(self, content: str, name: str) -> None:
        self._lines = content.splitlines()
        self._name = name

    def error(self, path: tuple[str, ...], what: str) -> RateCardError:
        line = self._line_of(path)
        where = f"{self._name}, line {line}" if line else self._name
        return RateCardError(f"{where}: {'.'.join(path)}: {what}")

    def table(self, path: tuple[str, ...], table: Any) -> dict[str, Any]:
        if not isinstance(table, dict):
            raise self.error(path, "must be a table")
        return table

    def prices(self, path: tuple[str, ...], table: Any, names: tuple[str, ...] | None = None) -> dict[str, Decimal]:
        return {name: self._price((*path, name), text, names) for name, text in self.table(path, table).items()}

    def _price(self, path: tuple[str, ...], text: Any, names: tuple[str, ...] | None) -> Decimal:
        if names is not None and path[-1] not in names:
            raise self.error(path, f"unknown kind; there are {', '.join(names)}")
        try:
            is_text = isinstance(text, str | int) and not isinstance(text, bool)
            price = Decimal(text) if is_text else None
        except InvalidOperation:
            price = None
        if price is None or not price.is_finite() or price < 0:
            raise self.error(path, f'{text!r} is not a price; write it as a string, e.g. "0.40"')
        exponent = price.as_tuple().exponent
        most = DEVICE_PRICE_MAX if path[0] == _DEVICES else PRICE_MAX
        if price > most or (isinstance(exponent, int) and -exponent > PRICE_DIGITS_MAX):
            raise self.error(path, f"{text!r}: such a price is at most {most}, with {PRICE_DIGITS_MAX} decimal places")
        return price

    def _line_of(self, path: tuple[str, ...]) -> int | None:
        """Number of the line that says this entry, or opens the table that holds it."""
        section: tuple[str, ...] = ()
        opened: int | None = None
        for number, line in enumerate(self._lines, 1):
            keys = _keys_of(line)
            if line.lstrip().startswith("[") and keys is not None:
                section = keys
                opened = number if path[: len(section)] == section else opened
                keys = ()
            if keys is not None and (*section, *keys) == path:
                return number
        return opened


def _keys_of(line: str) -> tuple[str, ...] | None:
    """The keys that a line alone leads to; None if it is no line of its own."""
    try:
        value: Any = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
    keys: list[str] = []
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        keys.append(key)
    return tuple(keys)
