"""`piecework webhooks`: who is told of what happens to the bill, and whether it has arrived."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Connection

from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, NumbersGroup, WholeNumber, data_dir_option, json_option
from api.cli.output import moment, print_json, print_table
from billing import webhooks as stored
from billing.webhooks import Delivery, Kind, Webhook, WebhookError
from jobs.webhook_sender import WebhookSender
from storage.accounts import name_of
from storage.errors import RowNotFoundError

KINDS = [str(Kind.BUDGET), str(Kind.USAGE)]


@click.group(cls=NumbersGroup)
def webhooks() -> None:
    """Tell other programs of budgets and usage, signed as Standard Webhooks does (docs/billing.md).

    A message that is not answered with 2xx is sent again 11 times within about 31 hours, each time later.
    """


@webhooks.command()
@click.argument("url")
@click.option("--account", "account_name", help="Only of this account's events; all accounts', if none is named.")
@click.option(
    "--event",
    "events",
    type=click.Choice(KINDS),
    multiple=True,
    default=[str(Kind.BUDGET)],
    show_default=True,
    help="What it is told of; may be given twice. budget: thresholds, pauses and their ends. usage: CloudEvents.",
)
@json_option
@data_dir_option
def add(url: str, account_name: str | None, events: Sequence[str], as_json: bool, data_dir: Path) -> None:
    """Have URL told, and print the secret it verifies messages with: the only time that it can be seen.

    Addresses of this machine and of private networks are refused, when a message is sent, unless
    PIECEWORK_WEBHOOK_PRIVATE_ADDRESSES=true is set for the workers.
    """
    with opened(data_dir, create=True) as storage, storage.database.begin() as tx:
        account_id = get_account(tx, account_name).id if account_name else None
        try:
            webhook, secret = stored.add(tx, account_id, url, events, now=storage.database.now(tx))
        except WebhookError as error:
            raise CliError(f"{url}: {error}") from error
    if as_json:
        print_json({"webhook": webhook.id, "secret": secret})
    else:
        click.echo(secret)
        click.echo(f"Webhook {webhook.id}. The secret is shown now and never again.", err=True)
        click.echo(f"See whether a message arrives: piecework webhooks test {webhook.id}", err=True)


@webhooks.command("list")
@click.option("--account", "account_name", help="Only those that are told of this account's events.")
@json_option
@data_dir_option
def list_(account_name: str | None, as_json: bool, data_dir: Path) -> None:
    """Show webhooks without their secrets."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        account_id = get_account(tx, account_name).id if account_name else None
        rows = [_webhook(tx, webhook) for webhook in stored.list_webhooks(tx, account_id=account_id)]
    if as_json:
        print_json({"webhooks": rows})
        return
    table = [(row["id"], row["account"] or "(all)", ", ".join(row["events"]), row["url"]) for row in rows]
    headings = ("id", "account", "events", "url")
    print_table(
        headings, table, numbers=[0], folds=[3], empty="no webhook yet: piecework webhooks add URL --account NAME"
    )


@webhooks.command()
@click.argument("webhook_id", type=NUMBER)
@json_option
@data_dir_option
def remove(webhook_id: int, as_json: bool, data_dir: Path) -> None:
    """End webhook WEBHOOK_ID (see `webhooks list`); what it was not told of yet is given up."""
    with opened(data_dir) as storage, storage.database.begin() as tx:
        try:
            stored.remove(tx, webhook_id, now=storage.database.now(tx))
        except RowNotFoundError as error:
            raise _unknown(webhook_id) from error
    if as_json:
        print_json({"removed": webhook_id})
    else:
        click.echo(f"webhook {webhook_id} is removed")


@webhooks.command()
@click.argument("webhook_id", type=NUMBER, required=False)
@click.option("--limit", type=WholeNumber(1, 1000), default=50, show_default=True, help="At most so many.")
@json_option
@data_dir_option
def deliveries(webhook_id: int | None, limit: int, as_json: bool, data_dir: Path) -> None:
    """Show what was sent, newest first: to all webhooks, or to WEBHOOK_ID."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        rows = [_delivery(one) for one in stored.list_deliveries(tx, webhook_id=webhook_id, limit=limit)]
    if as_json:
        print_json({"deliveries": rows})
        return
    table = [
        (
            row["id"],
            row["webhook"],
            row["event"],
            row["state"],
            row["attempts"],
            moment(row["created_at"]),
            moment(row["next_at"]),
            row["error"] or "",
        )
        for row in rows
    ]
    headings = ("id", "webhook", "event", "state", "attempts", "created", "next", "error")
    print_table(headings, table, numbers=[0, 1, 4], folds=[2, 7], empty="none yet")


@webhooks.command()
@click.argument("webhook_id", type=NUMBER)
@json_option
@data_dir_option
def test(webhook_id: int, as_json: bool, data_dir: Path) -> None:
    """Send webhook WEBHOOK_ID a message of type `test`, now and from here; exit code 1 if it is not taken."""
    with opened(data_dir) as storage:
        with storage.database.read() as tx:
            now = storage.database.now(tx)
        body = json.dumps({"type": Kind.TEST, "timestamp": now.isoformat(), "data": {}})
        event_id, sender = f"test:{secrets.token_hex(8)}", WebhookSender(storage.database)
        try:
            delivery_id, error_text = sender.send_now(webhook_id, event_id, body, "application/json")
        except RowNotFoundError as error:
            raise _unknown(webhook_id) from error
    if as_json:
        print_json({"delivery": delivery_id, "error": error_text})
    else:
        click.echo(f"webhook {webhook_id}: {error_text or 'it has taken the message'}")
    if error_text is not None:
        raise click.exceptions.Exit(1)


def _webhook(tx: Connection, webhook: Webhook) -> dict[str, Any]:
    return {
        "id": webhook.id,
        "account": None if webhook.account_id is None else name_of(tx, webhook.account_id),
        "url": webhook.url,
        "events": list(webhook.events),
        "created_at": webhook.created_at.isoformat(),
    }


def _delivery(one: Delivery) -> dict[str, Any]:
    return {
        "id": one.id,
        "webhook": one.webhook_id,
        "event": one.event_id,
        "state": one.state,
        "attempts": one.attempts,
        "created_at": one.created_at.isoformat(),
        "next_at": one.next_at.isoformat() if one.state == "waiting" else None,
        "delivered_at": _moment(one.delivered_at),
        "given_up_at": _moment(one.given_up_at),
        "error": one.last_error,
    }


def _moment(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _unknown(webhook_id: int) -> CliError:
    return CliError(f"there is no webhook {webhook_id}: see `piecework webhooks list`")
