"""Sampling sessions, and samples drawn from them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from api import sampling
from api.dependencies import CurrentKey, Joined, JsonBody, json_of
from api.wire import bodies
from storage import ids, runs

router = APIRouter(prefix="/api/v1")


@router.post("/create_sampling_session")
def create_sampling_session(
    services: Joined,
    key: CurrentKey,
    body: Annotated[bodies.CreateSamplingSession, Depends(json_of(bodies.CreateSamplingSession))],
) -> dict[str, Any]:
    """Open a sampling session on a base model or a checkpoint."""
    session = sampling.create_session(services, key.account_id, body)
    return {"type": "create_sampling_session", "sampling_session_id": session.id}


@router.post("/join_sampling_session")
def join_sampling_session(
    services: Joined,
    key: CurrentKey,
    body: Annotated[bodies.SamplingSessionOnly, Depends(json_of(bodies.SamplingSessionOnly))],
) -> dict[str, Any]:
    """Give a copy of a sampling client its number."""
    with services.database.begin() as tx:
        session = runs.get_sampling_session(tx, body.sampling_session_id, account_id=key.account_id)
        return {"client_counter": runs.join_sampling_session(tx, session.id)}


@router.get("/samplers/{sampler_id}")
def get_sampler(services: Joined, key: CurrentKey, sampler_id: str) -> dict[str, Any]:
    """On what a sampling session stands."""
    with services.database.read() as tx:
        session = runs.get_sampling_session(tx, sampler_id, account_id=key.account_id)
    return {"sampler_id": session.id, "base_model": session.base_model, "model_path": session.model_path}


@router.post("/asample")
def asample(services: Joined, key: CurrentKey, payload: JsonBody) -> dict[str, Any]:
    """Accept a sample."""
    accepted, num_samples = sampling.accept(services, key.account_id, payload)
    sequence_ids = [ids.sequence_id(accepted.request_id, index) for index in range(num_samples)]
    return {"request_id": accepted.request_id, "sample_sequence_ids": sequence_ids}
