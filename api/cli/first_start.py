"""What `serve` prepares before processes start: the tables, and on the very first start an account and a key.

The key is printed once and stored only as a hash. Later starts say which key was shown and how to make another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from billing import rate_cards
from storage import accounts, base_models
from storage.accounts import Account
from storage.database import Database
from storage.migrate import migrate

DEFAULT_ACCOUNT = "default"


@dataclass(frozen=True)
class Prepared:
    """What a start found or made.

    Attributes:
        new_key: the secret, on the first start only.
        old_key: which key was shown before, in words; None if no key is valid any more.
        base_models: names of those that are served.
    """

    new_key: str | None
    old_key: str | None
    base_models: tuple[str, ...]


def prepare(database: Database) -> Prepared:
    """Bring the tables up to date, have the settings' prices in force, and make sure that somebody can get in.

    Raises:
        RateCardError: the rate card is in another currency than the first one.
    """
    migrate(database)
    with database.begin() as tx:
        rate_cards.install_from_settings(tx, now=database.now(tx))
        names = tuple(model.name for model in base_models.list_base_models(tx))
        known = accounts.list_accounts(tx)
        if known:
            return Prepared(None, _first_valid_key(tx, known), names)
        now = database.now(tx)
        account = accounts.create_account(tx, DEFAULT_ACCOUNT, now=now)
        return Prepared(accounts.create_key(tx, account.id, name="first start", now=now), None, names)


def _first_valid_key(tx: Connection, known: Sequence[Account]) -> str | None:
    for account in known:
        for key in accounts.list_keys(tx, account.id):
            if key.revoked_at is None:
                return f"…{key.hint} of account {account.name} was shown when it was made, {key.created_at:%Y-%m-%d}"
    return None
