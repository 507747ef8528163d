"""`piecework invoices`: closed periods of accounts, and what corrects them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from api import invoice_csv, invoice_pdf, schemas
from api.cli.errors import CliError
from api.cli.named import get_account
from api.cli.opened import opened
from api.cli.options import NUMBER, NumbersGroup, account_option, data_dir_option, json_option, reference_option
from api.cli.output import moment, print_json, print_table
from api.cli.values import parse_amount, parse_moment
from api.invoice_pdf import FontError
from billing import closing, credit_notes, invoice_lines, money
from billing import invoices as stored
from billing.invoices import Invoice, InvoiceError
from billing.money import AmountError
from billing.settings import BillingSettings
from storage.accounts import list_accounts
from storage.patience import unhurried

_SUMS = {"rounding": "rounding", "total": "total", "owed_after": "owed afterwards, with earlier invoices"}


@click.group(cls=NumbersGroup)
def invoices() -> None:
    """Close periods, show and correct invoices; months are closed by themselves."""


@invoices.command("list")
@click.option("--account", "account_name", help="Only invoices of this account.")
@json_option
@data_dir_option
def list_(account_name: str | None, as_json: bool, data_dir: Path) -> None:
    """Show invoices and credit notes, newest first."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        account_id = get_account(tx, account_name).id if account_name else None
        names = {account.id: account.name for account in list_accounts(tx)}
        found = stored.list_invoices(tx, account_id=account_id)
    if as_json:
        print_json({"invoices": [schemas.invoice(each) for each in found]})
        return
    rows = [
        (each.number, each.kind, names[each.account_id], _day(each.period_start), _day(each.period_end), _total(each))
        for each in found
    ]
    print_table(("number", "kind", "account", "from", "to", "total"), rows, numbers=[0, 5], empty="no invoice yet")


@invoices.command()
@click.argument("number", type=NUMBER)
@click.option("--csv", "as_csv", is_flag=True, help="Print a row per line as CSV.")
@click.option("--pdf", type=click.Path(dir_okay=False, path_type=Path), help="Write it to this file as PDF.")
@click.option("--trace", type=NUMBER, help="Show the usage records and ledger entries behind this line.")
@json_option
@data_dir_option
def show(*, number: int, as_csv: bool, pdf: Path | None, trace: int | None, as_json: bool, data_dir: Path) -> None:
    """Show invoice NUMBER, line by line."""
    with opened(data_dir) as storage, storage.database.read() as tx:
        invoice = stored.get(tx, number)
        document = stored.document(tx, invoice)
        if trace is not None:
            line = stored.line(tx, invoice, trace)
            traced = [_traced(row) for row in invoice_lines.trace(tx, invoice.id, line)]
    if trace is not None:
        _show_trace(traced, as_json=as_json)
    elif as_json:
        print_json(document)
    elif pdf is not None:
        try:
            pdf.write_bytes(invoice_pdf.render(document, font=BillingSettings().invoice_font))
        except FontError as error:
            raise CliError(str(error)) from error
        click.echo(f"written to {pdf}")
    elif as_csv:
        click.echo(invoice_csv.render(document), nl=False)
    else:
        rows = [
            (line["line"], line["project"] or "", line["description"], line["entries"], line["amount"])
            for line in document["lines"]
        ]
        sums = [("", "", words, "", document[name]) for name, words in _SUMS.items()]
        headings = ("line", "project", "what", "entries", document["currency"])
        print_table(headings, [*rows, *sums], numbers=[0, 3, 4], folds=[2], empty="")


@invoices.command()
@account_option
@click.option("--until", help="End of the period: a day or a moment, UTC; now, if none is named.")
@json_option
@data_dir_option
def close(account_name: str, until: str | None, as_json: bool, data_dir: Path) -> None:
    """Close a period of an account now; what has been closed is not closed again."""
    with opened(data_dir) as storage, storage.database.begin() as tx, unhurried(tx):
        now = storage.database.now(tx)
        end = parse_moment(until, "--until", now=now) if until else now
        try:
            invoice = closing.close(tx, get_account(tx, account_name).id, end=end, now=now)
        except (InvoiceError, AmountError) as error:
            raise CliError(str(error)) from error
    if as_json:
        print_json({"invoice": invoice and schemas.invoice(invoice)})
        return
    click.echo("nothing is open before that" if invoice is None else f"invoice {invoice.number}: {_total(invoice)}")
    if invoice is not None and invoice.period_end < end:
        click.echo(f"it ends at {moment(invoice.period_end)}, as a total has a limit; close again for the rest")


@invoices.command()
@click.argument("number", type=NUMBER)
@click.option("--reason", required=True, help="Why, as the credit note says it.")
@click.option("--line", type=NUMBER, help="Only charges of this line.")
@click.option("--amount", help="So much of it; all that is left, if none is named.")
@reference_option("The same one again for this invoice credits nothing more.")
@json_option
@data_dir_option
def credit(
    *,
    number: int,
    reason: str,
    line: int | None,
    amount: str | None,
    reference: str | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Take back charges of invoice NUMBER with a credit note."""
    units = None if amount is None else parse_amount(amount, "--amount")
    with opened(data_dir) as storage, storage.database.begin() as tx, unhurried(tx):
        try:
            invoice, now = stored.get(tx, number), storage.database.now(tx)
            note, new = credit_notes.credit(
                tx, invoice, reason=reason, line=line, units=units, reference=reference, now=now
            )
        except (InvoiceError, AmountError) as error:
            raise CliError(str(error)) from error
    if as_json:
        print_json({"invoice": schemas.invoice(note), "new": new})
    else:
        click.echo(f"credit note {note.number}{'' if new else ' was made already'}: {_total(note)}")


def _show_trace(traced: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json({"entries": traced})
        return
    words = {
        "id": "entry",
        "source": "source",
        "usage_id": "usage record",
        "usage_device_ns": "device ns",
        "storage_hour": "hour",
        "storage_byte_seconds": "byte-seconds",
        "amount": "amount",
    }
    shown = [name for name in words if any(row[name] is not None for row in traced)]
    numbers = [place for place, name in enumerate(shown) if name not in ("source", "storage_hour")]
    cells = [["" if row[name] is None else row[name] for name in shown] for row in traced]
    headings = [words[name] for name in shown]
    print_table(headings, cells, numbers=numbers, folds=[shown.index("source")] if cells else [], empty="no entry")


def _traced(row: Any) -> dict[str, Any]:
    plain = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}
    return {**plain, "amount": money.plain(money.from_units(row["amount"]))}


def _day(at: datetime) -> str:
    return f"{at:%Y-%m-%d}"


def _total(invoice: Invoice) -> str:
    return money.in_coins(invoice.total, invoice.currency)
