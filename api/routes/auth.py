"""The API key that was presented: what it is, and its end."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from api.dependencies import CurrentKey, Joined
from storage import accounts

router = APIRouter(prefix="/api/v1/auth")


@router.get("/apikey/me")
def get_my_key(services: Joined, key: CurrentKey) -> dict[str, Any]:
    """The key and its account; `tinker auth login` checks a pasted key with it."""
    with services.database.read() as tx:
        account = accounts.get_account_by_id(tx, key.account_id)
    return {
        "key_id": key.id,
        "name": key.name,
        "note": f"ends in {key.hint}",
        "details": {"org_details": {"name": account.name}, "user_details": {"email": f"{account.name}@piecework"}},
    }


@router.delete("/apikey/me", status_code=204)
def revoke_my_key(services: Joined, key: CurrentKey) -> Response:
    """End the key that was presented."""
    with services.database.begin() as tx:
        accounts.revoke_key(tx, key.id, now=services.database.now(tx))
    return Response(status_code=204)
