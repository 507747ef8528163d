"""Makes the starter model in a directory: whole or not at all, and once."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from worker.starter import arithmetic
from worker.starter.corpus import load_corpus
from worker.starter.lessons import Lessons
from worker.starter.school import Progress, Recipe, Report, new_model, teach
from worker.starter.tokenizer import save_tokenizer, train_tokenizer
from worker.starter.version import version

MARKER = "starter.json"
"""File that is written last: version, seed, and how the model did."""

_CACHE_VARIABLE = "PIECEWORK_CACHE_DIR"


def default_cache_dir() -> Path:
    """`$PIECEWORK_CACHE_DIR`, or `~/.cache/piecework`."""
    configured = os.environ.get(_CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "piecework"


def ensure_starter_model(cache_dir: Path | None = None, *, report: Report | None = None) -> Path:
    """The directory of the starter model, made on the first call.

    Callers at the same time wait for one of them to make it.

    Args:
        cache_dir: where it is kept; by default `default_cache_dir()`.
        report: told of every step while the model is being made.

    Returns:
        `starter-<version>` in the cache: a directory that transformers loads without network.

    Raises:
        StarterModelError: training did not reach its aim.
    """
    directory = (cache_dir or default_cache_dir()).expanduser() / f"starter-{version()}"
    return make_starter_model(directory, report=report)


def make_starter_model(
    directory: Path, *, seed: int = 0, recipe: Recipe | None = None, report: Report | None = None
) -> Path:
    """Make the model unless the directory holds a finished one of this version and seed.

    It is made beside the directory and renamed at the end: an interrupted call leaves nothing that looks finished.

    Args:
        directory: where the model goes; its parents are made.
        seed: of weights, lessons and examination; the corpus does not depend on it.
        recipe: size and training; the default is the one that ships.
        report: told of every step.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory holds something else.
        StarterModelError: training did not reach its aim.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f".{directory.name}.lock")):
        if is_finished(directory, seed=seed):
            return directory
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(
                f"{directory} holds something other than this version of the starter model; "
                "remove it or choose another directory"
            )
        for left_over in directory.parent.glob(f".{directory.name}.*/"):  # of a killed call: nobody else has the lock
            shutil.rmtree(left_over, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            with _one_thread():
                _write(draft, seed=seed, recipe=recipe or Recipe(), report=report or _say_nothing)
            draft.chmod(0o755)
            draft.replace(directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return directory


def is_finished(directory: Path, *, seed: int = 0) -> bool:
    """Whether the directory holds a complete model of this version, made from this seed."""
    marker = directory / MARKER
    if not marker.is_file():
        return False
    made = json.loads(marker.read_text(encoding="utf-8"))
    return bool(made["version"] == version() and made["seed"] == seed)


def _say_nothing(_: Progress) -> None:
    pass


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; it ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for matrices this small, threads wait for each other longer than they work.

    Beside other busy processes, two threads took more than ten times as long as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(directory: Path, *, seed: int, recipe: Recipe, report: Report) -> None:
    made_version = version()
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.texts())
    pairs, held_out = arithmetic.split_pairs(recipe.num_estimate + recipe.num_exam)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(recipe, tokenizer)
    lessons = Lessons(tokenizer, corpus, pairs, seed)
    outcome = teach(model, tokenizer, lessons, held_out, recipe, seed=seed, report=report)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    made = {
        "version": made_version,
        "seed": seed,
        "steps": outcome.step,
        "text_loss": round(outcome.text_loss, 4),
        "share_right": outcome.share_right,
    }
    (directory / MARKER).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
