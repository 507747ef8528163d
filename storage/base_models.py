"""Base models that workers may load: their facts, and the objects that hold their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from storage import tables, uploads
from storage.errors import RowNotFoundError


@dataclass(frozen=True)
class StoredFile:
    """One file in the object store."""

    key: str
    size: int


@dataclass(frozen=True)
class BaseModel:
    """A base model as it is served.

    Attributes:
        name: what clients ask for.
        source: hub id or directory it was added from.
        tokenizer_id: what clients load the tokenizer by.
        architecture: transformers class, e.g. `Qwen3ForCausalLM`.
        dtype: of the weights in memory, `float32` or `bfloat16`.
        context_length: in tokens.
        files: relative path → object.
    """

    name: str
    source: str
    tokenizer_id: str
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    num_parameters: int
    tied_embeddings: bool
    files: Mapping[str, StoredFile]
    created_at: datetime


class BaseModelExistsError(ValueError):
    """A base model of this name is served already."""


def add_base_model(tx: Connection, model: BaseModel) -> None:
    """Serve a base model; its files are stored (their uploads announced) already.

    Raises:
        BaseModelExistsError: the name is taken.
        UploadGoneError: a file was swept away before this; store it again.
    """
    if find_base_model(tx, model.name) is not None:
        raise BaseModelExistsError(
            f"a base model {model.name!r} is served already; remove it first or choose another --name"
        )
    for file in model.files.values():
        uploads.reference(tx, file.key, size_bytes=file.size)
    values = asdict(model)
    tx.execute(insert(tables.base_model).values(**values))


def find_base_model(tx: Connection, name: str) -> BaseModel | None:
    """The base model of this name."""
    row = tx.execute(select(tables.base_model).where(tables.base_model.c.name == name)).one_or_none()
    return None if row is None else _from_row(row._mapping)


def get_base_model(tx: Connection, name: str) -> BaseModel:
    """The base model of this name.

    Raises:
        RowNotFoundError: it is not served.
    """
    model = find_base_model(tx, name)
    if model is None:
        raise RowNotFoundError("base model", name)
    return model


def list_base_models(tx: Connection) -> Sequence[BaseModel]:
    """All base models by name."""
    rows = tx.execute(select(tables.base_model).order_by(tables.base_model.c.name))
    return [_from_row(row._mapping) for row in rows]


def remove_base_model(tx: Connection, name: str) -> None:
    """Stop serving a base model; the sweeper deletes its files.

    Raises:
        RowNotFoundError: it is not served.
    """
    model = get_base_model(tx, name)
    tx.execute(delete(tables.base_model).where(tables.base_model.c.name == name))
    for file in model.files.values():
        uploads.release(tx, file.key)


def _from_row(row: Mapping[Any, Any]) -> BaseModel:
    files = {path: StoredFile(**file) for path, file in row["files"].items()}
    return BaseModel(**{**row, "files": files})
