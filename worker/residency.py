"""What a worker keeps in memory: base models and sampling adapters. Caches, filled from the object store, bounded."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import AutoTokenizer

from storage import base_models
from storage.base_models import BaseModel as ServedModel
from storage.open import Storage
from storage.runs import SamplingSession
from worker import faults
from worker.engine.adapter import Adapter
from worker.engine.adapter_file import read_adapter
from worker.engine.base_model import BaseModel
from worker.engine.numerics import HEAD_ROWS, SEGMENT_TOKENS, is_deterministic
from worker.engine.trainer import Trainer
from worker.errors import ModelUnavailableError
from worker.sampler.sampler import Sampler
from worker.settings import WorkerSettings

log = structlog.get_logger()

COMPLETE_MARK = ".complete"


@dataclass(frozen=True)
class ResidentModel:
    """A base model in memory, and what computes on it."""

    base: BaseModel
    trainer: Trainer
    sampler: Sampler


class BaseModels:
    """The base models in memory, the least recently used first."""

    def __init__(self, storage: Storage, settings: WorkerSettings, device: torch.device) -> None:
        self._storage = storage
        self._settings = settings
        self._device = device
        self._resident: OrderedDict[str, ResidentModel] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        """Held for as long as a model is loaded: one after the other, and those in memory are not kept waiting."""

    def get(self, name: str, *, in_use: Collection[str]) -> ResidentModel:
        """The model, loaded if need be; makes room by dropping models that are not `in_use`.

        Raises:
            ModelUnavailableError: it is not served, or its files cannot be loaded.
            StorageError: the store does not answer; trying again may help.
        """
        resident = self._find(name)
        if resident is not None:
            return resident
        with self._loading:
            resident = self._find(name)
            if resident is None:
                with self._lock:
                    self._make_room(in_use)
                resident = self._load(name)
                with self._lock:
                    self._resident[name] = resident
            return resident

    def _find(self, name: str) -> ResidentModel | None:
        with self._lock:
            resident = self._resident.get(name)
            if resident is not None:
                self._resident.move_to_end(name)
            return resident

    def _make_room(self, in_use: Collection[str]) -> None:
        idle = [name for name, model in self._resident.items() if name not in in_use and not model.sampler.has_work]
        while len(self._resident) >= self._settings.base_models_max and idle:
            dropped = idle.pop(0)
            del self._resident[dropped]
            log.info("base_model_evicted", base_model=dropped)

    def _load(self, name: str) -> ResidentModel:
        try:
            return self._read(name)
        except Exception as error:
            faults.raise_if_device_is_lost(error)
            if getattr(error, "retryable", False):
                raise
            may_pass = faults.is_out_of_memory(error) or isinstance(error, OSError)
            raise ModelUnavailableError(name, str(error), may_pass=may_pass) from error

    def _read(self, name: str) -> ResidentModel:
        with self._storage.database.read() as tx:
            served = base_models.get_base_model(tx, name)
        directory = fetch_files(self._storage, served, self._settings.cache_dir.expanduser())
        dtype = served.dtype if self._settings.dtype == "auto" else self._settings.dtype
        base = BaseModel.load(
            directory,
            name=name,
            device=self._device,
            dtype=getattr(torch, dtype),
            deterministic=is_deterministic(self._settings.deterministic, self._device),
        )
        log.info("base_model_loaded", base_model=name, parameters=base.num_parameters, numerics=base.numerics)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return ResidentModel(base, self._trainer(base), self._sampler(base, tokenizer))

    def _trainer(self, base: BaseModel) -> Trainer:
        tokens_max, chunk = self._settings.tokens_max, self._settings.logprobs_chunk
        if base.deterministic:  # bits depend on where an operation is cut, so no setting may decide it
            return Trainer(base, tokens_max=tokens_max, segment_tokens=SEGMENT_TOKENS, logprobs_chunk=HEAD_ROWS)
        return Trainer(base, tokens_max=tokens_max, logprobs_chunk=chunk)

    def _sampler(self, base: BaseModel, tokenizer: Any) -> Sampler:
        return Sampler(
            base,
            tokenizer,
            kv_tokens_max=self._settings.kv_tokens_max,
            sequences_max=self._settings.sequences_max,
            tokens_max=self._settings.tokens_max,
        )


def fetch_files(storage: Storage, served: ServedModel, cache_dir: Path) -> Path:
    """The directory with a base model's files, fetched from the object store unless they are there already.

    Objects never change, so a directory named after their keys is good for ever. Several workers may call this at once.
    """
    keys = "\n".join(f"{path} {file.key}" for path, file in sorted(served.files.items()))
    directory = cache_dir / "base_models" / hashlib.sha256(keys.encode()).hexdigest()[:24]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / COMPLETE_MARK).exists():
            shutil.rmtree(directory)
            directory.mkdir()
            for path, file in served.files.items():
                target = directory / path
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.objects.download(file.key, target)
            (directory / COMPLETE_MARK).touch()
    return directory


class SamplingAdapters:
    """Adapters that samples are drawn with, by object key, the least recently used first."""

    def __init__(self, storage: Storage, *, num_max: int) -> None:
        self._storage = storage
        self._num_max = num_max
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, session: SamplingSession, base: BaseModel) -> Adapter | None:
        """The session's adapter; None draws from the base model alone.

        Raises:
            StorageError, EngineError: the weights are gone or damaged.
        """
        if session.object_key is None:
            return None
        with self._lock:
            adapter = self._adapters.get(session.object_key)
            if adapter is None:
                adapter = read_adapter(base, self._storage.payloads.get_object(session.object_key))
                self._adapters[session.object_key] = adapter
                while len(self._adapters) > self._num_max:
                    self._adapters.popitem(last=False)
            self._adapters.move_to_end(session.object_key)
            return adapter
