"""Body and outcome of every kind of operation, as values.

These are what the journal stores (msgpack, arrays as little-endian bytes) and what the engine computes on. They know
neither HTTP nor torch. What always holds: `decode(encode(x)) == x`, and decoding runs no code of the sender.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import msgpack
import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 1

Array = npt.NDArray[Any]


class Kind(StrEnum):
    """Kinds of operation, as they stand in the journal, in usage records and on rate cards."""

    CREATE_MODEL = "create_model"
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAVE_STATE = "save_state"
    SAVE_FOR_SAMPLER = "save_weights_for_sampler"
    SAVE_EXTERNAL = "save_weights_external"
    LOAD_STATE = "load_state"
    SAMPLE = "sample"
    GAP = "gap"
    """Stands in the place of a `seq` that never arrived; always failed."""


class Category(StrEnum):
    """Whose fault a failed operation is, as the SDK understands it."""

    USER = "user"
    SERVER = "server"


# ---------------------------------------------------------------------------------------------------- building blocks


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how. Scaling is `alpha / rank`."""

    rank: int = 32
    seed: int = 0
    """Given by the client, or drawn when the operation is accepted, so that a replay starts from the same weights."""
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = 32.0


@dataclass(frozen=True, eq=False)
class Datum:
    """One training example.

    Attributes:
        tokens: int64 `[N]`, the model input.
        inputs: the loss's inputs by name, each `[N]` or, for `target_tokens` and `weights`, `[N, K]` (already dense);
            int64 for token ids, float32 for the rest.
    """

    tokens: Array
    inputs: Mapping[str, Array] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- bodies


@dataclass(frozen=True)
class CreateModel:
    """Make a run: LoRA weights drawn from `lora.seed`, no gradients, no moments."""

    kind: ClassVar[Kind] = Kind.CREATE_MODEL
    base_model: str
    lora: LoraConfig


@dataclass(frozen=True, eq=False)
class ForwardBackward:
    """Log-probabilities of the targets and, unless `forward_only`, gradients added to the run's accumulators."""

    data: tuple[Datum, ...]
    loss_fn: str
    loss_config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False

    @property
    def kind(self) -> Kind:
        """`forward` or `forward_backward`."""
        return Kind.FORWARD if self.forward_only else Kind.FORWARD_BACKWARD

    @property
    def num_tokens(self) -> int:
        """Tokens of all datums together."""
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True)
class OptimStep:
    """One AdamW step with decoupled weight decay; consumes and zeroes the accumulated gradients."""

    kind: ClassVar[Kind] = Kind.OPTIM_STEP
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Global L2 norm to which gradients are clipped; 0 is off."""


@dataclass(frozen=True)
class SaveState:
    """Publish adapter and optimizer state as checkpoint `name`."""

    kind: ClassVar[Kind] = Kind.SAVE_STATE
    name: str
    ttl_s: int | None = None
    overwrite: bool = False
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveForSampler:
    """Store the adapter for sampling: as checkpoint `name`, or as the ephemeral sampling session given."""

    kind: ClassVar[Kind] = Kind.SAVE_FOR_SAMPLER
    name: str | None = None
    sampling_session_seq: int | None = None
    ttl_s: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveExternal:
    """Publish the adapter in PEFT's file format for download."""

    kind: ClassVar[Kind] = Kind.SAVE_EXTERNAL
    name: str
    ttl_s: int | None = None


@dataclass(frozen=True)
class LoadState:
    """Replace a run's weights (and optimizer state) by a checkpoint's; as operation 0 it makes the run.

    Attributes:
        object_key: the checkpoint's weights where the name was resolved when the operation was accepted (it makes the
            run). Otherwise the worker resolves it in `seq` order and records the key in the operation's row, so that a
            replay loads the same bytes whatever the name has come to mean since.
    """

    kind: ClassVar[Kind] = Kind.LOAD_STATE
    path: str
    with_optimizer: bool
    object_key: str | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn."""

    max_tokens: int | None = None
    """None: as long as the context allows."""
    seed: int = 0
    """Given by the client, or drawn when the operation is accepted."""
    stop: tuple[str, ...] | tuple[int, ...] | None = None
    """None: the model's end-of-sequence tokens; empty: never; strings or token ids: when one of them appears."""
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True, eq=False)
class Sample:
    """Draw `num_samples` continuations of one prompt.

    Attributes:
        prompt: int64 `[P]`.
        prompt_logprobs: whether to score the prompt itself (temperature 1).
        prompt_logprobs_last_n: score only the last n positions of the prompt.
        topk_prompt_logprobs: k best tokens at each prompt position; 0 is off.
        topk_sample_logprobs: k best tokens at each sampled position; 0 is off.
        target_prompt_logprobs: int64 `[P-1, K]`, tokens to be scored at prompt position i+1; -1 is none.
    """

    kind: ClassVar[Kind] = Kind.SAMPLE
    prompt: Array
    num_samples: int = 1
    params: SamplingParams = field(default_factory=SamplingParams)
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Array | None = None


Body = CreateModel | ForwardBackward | OptimStep | SaveState | SaveForSampler | SaveExternal | LoadState | Sample


