"""`piecework models`: puts base models into the object store, from where workers load them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import click
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

from api.cli.errors import CliError
from api.cli.model_files import ModelFacts, read_model
from api.cli.model_source import ModelSource, fetch
from api.cli.opened import opened
from api.cli.options import data_dir_option, json_option
from api.cli.output import print_json, print_table, progress
from storage import base_models, keys, uploads
from storage.base_models import BaseModel, BaseModelExistsError, StoredFile
from storage.errors import RowNotFoundError, UploadGoneError
from storage.open import Storage

NAME_MAX = 256
_OWNER_MAX = 60


@click.group()
def models() -> None:
    """Base models that runs can be trained on; no restart of the service is needed."""


@models.command()
@click.argument("model", metavar="ID_OR_DIRECTORY")
@click.option("--name", help="What clients ask for, and load the tokenizer by.  [default: the hub id or the directory]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the weights in memory.  [default: what the model's config says]",
)
@json_option
@data_dir_option
def add(model: str, name: str | None, dtype: str | None, as_json: bool, data_dir: Path) -> None:
    """Serve a base model: a Hugging Face id, a local directory, or `starter`.

    `starter` is a small model that piecework makes itself in a minute or two, without any hub. Weights must be
    safetensors; code of the model's repository is never taken or run.
    """
    if name is not None and not 0 < len(name) <= NAME_MAX:
        raise CliError(f"--name has 1 to {NAME_MAX} characters")
    with opened(data_dir, create=True) as storage:
        if name is not None:
            _check_name_free(storage, name)
        source = fetch(model)
        _check_name_free(storage, name or source.name)
        facts = read_model(source.directory)
        files = _store(storage, source, facts)
        added = _register(storage, source, facts, files, name=name, dtype=dtype)
    if as_json:
        print_json(_as_json(added))
    else:
        click.echo(f"{added.name} is served: {added.architecture}, {_count(added.num_parameters)}, {added.dtype}")


@models.command("list")
@json_option
@data_dir_option
def list_(as_json: bool, data_dir: Path) -> None:
    """Show the base models that are served."""
    with opened(data_dir, create=True) as storage, storage.database.read() as tx:
        served = base_models.list_base_models(tx)
    if as_json:
        print_json({"base_models": [_as_json(model) for model in served]})
        return
    headings = ("name", "architecture", "parameters", "dtype", "context", "tokenizer")
    rows = [
        (one.name, one.architecture, _count(one.num_parameters), one.dtype, one.context_length, one.tokenizer_id)
        for one in served
    ]
    print_table(headings, rows, numbers=[2, 4], empty="no base model yet: piecework models add starter")


@models.command()
@click.argument("name")
@json_option
@data_dir_option
def remove(name: str, as_json: bool, data_dir: Path) -> None:
    """Stop serving base model NAME; new runs are refused, and its files are deleted later."""
    with opened(data_dir) as storage, storage.database.begin() as tx:
        try:
            base_models.remove_base_model(tx, name)
        except RowNotFoundError as error:
            served = ", ".join(model.name for model in base_models.list_base_models(tx)) or "none"
            raise CliError(f"no base model {name!r} is served (served: {served})") from error
    if as_json:
        print_json({"removed": name})
    else:
        click.echo(f"{name} is no longer served")


def _check_name_free(storage: Storage, name: str) -> None:
    """Found out before gigabytes are copied; `_register` decides."""
    with storage.database.read() as tx:
        if base_models.find_base_model(tx, name) is not None:
            raise CliError(
                f"a base model {name!r} is served already: `piecework models remove {name}` or another --name"
            )


def _store(storage: Storage, source: ModelSource, facts: ModelFacts) -> Mapping[str, StoredFile]:
    """Stream the files into the object store, each announced before."""
    token, owner = keys.new_token(), Path(source.name).name[-_OWNER_MAX:] or "model"
    num_bytes = sum(facts.files.values())
    stored: dict[str, StoredFile] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with progress(*columns) as bars:
        bar = bars.add_task("storing", total=num_bytes)
        for filename, size in facts.files.items():
            key = keys.base_model_key(owner, filename, token=token)
            with storage.database.begin() as tx:
                now = storage.database.now(tx)
                expires_at = now + timedelta(seconds=storage.settings.upload_expiry_s)
                uploads.announce(tx, key, now=now, expires_at=expires_at)
            bars.update(bar, description=f"storing {filename}")
            with bars.open(source.directory / filename, "rb", task_id=bar, total=num_bytes) as file:
                storage.objects.put(key, file, size_bytes=size)
            stored[filename] = StoredFile(key, size)
    return stored


def _register(
    storage: Storage,
    source: ModelSource,
    facts: ModelFacts,
    files: Mapping[str, StoredFile],
    *,
    name: str | None,
    dtype: str | None,
) -> BaseModel:
    with storage.database.begin() as tx:
        model = BaseModel(
            name=name or source.name,
            source=source.source,
            tokenizer_id=name or source.tokenizer_id,
            architecture=facts.architecture,
            dtype=dtype or facts.dtype,
            context_length=facts.context_length,
            vocab_size=facts.vocab_size,
            num_parameters=facts.num_parameters,
            tied_embeddings=facts.tied_embeddings,
            files=files,
            created_at=storage.database.now(tx),
        )
        try:
            base_models.add_base_model(tx, model)
        except (BaseModelExistsError, UploadGoneError) as error:
            raise CliError(str(error)) from error
    return model


def _as_json(model: BaseModel) -> dict[str, object]:
    return {
        "name": model.name,
        "source": model.source,
        "tokenizer_id": model.tokenizer_id,
        "architecture": model.architecture,
        "dtype": model.dtype,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "num_parameters": model.num_parameters,
    }


def _count(num_parameters: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if num_parameters >= unit:
            return f"{num_parameters / unit:.1f} {name} parameters"
    return f"{num_parameters} parameters"
