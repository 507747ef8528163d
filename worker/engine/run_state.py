"""Everything that training changes in a run: adapter, accumulated gradients, Adam's moments, step.

Two forms on storage, both safetensors, nothing pickled. A *snapshot* holds all of it, flat, to go on exactly where it
was taken. A *checkpoint* holds the adapter under PEFT's names and the optimizer's state beside it, and no gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import structlog
import torch
from torch import Tensor

from jobs.operations import LoraConfig
from worker.engine.adapter import Adapter, Factors, Layout
from worker.engine.adapter_file import write_adapter
from worker.engine.base_model import BaseModel
from worker.engine.errors import UnreadableStateError
from worker.engine.files import (
    FORMAT_VERSION,
    Header,
    check_metadata,
    read_into,
    read_tensors,
    write_pieces,
    write_tensors,
)
from worker.engine.numerics import differences

log = structlog.get_logger()

SNAPSHOT, CHECKPOINT = "piecework-snapshot", "piecework-checkpoint"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Staging:
    """Memory on the host that copies of states go to, one at a time.

    It is used again and again: the pages of fresh memory would keep the engine waiting far longer than the copying.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of flat fp32 buffers; those of the call before are gone."""
        numel = sum(buffer.numel() for buffer in buffers.values())
        if numel > self._memory.numel():
            on_cuda = any(buffer.is_cuda for buffer in buffers.values())
            self._memory = torch.empty(numel, pin_memory=on_cuda)
        copies: dict[str, Tensor] = {}
        for name, buffer in buffers.items():
            start = sum(copy.numel() for copy in copies.values())
            copies[name] = self._memory[start : start + buffer.numel()].copy_(buffer)
        return copies


@dataclass(frozen=True, eq=False)
class StateCopy:
    """A snapshot in memory, as long as its staging is not used again."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def pieces(self) -> list[bytes | memoryview]:
        """The snapshot's file, in pieces."""
        return write_pieces(self.tensors, self.metadata)


