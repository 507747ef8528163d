"""Accounts and base models by the names that a person gives; an unknown one is answered with those there are."""

from __future__ import annotations

import shlex

from sqlalchemy import Connection

from api.cli.errors import CliError
from storage import accounts, base_models
from storage.accounts import Account
from storage.base_models import BaseModel
from storage.errors import RowNotFoundError


def get_account(tx: Connection, name: str) -> Account:
    """The account of this name.

    Raises:
        CliError: there is none.
    """
    try:
        return accounts.get_account(tx, name)
    except RowNotFoundError as error:
        names = ", ".join(one.name for one in accounts.list_accounts(tx)) or "none"
        add = f"piecework accounts create {shlex.quote(name)}"
        raise CliError(f"there is no account {name!r} (accounts: {names}); add one: {add}") from error


def get_base_model(tx: Connection, name: str) -> BaseModel:
    """The base model that is served under this name.

    Raises:
        CliError: there is none.
    """
    try:
        return base_models.get_base_model(tx, name)
    except RowNotFoundError as error:
        served = ", ".join(one.name for one in base_models.list_base_models(tx)) or "none"
        add = f"piecework models add {shlex.quote(name)}"
        raise CliError(f"there is no base model {name!r} (served: {served}); add one: {add}") from error
