"""Where a base model comes from: a directory, the hub, or the starter model that piecework makes itself."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from api.cli.errors import CliError
from api.cli.model_files import TAKEN
from api.cli.process import python

STARTER = "starter"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk.

    Attributes:
        directory: with its files.
        source: what it was added from, for people.
        name: what it is called unless the user says otherwise.
        tokenizer_id: what clients load the tokenizer by unless the user names the model.
    """

    directory: Path
    source: str
    name: str
    tokenizer_id: str


def fetch(model: str) -> ModelSource:
    """Bring a model to this disk.

    Args:
        model: a directory, `starter`, or a hub id.

    Raises:
        CliError: there is none; says what to change.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        path = str(directory.resolve())
        return ModelSource(directory.resolve(), path, path, path)
    if model == STARTER:
        made = _make_starter()
        return ModelSource(made, STARTER, STARTER, str(made))
    if not _HUB_ID.fullmatch(model):
        raise CliError(f"{model!r} is neither a directory nor a hub id (owner/name) nor {STARTER!r}")
    return ModelSource(_download(model), model, model, model)


def _make_starter() -> Path:
    """Made by the worker's code in a process of its own: this one never imports torch."""
    made = subprocess.run(python("worker.starter"), stdout=subprocess.PIPE, text=True, check=False)
    lines = made.stdout.strip().splitlines()
    if made.returncode or not lines:
        raise CliError("the starter model could not be made; the lines above say why")
    return Path(lines[-1])


def _download(model: str) -> Path:
    """Only weights, config and tokenizer; the hub's cache keeps them for the next time."""
    from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=list(TAKEN)))
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CliError(f"{model!r} is no directory here and cannot be fetched from the hub: {reason}") from error
