"""`piecework billing`: the bill, checked."""

from __future__ import annotations

import click

from api.cli.billing_verify import verify


@click.group()
def billing() -> None:
    """Check the bill; see also `piecework cost`.

    Everything is read from the ledger and from usage records.
    """


billing.add_command(verify)
