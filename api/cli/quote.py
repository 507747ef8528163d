"""`piecework quote`: what training would use and cost, before it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import click

from api import schemas
from api.cli.errors import CliError
from api.cli.named import get_account, get_base_model
from api.cli.opened import opened
from api.cli.options import WholeNumber, data_dir_option, json_option
from api.cli.output import print_json, print_table, progress
from api.examples import KINDS, ExampleError, TokenCounter, parse_lines
from billing import quotes, rate_cards
from billing.money import AmountError, plain
from billing.quotes import Errors, Quote, Speed, Work
from billing.rating import device_seconds
from storage.accounts import Account, list_accounts
from storage.open import Storage


@click.command()
@click.option("--model", "base_model", required=True, help="Base model, as `piecework models list` shows it.")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help=f"JSON Lines: a training example per line, with {KINDS.replace('`', '')}.",
)
@click.option("--epochs", type=WholeNumber(1), default=1, show_default=True, help="How often each is trained on.")
@click.option("--batch-size", type=WholeNumber(1), default=32, show_default=True, help="Examples per optim_step.")
@click.option("--device", help="Price this device.  [default: the one that has trained most of late]")
@click.option("--account", "account_name", help="Whose prices.  [default: the only account]")
@json_option
@data_dir_option
def quote(
    *,
    base_model: str,
    data: Path,
    epochs: int,
    batch_size: int,
    device: str | None,
    account_name: str | None,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Say what training on a file would use and cost.

    Device time is what this deployment has measured for the model. Give your script the tag that is shown
    (TINKER_TAGS=batch:quote-…), and later quotes say how far off this one was.
    """
    with opened(data_dir) as storage:
        work = _read(storage, base_model, data, epochs=epochs, batch_size=batch_size)
        with storage.database.read() as tx:
            account = get_account(tx, account_name) if account_name else _only(list_accounts(tx))
            now = storage.database.now(tx)
            speed = quotes.find_speed(tx, base_model, now=now, device=device)
            errors = quotes.errors(quotes.past(tx, account.id, base_model))
        try:
            with storage.database.begin() as tx:
                made = quotes.make(tx, account.id, base_model, work, speed, now=now)
                currency, card = rate_cards.currency(tx), rate_cards.in_force(tx, account.id, at=now).card
        except AmountError as error:
            raise CliError(str(error)) from error
    if as_json:
        print_json(schemas.new_quote(made, work, speed, errors, currency))
    else:
        is_partial = not made.device and card.prices_device(device)
        price = f"{plain(made.amount)} {currency}{' without device time' if is_partial else ''}"
        _show(made, work, speed, errors, price)


def _read(storage: Storage, base_model: str, data: Path, *, epochs: int, batch_size: int) -> Work:
    with storage.database.read() as tx:
        counter = TokenCounter(storage.objects, get_base_model(tx, base_model))
    lengths = []
    try:
        with progress() as bars, data.open("rb") as lines:
            bar = bars.add_task("counting tokens", total=data.stat().st_size)
            for place, example in parse_lines(_told_of(lines, lambda size: bars.advance(bar, size))):
                lengths.append(counter.count(example, place))
    except ExampleError as error:
        raise CliError(f"{data}: {error}") from error
    if not lengths:
        raise CliError(f"{data} holds no example")
    return Work(len(lengths), sum(lengths), epochs, batch_size)


def _told_of(lines: Iterable[bytes], seen: Callable[[int], None]) -> Iterator[bytes]:
    for line in lines:
        yield line
        seen(len(line))


def _only(accounts: Sequence[Account]) -> Account:
    if len(accounts) != 1:
        raise CliError(f"there are {len(accounts)} accounts: say whose prices with --account")
    return accounts[0]


def _show(made: Quote, work: Work, speed: Speed | None, errors: Errors | None, price: str) -> None:
    time = f"{device_seconds(made.device_ns):.3f} s on {made.device}" if made.device else "not measured yet: not priced"
    if speed is not None:
        time += f", as measured over {speed.tokens:,} trained tokens and {speed.steps:,} steps"
    rows = [
        ("trained tokens", f"{made.tokens:,} ({work.epochs} x {work.tokens:,} in {work.examples:,} examples)"),
        ("steps", f"{work.steps:,}"),
        ("device time", time),
        ("price", price),
        ("past quotes", _told(errors)),
        ("tag", f"batch:{made.id}"),
    ]
    print_table((made.id, made.base_model), rows, folds=[1], empty="")


def _told(errors: Errors | None) -> str:
    if errors is None:
        return "none was followed by training with its tag yet"
    return f"off by {errors.median:.1%} (median of {errors.number}), at worst {errors.worst:+.1%}"
