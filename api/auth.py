"""API key → account."""

from __future__ import annotations

from sqlalchemy import Connection

from api.errors import UnauthorizedError
from storage import accounts, ids
from storage.accounts import ApiKey


def authenticate(tx: Connection, secret: str | None) -> ApiKey:
    """The key whose secret was presented; it names the account that everything is done for.

    Raises:
        UnauthorizedError: no secret, not one of ours, unknown or revoked.
    """
    if not secret or not secret.startswith(ids.KEY_PREFIX):
        raise UnauthorizedError
    key = accounts.find_key(tx, secret)
    if key is None:
        raise UnauthorizedError
    return key
