"""Usage as CloudEvents, for those who feed OpenMeter, Lago or Stripe: one event per operation, or per hour of storage.

An event's id is that of its line, so whoever gets one twice knows it. Counts are JSON integers, amounts of money and
seconds are decimal strings: nothing is rounded.

Source: CloudEvents 1.0.2, cloudevents/spec: cloudevents/spec.md and formats/json-format.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from sqlalchemy import Connection

from billing import money, usage_lines, webhooks
from billing.rating import device_seconds
from billing.settings import BillingSettings
from billing.usage_lines import UsageLine
from billing.webhooks import Kind

TYPE = "piecework.usage"
BATCH_TYPE = "application/cloudevents-batch+json"
EVENTS_PER_MESSAGE = 100

_COUNTS = ("device_ns", "tokens_trained", "tokens_prefilled", "tokens_cached", "tokens_sampled", "byte_seconds")
_NAMES = ("kind", "base_model", "device", "project_id", "api_key_id", "session_id", "batch", "run_id")


def event(line: UsageLine, *, source: str) -> dict[str, Any]:
    """A line as a CloudEvent; its subject is the account."""
    data = {name: getattr(line, name) for name in (*_NAMES, *_COUNTS)}
    data |= {"device_seconds": money.plain(device_seconds(line.device_ns))}
    data |= {"charge": line.charge_text, "currency": line.currency}
    return {
        "specversion": "1.0",
        "id": line.id,
        "source": source,
        "type": TYPE,
        "subject": line.account_id,
        "time": line.at.isoformat(),
        "datacontenttype": "application/json",
        "data": data,
    }


def text(value: object) -> str:
    """JSON without needless spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def announce_operations(tx: Connection, record_ids: Collection[int], *, now: datetime) -> None:
    """Have webhooks told of usage records, in the order in which they were recorded.

    Called in the transaction that marks them as told of, so each is told of once.
    """
    if record_ids and webhooks.wants(tx, Kind.USAGE):
        _announce(tx, usage_lines.of_records(tx, record_ids), now)


def announce_storage(tx: Connection, storage_usage_ids: Collection[int], *, now: datetime) -> None:
    """Have webhooks told of storage, in the transaction that meters it."""
    if storage_usage_ids and webhooks.wants(tx, Kind.USAGE):
        _announce(tx, usage_lines.of_storage(tx, storage_usage_ids), now)


def _announce(tx: Connection, lines: Sequence[UsageLine], now: datetime) -> None:
    source = BillingSettings().event_source
    by_account = sorted(lines, key=lambda line: line.account_id)  # within an account in the order they had
    for account_id, group in groupby(by_account, key=lambda line: line.account_id):
        ours = list(group)
        for first in range(0, len(ours), EVENTS_PER_MESSAGE):
            part = ours[first : first + EVENTS_PER_MESSAGE]
            webhooks.announce(
                tx,
                account_id=account_id,
                kind=Kind.USAGE,
                event_id=f"{part[0].id}:{len(part)}",
                body=text([event(line, source=source) for line in part]),
                content_type=BATCH_TYPE,
                now=now,
            )
