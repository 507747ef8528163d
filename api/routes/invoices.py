"""The account's invoices."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Response

from api import invoice_csv, schemas
from api.dependencies import CurrentKey, Joined
from api.parameters import Offset
from billing import invoices
from billing.settings import BillingSettings

router = APIRouter(prefix="/api/v1/invoices")


@router.get("")
def list_invoices(
    services: Joined,
    key: CurrentKey,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Offset = 0,
) -> dict[str, Any]:
    """Invoices and credit notes, newest first."""
    with services.database.read() as tx:
        found = invoices.list_invoices(tx, account_id=key.account_id, limit=limit, offset=offset)
    return {"invoices": [schemas.invoice(each) for each in found]}


@router.get("/{number}")
def get_invoice(
    services: Joined,
    key: CurrentKey,
    number: Annotated[int, Path(ge=1, le=2**62)],
    accept: Annotated[str, Header()] = "application/json",
    wanted: Annotated[Literal["json", "csv", "pdf"] | None, Query(alias="format")] = None,
) -> Response:
    """One of them, as it was issued: JSON, or CSV or PDF where that is asked for."""
    with services.database.read() as tx:
        invoice = invoices.get(tx, number, account_id=key.account_id)
        text, document = invoices.text(tx, invoice), invoices.document(tx, invoice)
    if wanted == "csv" or (wanted is None and "text/csv" in accept):
        return Response(invoice_csv.render(document), media_type="text/csv")
    if wanted == "pdf" or (wanted is None and "application/pdf" in accept):
        from api import invoice_pdf  # a sixth of all that an api process would import before it answers

        content = invoice_pdf.render(document, font=BillingSettings().invoice_font)
        return Response(content, media_type="application/pdf")
    return Response(text, media_type="application/json")