class RunState:
    """State of one run, on the base model's device.

    Attributes:
        base_model_name: what it is trained on.
        lora: what is adapted, and how.
        adapter: the weights.
        gradients: accumulated since the last optimizer step.
        exp_avg, exp_avg_sq: Adam's moments, laid out as the adapter.
        numerics: what its bits were computed with, see `worker/engine/numerics.py`.
        step: optimizer steps taken.
        num_accumulated: `forward_backward` operations whose gradients are accumulated.
    """

    def __init__(self, base_model: BaseModel, adapter: Adapter) -> None:
        """State of a run that has these weights and has done nothing yet."""
        self.base_model_name = base_model.name
        self.numerics = base_model.numerics
        self.lora = adapter.lora
        self.adapter = adapter
        device, layout = adapter.flat.device, adapter.layout
        self.gradients = Factors.zeros(layout, device)
        self.exp_avg = Factors.zeros(layout, device)
        self.exp_avg_sq = Factors.zeros(layout, device)
        self.step = 0
        self.num_accumulated = 0

    @classmethod
    def create(cls, base_model: BaseModel, lora: LoraConfig) -> RunState:
        """State of a new run, drawn from `lora.seed`.

        Raises:
            UnsupportedAdapterError: the base model has no such adapter.
        """
        return cls(base_model, Adapter.create(base_model.layout(lora), lora, base_model.device))

    @property
    def nbytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return 4 * self.adapter.nbytes

    def clear_gradients(self) -> None:
        """Forget what has accumulated."""
        self.gradients.flat.zero_()
        self.num_accumulated = 0

    def copy(self, staging: Staging) -> StateCopy:
        """The snapshot, as a copy: everything, bit for bit; buffers that are zero by nature are left out.

        On the engine's thread, which goes on with the state afterwards.
        """
        metadata = {**_identity(SNAPSHOT, self.base_model_name, self.lora, self.adapter.layout), **self._counters()}
        metadata["numerics"] = json.dumps(self.numerics, sort_keys=True)
        return StateCopy(staging.take(self._stored_buffers()), metadata)

    @classmethod
    def deserialize(cls, base_model: BaseModel, lora: LoraConfig, chunks: Iterable[bytes]) -> RunState:
        """The state whose snapshot the bytes are.

        Raises:
            UnreadableStateError: damaged, or of another base model or adapter configuration.
        """
        layout = base_model.layout(lora)
        state = cls(base_model, Adapter(layout, _zeros(layout, base_model), lora))
        on_host: dict[str, Tensor] = {}

        def choose(header: Header) -> dict[str, Tensor]:
            check_metadata(header.metadata, _identity(SNAPSHOT, base_model.name, lora, layout))
            state._read_counters(header.metadata)
            _warn_of_other_numerics(header.metadata, state)
            wanted = dict.fromkeys(state._stored_buffers(), (layout.numel,))
            if header.shapes != wanted:
                raise UnreadableStateError(f"snapshot holds {dict(header.shapes)}, this run's holds {wanted}")
            on_host.update({name: buffer.cpu() for name, buffer in state._stored_buffers().items()})
            return on_host

        read_into(chunks, choose)
        for name, buffer in state._stored_buffers().items():
            if buffer.device.type != "cpu":  # on CPU it is the same memory
                buffer.copy_(on_host[name])
        return state

    def _stored_buffers(self) -> dict[str, Tensor]:
        """What a snapshot holds."""
        buffers = {"weights": self.adapter.flat}
        if self.num_accumulated:
            buffers["gradients"] = self.gradients.flat
        if self.step:
            buffers |= {name: getattr(self, name).flat for name in _MOMENTS}
        return buffers

    def checkpoint_bytes(self) -> bytes:
        """The checkpoint: LoRA tensors by PEFT's names, and the optimizer's state under `optimizer.…`."""
        tensors = self.adapter.to_peft_tensors()
        for name in _MOMENTS:
            moments: Factors = getattr(self, name)
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in moments.to_peft_tensors().items()}
        metadata = {**_identity(CHECKPOINT, self.base_model_name, self.lora, self.adapter.layout), **self._counters()}
        return write_tensors(tensors, metadata)

    @classmethod
    def from_checkpoint(cls, base_model: BaseModel, lora: LoraConfig, data: bytes, *, with_optimizer: bool) -> RunState:
        """State of a run that starts from a checkpoint; no gradients are accumulated.

        Args:
            base_model: on which the checkpoint was trained.
            lora: the run's configuration; only its seed may differ from the checkpoint's.
            data: of a checkpoint, or without the optimizer of sampler weights.
            with_optimizer: take over moments and step; otherwise they start at zero.

        Raises:
            UnreadableStateError: damaged, of another base model or adapter, or without an optimizer's state.
        """
        tensors, metadata = read_tensors(data)
        if metadata.get("base_model", base_model.name) != base_model.name:
            raise UnreadableStateError(
                f"checkpoint was trained on {metadata['base_model']!r}, this run trains {base_model.name!r}"
            )
        _check_alpha(metadata, lora)
        layout = base_model.layout(lora)
        weights = {key: tensor for key, tensor in tensors.items() if not key.startswith("optimizer.")}
        state = cls(base_model, Adapter.from_peft(layout, lora, weights, base_model.device))
        if with_optimizer:
            if metadata.get("kind") != CHECKPOINT:
                raise UnreadableStateError(
                    "checkpoint holds no optimizer state; load it without the optimizer, or name one of save_state"
                )
            for name in _MOMENTS:
                prefix = f"optimizer.{name}."
                moments = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                getattr(state, name).copy_from_peft_tensors(moments)
            state._read_counters({**metadata, "num_accumulated": "0"})
        return state

    def sampler_files(self) -> dict[str, bytes]:
        """Files of the adapter as `peft` loads them: `adapter_config.json` and `adapter_model.safetensors`."""
        return write_adapter(self.adapter, self.base_model_name)

    def _counters(self) -> dict[str, str]:
        return {"step": str(self.step), "num_accumulated": str(self.num_accumulated)}

    def _read_counters(self, metadata: Mapping[str, str]) -> None:
        try:
            self.step, self.num_accumulated = int(metadata["step"]), int(metadata["num_accumulated"])
        except (KeyError, ValueError) as error:
            raise UnreadableStateError("stored state does not say its step; it is damaged") from error


def _identity(kind: str, base_model_name: str, lora: LoraConfig, layout: Layout) -> dict[str, str]:
    return {
        "kind": kind,
        "version": FORMAT_VERSION,
        "base_model": base_model_name,
        "lora": json.dumps(asdict(lora), sort_keys=True),
        "layout": json.dumps(layout.describe(), sort_keys=True),
    }


def _warn_of_other_numerics(metadata: Mapping[str, str], state: RunState) -> None:
    """A run that goes on where bits are other ones is replayed within rounding only, which must not go unnoticed."""
    changed = differences(json.loads(metadata["numerics"]), state.numerics) if "numerics" in metadata else {}
    if changed:
        log.warning("numerics_differ", base_model=state.base_model_name, snapshot_and_here=changed)


def _check_alpha(metadata: dict[str, str], lora: LoraConfig) -> None:
    stored = json.loads(metadata["lora"]) if "lora" in metadata else {}
    for name in ("rank", "alpha"):
        if name in stored and stored[name] != getattr(lora, name):
            raise UnreadableStateError(f"checkpoint has LoRA {name} {stored[name]}, this run has {getattr(lora, name)}")


def _zeros(layout: Layout, base_model: BaseModel) -> Tensor:
    return torch.zeros(layout.numel, dtype=torch.float32, device=base_model.device)
