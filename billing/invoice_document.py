"""The document of an invoice: what is stored as JSON and rendered from then on. Amounts are decimal strings, exact.

What always holds: the amounts of its lines add up to `subtotal`, and `subtotal + rounding = total`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing import money, rating
from billing.invoice_lines import Line
from billing.ledger import EntryKind

VERSION = 1
_KINDS = {
    EntryKind.CHARGE: "Charge",
    EntryKind.CREDIT: "Credit",
    EntryKind.TOP_UP: "Payment",
    EntryKind.ADJUSTMENT: "Correction",
}


@dataclass(frozen=True)
class Head:
    """What a document says but for its lines; the fields are as those of `invoices.Invoice`.

    Attributes:
        corrects: number of the invoice that a credit note corrects.
        owed_before: what the account's earlier invoices leave owed, in `money.SCALE`-ths.
    """

    number: int
    kind: str
    account_id: str
    account_name: str
    period_start: datetime
    period_end: datetime
    issued_at: datetime
    currency: str
    corrects: int | None
    reason: str | None
    owed_before: int


def write(head: Head, lines: Sequence[Line], *, total: int) -> str:
    """The document, as it is stored.

    Args:
        total: the sum of the lines with its rounding, in `money.SCALE`-ths.
    """
    subtotal = sum(line.units for line in lines)
    document = {
        "version": VERSION,
        "number": head.number,
        "kind": head.kind,
        "corrects": head.corrects,
        "reason": head.reason,
        "account": {"id": head.account_id, "name": head.account_name},
        "period": {"start": head.period_start.isoformat(), "end": head.period_end.isoformat()},
        "issued_at": head.issued_at.isoformat(),
        "currency": head.currency,
        "lines": lines_of(lines),
        "subtotal": _amount(subtotal),
        "rounding": _amount(total - subtotal),
        "total": _amount(total),
        "owed_before": _amount(head.owed_before),
        "owed_after": _amount(head.owed_before + total),
    }
    return json.dumps(document, ensure_ascii=False)


def lines_of(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Lines as a document has them."""
    return [_line(place, line) for place, line in enumerate(lines, 1)]


def compared(lines: Sequence[Line], issued: Mapping[str, Any]) -> tuple[object, object]:
    """Lines as they would be written now, and as they were; what describes them in words may have changed."""
    now, then = ([{**line, "description": None} for line in each] for each in (lines_of(lines), issued["lines"]))
    return now, then


def problems(document: Mapping[str, Any], *, total: int) -> Iterator[tuple[str, str, str]]:
    """What does not add up in a document: what it is, what it should be, what it is said to be.

    Args:
        total: of the invoice's row, in `money.SCALE`-ths.
    """
    subtotal = sum((Decimal(line["amount"]) for line in document["lines"]), Decimal(0))
    stated = {name: Decimal(document[name]) for name in ("subtotal", "rounding", "total", "owed_before", "owed_after")}
    pairs = (
        ("subtotal", subtotal, stated["subtotal"]),
        ("total", subtotal + stated["rounding"], stated["total"]),
        ("total of its row", stated["total"], money.from_units(total)),
        ("owed after it", stated["owed_before"] + stated["total"], stated["owed_after"]),
    )
    for what, expected, found in pairs:
        if expected != found:
            yield what, money.plain(expected), money.plain(found)


def quantities(line: Mapping[str, Any]) -> Mapping[str, Decimal]:
    """What a line of a document has used, by unit: `device_s`, `gigabyte_months` (rounded), and tokens by kind."""
    used = {name: int(number) for name, number in line["quantities"].items()}
    shown: dict[str, Decimal] = {}
    for name, number in used.items():
        if name == "device_ns":
            shown["device_s"] = rating.device_seconds(number)
        elif name == "byte_seconds":
            shown["gigabyte_months"] = rating.gigabyte_months(number)
        else:
            shown[name] = Decimal(number)
    return shown


def _line(place: int, line: Line) -> dict[str, Any]:
    return {
        "line": place,
        "description": _description(line.group),
        **line.group,
        "entries": line.entries,
        "quantities": {name: str(number) for name, number in line.quantities.items()},
        "amount": money.plain(line.amount),
    }


def _description(group: Mapping[str, Any]) -> str:
    what = [_KINDS[EntryKind(group["kind"])]]
    if group["operation"]:
        what.append(f"{group['operation']}, {group['base_model']} on {group['device']}")
    if group["storage"]:
        what.append(f"{group['storage']} storage, {group['base_model']}")
    if group["note"]:
        what.append(str(group["note"]))
    return ": ".join(what[1:] if what[1:] and group["kind"] == EntryKind.CHARGE else what)


def _amount(units: int) -> str:
    return money.plain(money.from_units(units))
