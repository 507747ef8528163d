"""An invoice as CSV: a row per line, then its rounding and its total; amounts exact."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

_HEADINGS = ("number", "line", "kind", "description", "project", "operation", "base_model", "device", "storage")
_USED = ("device_ns", "tokens_trained", "tokens_prefilled", "tokens_cached", "tokens_sampled", "byte_seconds")


def render(document: Mapping[str, Any]) -> str:
    """The CSV of a document; its amounts without those of the total add up to it."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*_HEADINGS, "rate_card", "entries", *_USED, "amount", "currency"])
    number, currency = document["number"], document["currency"]
    for line in document["lines"]:
        values = [line[name] for name in (*_HEADINGS[1:], "rate_card", "entries")]
        used = [line["quantities"].get(name, "0") for name in _USED]
        writer.writerow([number, *values, *used, line["amount"], currency])
    blank = [""] * (len(_HEADINGS) + len(_USED) - 1)
    for kind in ("rounding", "total"):
        writer.writerow([number, "", kind, *blank, document[kind], currency])
    return text.getvalue()
