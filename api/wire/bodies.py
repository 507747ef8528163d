"""JSON bodies of the SDK, as it sends them.

Names are the wire's. A key that is `null` counts as absent (SDK 0.16 sends explicit nulls), unknown keys are ignored
unless ignoring them would change what is computed. Whether values make sense is decided in `jobs.validation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from api.parameters import Moment
from jobs.validation.errors import InvalidOperationError
from storage.runs import BATCH_TAG

TEXT_MAX = 1024
PROJECT_MAX = 64
BATCH_MAX = 128
Id = Annotated[str, Field(min_length=1, max_length=192)]
Text = Annotated[str, Field(max_length=TEXT_MAX)]
Seq = Annotated[int, Field(ge=0, lt=2**63)]
Metadata = Annotated[dict[str, Text], Field(max_length=64)]


class Body(BaseModel):
    """A JSON object of the wire."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None}


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(model: type[AnyBody], payload: Any, where: str = "") -> AnyBody:
    """Read a JSON value as `model`.

    Raises:
        InvalidOperationError: it does not fit; names the first field that does not, its value and what is allowed.
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        raise InvalidOperationError(describe(error, where)) from error


def describe(error: ValidationError, where: str = "") -> str:
    """The first thing that is wrong, in one sentence."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join([where, *map(str, first["loc"])] if where else [str(part) for part in first["loc"]])
    given = "" if first["type"] == "missing" else f", got {_shortened(first['input'])}"
    return f"{place or 'body'}: {first['msg']}{given}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------------------ sessions


class CreateSession(Body):
    """`create_session`."""

    tags: list[Text] = Field(default_factory=list, max_length=64)
    user_metadata: Metadata = Field(default_factory=dict)
    sdk_version: Text = ""
    project_id: Annotated[str, Field(min_length=1, max_length=PROJECT_MAX)] | None = None
    display_name: Text | None = None

    @field_validator("tags")
    @classmethod
    def _batch_has_a_name(cls, tags: list[str]) -> list[str]:
        for tag in tags:
            if tag.startswith(BATCH_TAG) and not 0 < len(tag) - len(BATCH_TAG) <= BATCH_MAX:
                raise ValueError(f"the name of a batch, after `{BATCH_TAG}`, has 1 to {BATCH_MAX} characters")
        return tags


class SessionOnly(Body):
    """`session_heartbeat`."""

    session_id: Id


class FinishReason(Body):
    """Why a session ended."""

    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSession(Body):
    """`sessions/{id}/finish`."""

    reason: FinishReason = Field(default_factory=FinishReason)
    detail: str | None = None


class Owner(Body):
    """Whose sessions are searched."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = Field(default_factory=list, max_length=10)


class StatusQuery(Body):
    """One status that a search admits."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursor(Body):
    """Where the next page of a search begins."""

    last_created_at: Annotated[Moment, Field(strict=False)]
    last_session_id: str


class SearchSessions(Body):
    """`sessions/search`."""

    session_id: Id | None = None
    project_ids: list[str] | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    display_name: Annotated[Text, Field(min_length=1)] | None = None
    owner: Owner = Field(default_factory=Owner)
    statuses: list[StatusQuery] | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: SearchCursor | None = None


# -------------------------------------------------------------------------------------------------------------- models


class Lora(Body):
    """`lora_config`; an unknown key is refused, since it would ask for another adapter."""

    model_config = ConfigDict(extra="forbid")

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class Optimizer(Body):
    """`optimizer_config`: the family of the optimizer."""

    type: str = "adamw"


class CreateModel(Body):
    """`create_model`."""

    session_id: Id
    model_seq_id: Annotated[Seq, Field(lt=2**31)]
    base_model: Annotated[str, Field(min_length=1, max_length=256)]
    user_metadata: Metadata = Field(default_factory=dict)
    lora_config: Lora = Field(default_factory=Lora)
    optimizer_config: Optimizer = Field(default_factory=Optimizer)


class CreateByLoad(Body):
    """`load_weights` that makes a run."""

    session_id: Id
    model_seq_id: Annotated[Seq, Field(lt=2**31)]
    base_model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user_metadata: Metadata = Field(default_factory=dict)
    path: str
    optimizer: bool = False
    optimizer_config: Optimizer = Field(default_factory=Optimizer)
    weights_access_token: str | None = None


class ModelOnly(Body):
    """`get_info`."""

    model_id: Id


# ------------------------------------------------------------------------------------------------------------ training


class Addressed(Body):
    """What every training request has."""

    model_id: Id
    seq_id: Seq


class LoadInPlace(Body):
    """`load_weights` into a run that exists."""

    path: str
    optimizer: bool = False
    weights_access_token: str | None = None


class Adam(Body):
    """`adam_params`; SDK 0.16 sends only what the user set. Here null is what became of NaN or infinity: no number."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return value

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Body):
    """`optim_step`."""

    adam_params: Adam = Field(default_factory=Adam)
    optimizer_params: dict[str, Any] | None = None


class Save(Body):
    """`save_weights`."""

    path: str
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] = Field(default_factory=dict)


class SaveForSampler(Body):
    """`save_weights_for_sampler`: named by `path`, or ephemeral."""

    path: str | None = None
    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)


class SaveExternal(Body):
    """`save_weights_external`."""

    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] = Field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------ sampling


class CreateSamplingSession(Body):
    """`create_sampling_session`."""

    session_id: Id
    sampling_session_seq_id: Seq
    base_model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    model_path: Text | None = None


class SamplingSessionOnly(Body):
    """`join_sampling_session`."""

    sampling_session_id: Id


class SampleAddress(Body):
    """Where a sample belongs."""

    sampling_session_id: Id
    seq_id: Seq


class Params(Body):
    """`sampling_params`; an unknown key is refused, since it would ask for other tokens."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[Any] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Body):
    """`asample`, but for its prompt and tensors, which `json_requests` reads without copying each number."""

    sampling_params: Params = Field(default_factory=Params)
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool = False


# ------------------------------------------------------------------------------------------------------------- futures


class RetrieveFuture(Body):
    """`retrieve_future`."""

    request_id: Annotated[str, Field(min_length=1, max_length=256)]
    allow_metadata_only: bool = False


class SamplingTarget(Body):
    """What `retrieve_futures` polls."""

    sampling_session_id: Id
    cloned_sampler_id: Seq = 0


class RetrieveFutures(Body):
    """`retrieve_futures`."""

    target: SamplingTarget
    prev_cursor: Seq = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = Field(default_factory=list)


class RequestOnly(Body):
    """`cancel_future`."""

    request_id: Annotated[str, Field(min_length=1, max_length=256)]


# --------------------------------------------------------------------------------------------------------- checkpoints


class PathOnly(Body):
    """`weights_info`."""

    tinker_path: Text


class CopyWeights(Body):
    """`copy_weights`, with either addressing of the new run."""

    source_path: Text
    destination_project_id: Id | None = None
    session_id: Id | None = None
    model_seq_id: Annotated[Seq, Field(lt=2**31)] | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class Ttl(Body):
    """`…/ttl`: absent or null removes the expiry."""

    ttl_seconds: int | None = None
