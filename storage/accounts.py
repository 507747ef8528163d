"""Accounts and their API keys. A key is stored as its SHA-256: 256 random bits need no slow hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Select, insert, select, update

from storage import ids, tables
from storage.errors import RowNotFoundError


@dataclass(frozen=True)
class Account:
    """Who owns runs and pays for them."""

    id: str
    name: str
    created_at: datetime


@dataclass(frozen=True)
class ApiKey:
    """A credential, without its secret: `hint` is its last characters."""

    id: int
    account_id: str
    name: str
    hint: str
    created_at: datetime
    revoked_at: datetime | None


class AccountExistsError(ValueError):
    """There is an account of this name already."""


def create_account(tx: Connection, name: str, *, now: datetime) -> Account:
    """Add an account.

    Raises:
        AccountExistsError: the name is taken.
    """
    if find_account(tx, name) is not None:
        raise AccountExistsError(f"there is an account {name!r} already")
    account = Account(id=f"acc-{ids.new_token()}", name=name, created_at=now)
    tx.execute(insert(tables.account).values(id=account.id, name=name, created_at=now))
    return account


def name_of(tx: Connection, account_id: str) -> str:
    """The name of the account with this id."""
    table = tables.account.c
    name: str = tx.execute(select(table.name).where(table.id == account_id)).scalar_one()
    return name


def find_account(tx: Connection, name: str) -> Account | None:
    """The account of this name."""
    row = tx.execute(select(tables.account).where(tables.account.c.name == name)).one_or_none()
    return None if row is None else Account(**row._mapping)


def get_account(tx: Connection, name: str) -> Account:
    """The account of this name.

    Raises:
        RowNotFoundError: there is none.
    """
    account = find_account(tx, name)
    if account is None:
        raise RowNotFoundError("account", name)
    return account


def get_account_by_id(tx: Connection, account_id: str) -> Account:
    """The account with this id.

    Raises:
        RowNotFoundError: there is none.
    """
    row = tx.execute(select(tables.account).where(tables.account.c.id == account_id)).one_or_none()
    if row is None:
        raise RowNotFoundError("account", account_id)
    return Account(**row._mapping)


def list_accounts(tx: Connection) -> Sequence[Account]:
    """All accounts, oldest first."""
    rows = tx.execute(select(tables.account).order_by(tables.account.c.created_at))
    return [Account(**row._mapping) for row in rows]


def create_key(tx: Connection, account_id: str, *, name: str, now: datetime) -> str:
    """Add an API key and return its secret: the only time it is known."""
    secret = ids.new_api_key()
    tx.execute(
        insert(tables.api_key).values(
            account_id=account_id, name=name, hash=_hash(secret), hint=secret[-4:], created_at=now
        )
    )
    return secret


def find_key(tx: Connection, secret: str) -> ApiKey | None:
    """The unrevoked key with this secret."""
    key = tables.api_key
    row = tx.execute(_key_columns().where(key.c.hash == _hash(secret), key.c.revoked_at.is_(None))).one_or_none()
    return None if row is None else ApiKey(**row._mapping)


def list_keys(tx: Connection, account_id: str) -> Sequence[ApiKey]:
    """An account's keys, oldest first, revoked ones included."""
    rows = tx.execute(_key_columns().where(tables.api_key.c.account_id == account_id).order_by(tables.api_key.c.id))
    return [ApiKey(**row._mapping) for row in rows]


def is_key(tx: Connection, key_id: int) -> bool:
    """Whether there is a key with this number, valid or not."""
    return tx.execute(select(tables.api_key.c.id).where(tables.api_key.c.id == key_id)).one_or_none() is not None


def revoke_key(tx: Connection, key_id: int, *, now: datetime) -> None:
    """End a key; revoking it again changes nothing.

    Raises:
        RowNotFoundError: there is no such key.
    """
    key = tables.api_key
    if tx.execute(select(key.c.id).where(key.c.id == key_id)).one_or_none() is None:
        raise RowNotFoundError("API key", key_id)
    tx.execute(update(key).where(key.c.id == key_id, key.c.revoked_at.is_(None)).values(revoked_at=now))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key_columns() -> Select[tuple[int, str, str, str, datetime, datetime | None]]:
    key = tables.api_key.c
    return select(key.id, key.account_id, key.name, key.hint, key.created_at, key.revoked_at)