# ----------------------------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Failure:
    """An operation that failed: why, in words that say what to change, and whose fault it is."""

    error: str
    category: Category = Category.USER


@dataclass(frozen=True)
class ModelCreated:
    """The run is ready."""

    run_id: str


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutcome:
    """What a `forward` or `forward_backward` computed.

    Attributes:
        logprobs: per datum float32 `[N]` or `[N, K]`, in the order of the request.
        metrics: `name:reduction` → value; always has `loss:sum`.
    """

    logprobs: tuple[Array, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class OptimStepOutcome:
    """Metrics of a step, e.g. `grad_norm` (before clipping) and `step`."""

    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    """Weights are stored: under a checkpoint path, or as a sampling session."""

    path: str | None = None
    sampling_session_id: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Loaded:
    """Weights are in the run."""

    run_id: str
    path: str


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One continuation.

    Attributes:
        tokens: int32 `[S]`, with the stop token (or the tokens of the stop string) last.
        logprobs: float32 `[S]`, under the tempered distribution.
        stopped: True for a stop token or string, False when `max_tokens` or the context ended it.
        topk_tokens, topk_logprobs: int32 and float32 `[S, k]` if asked for.
    """

    tokens: Array
    logprobs: Array
    stopped: bool
    topk_tokens: Array | None = None
    topk_logprobs: Array | None = None


@dataclass(frozen=True, eq=False)
class SampleOutcome:
    """What a `sample` drew.

    Attributes:
        sequences: `num_samples` of them, in order.
        prompt_logprobs: float32 `[P]`, NaN where not scored (always at 0), or None.
        topk_prompt_tokens, topk_prompt_logprobs: int32 and float32 `[P, k]`; unscored rows are token 0, -99999.0.
        target_prompt_logprobs: float32 `[P-1, K]`, 0.0 where the target was -1, or None.
        prompt_cache_hit_tokens: prompt tokens whose keys and values were at hand.
    """

    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: Array | None = None
    topk_prompt_tokens: Array | None = None
    topk_prompt_logprobs: Array | None = None
    target_prompt_logprobs: Array | None = None
    prompt_cache_hit_tokens: int = 0


Outcome = ModelCreated | ForwardBackwardOutcome | OptimStepOutcome | Saved | Loaded | SampleOutcome | Failure

_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        LoraConfig,
        Datum,
        CreateModel,
        ForwardBackward,
        OptimStep,
        SaveState,
        SaveForSampler,
        SaveExternal,
        LoadState,
        SamplingParams,
        Sample,
        Failure,
        ModelCreated,
        ForwardBackwardOutcome,
        OptimStepOutcome,
        Saved,
        Loaded,
        SampledSequence,
        SampleOutcome,
    )
}
_TYPE, _ARRAY, _TUPLE, _MAP = "$type", "$array", "$tuple", "$map"
_DTYPES = {"<f4": np.float32, "<f8": np.float64, "<i4": np.int32, "<i8": np.int64, "|b1": np.bool_}


class UnreadableOperationError(ValueError):
    """Stored bytes are not an operation of a known version; they were damaged or written by a newer release."""


def encode(value: Body | Outcome) -> bytes:
    """Bytes of a body or an outcome, as stored in the journal or the object store."""
    packed: bytes = msgpack.packb({"v": FORMAT_VERSION, "value": _to_plain(value)}, use_bin_type=True)
    return packed


def decode(data: bytes) -> Any:
    """The body or outcome that `encode` made the bytes of.

    Raises:
        UnreadableOperationError: not such bytes, or of a later format version.
    """
    try:
        envelope = msgpack.unpackb(data, raw=False, strict_map_key=False)
        if envelope["v"] > FORMAT_VERSION:
            raise UnreadableOperationError(f"operation has format {envelope['v']}, this release reads {FORMAT_VERSION}")
        value = _from_plain(envelope["value"])
        if type(value) not in _TYPES.values():
            raise UnreadableOperationError(f"stored bytes hold a {type(value).__name__}, not an operation")
        return value
    except UnreadableOperationError:
        raise
    except Exception as error:
        raise UnreadableOperationError(f"stored operation cannot be read: {error}") from error


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_TYPE: type(value).__name__, **plain}
    if isinstance(value, np.ndarray):
        dtype = value.dtype.newbyteorder("<").str
        if dtype not in _DTYPES:
            raise TypeError(f"an operation holds arrays of {sorted(_DTYPES)}, not {dtype}")
        return {_ARRAY: [dtype, list(value.shape), np.ascontiguousarray(value).astype(dtype, copy=False).tobytes()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_to_plain(item) for item in value]}
    if isinstance(value, Mapping):
        return {_MAP: [[key, _to_plain(item)] for key, item in value.items()]}
    return value


def _from_plain(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    if _ARRAY in plain:
        dtype, shape, data = plain[_ARRAY]
        return np.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape)
    if _TUPLE in plain:
        return tuple(_from_plain(item) for item in plain[_TUPLE])
    if _TYPE in plain:
        cls = _TYPES[plain[_TYPE]]
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: _from_plain(item) for key, item in plain.items() if key in known})
    return {key: _from_plain(item) for key, item in plain[_MAP]}
