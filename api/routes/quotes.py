"""What training would cost, before it is run."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from api import schemas
from api.acceptance import unknown_base_model
from api.dependencies import CurrentKey, Joined, json_of
from api.errors import BadRequestError, NotFoundError
from api.examples import ExampleError, TokenCounter
from billing import quotes, rate_cards
from billing.money import AmountError
from billing.quotes import Work
from storage import base_models

router = APIRouter(prefix="/api/v1/quotes")


class QuoteRequest(BaseModel):
    """What is to be trained: the examples themselves, or how many there are and their tokens."""

    model_config = ConfigDict(extra="forbid")

    base_model: str = Field(max_length=256)
    data: list[Any] | None = Field(None, min_length=1)
    examples: int | None = Field(None, ge=1, le=2**40)
    tokens: int | None = Field(None, ge=1, le=2**50)
    epochs: int = Field(1, ge=1, le=10**6)
    batch_size: int = Field(32, ge=1, le=10**6)
    device: str | None = Field(None, max_length=128)


@router.post("")
def make_quote(
    services: Joined, key: CurrentKey, wanted: Annotated[QuoteRequest, Depends(json_of(QuoteRequest))]
) -> dict[str, Any]:
    """Quote it: tokens, device time, amount, and how far off past quotes were."""
    with services.database.read() as tx:
        model = base_models.find_base_model(tx, wanted.base_model)
        if model is None:
            raise NotFoundError(unknown_base_model(tx, wanted.base_model))
    if wanted.data is not None:
        counter = TokenCounter(services.storage.objects, model)
        try:
            lengths = [counter.count(each, f"data[{place}]") for place, each in enumerate(wanted.data)]
        except ExampleError as error:
            raise BadRequestError(str(error)) from error
        examples, tokens = len(lengths), sum(lengths)
    elif wanted.examples is not None and wanted.tokens is not None:
        examples, tokens = wanted.examples, wanted.tokens
    else:
        raise BadRequestError("say what is to be trained: `data`, or both `examples` and `tokens`")
    work = Work(examples, tokens, wanted.epochs, wanted.batch_size)
    with services.database.read() as tx:
        now = services.database.now(tx)
        speed = quotes.find_speed(tx, model.name, now=now, device=wanted.device)
        errors = quotes.errors(quotes.past(tx, key.account_id, model.name))
    try:
        with services.database.begin() as tx:
            made = quotes.make(tx, key.account_id, model.name, work, speed, now=now)
            currency = rate_cards.currency(tx)
    except AmountError as error:
        raise BadRequestError(str(error)) from error
    return schemas.new_quote(made, work, speed, errors, currency)


@router.get("")
def list_quotes(
    services: Joined, key: CurrentKey, base_model: Annotated[str | None, Query(max_length=256)] = None
) -> dict[str, Any]:
    """The account's newest quotes, and what became of those whose id a batch was named after."""
    with services.database.read() as tx:
        found, currency = quotes.past(tx, key.account_id, base_model), rate_cards.currency(tx)
    return {
        "quotes": [schemas.past_quote(each, currency) for each in found],
        "past": schemas.quote_errors(quotes.errors(found)),
    }
