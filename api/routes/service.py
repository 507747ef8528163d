"""The service itself: health, flags, capabilities, telemetry."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from api.dependencies import CurrentKey, Joined
from api.limits import discard
from storage import base_models

router = APIRouter(prefix="/api/v1")

CONFIG = {
    # one after another: a refused chunk cannot make the client wait for ever
    "parallel_fwdbwd_chunks": False,
    # a resumed run of older clients comes to be as that of newer ones
    "create_model_via_load_weights": True,
    "proto_compress_fwdbwd": False,
    "custom_loss_server_side": False,
}
DYNAMIC_CONFIG = {"sample_cancel_enabled": True}


@router.get("/healthz")
async def healthz(services: Joined) -> JSONResponse:
    """200 while operations are accepted, with what is wrong all the same; 503 once the database cannot be read."""
    report = await services.health.report()
    return JSONResponse({"status": report.status, **report.states}, status_code=200 if report.accepting else 503)


@router.post("/client/config")
def client_config(services: Joined, _key: CurrentKey) -> dict[str, Any]:
    """Flags of the SDK, once per client."""
    return {**CONFIG, "billing_exception_max_pause_duration_sec": services.settings.budget_pause_max_s}


@router.post("/client/dynamic_config")
def dynamic_config(_key: CurrentKey) -> dict[str, Any]:
    """Flags of the SDK that it asks for again and again."""
    return DYNAMIC_CONFIG


@router.get("/get_server_capabilities")
def get_server_capabilities(services: Joined, _key: CurrentKey) -> dict[str, Any]:
    """The base models that are served."""
    with services.database.read() as tx:
        served = base_models.list_base_models(tx)
    return {
        "supported_models": [
            {
                "model_name": model.name,
                "max_context_length": model.context_length,
                "trainable": True,
                "sampleable": True,
            }
            for model in served
        ]
    }


@router.post("/telemetry")
async def telemetry(request: Request, services: Joined, _key: CurrentKey) -> dict[str, str]:
    """Accept the SDK's telemetry; it is not kept."""
    await discard(request.stream(), limit=services.settings.json_bytes_max)
    return {"status": "accepted"}
