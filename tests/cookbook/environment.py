"""The cookbook's own environment, and a hub cache in which it finds the tokenizer without a network."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = (HERE / "requirements.txt", HERE / "requirements-nodeps.txt")
MARKER = "piecework-requirements"
REVISION = "0" * 40
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
NOTHING_LISTENS = "http://127.0.0.1:9"


def make_environment(venv: Path) -> Path:
    """Make the virtual environment, unless it already holds just these requirements.

    Returns:
        Its python.
    """
    python = venv / "bin" / "python"
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in REQUIREMENTS)).hexdigest()
    marker = venv / MARKER
    if python.exists() and marker.exists() and marker.read_text() == digest:
        return python
    print(f"making {venv} (about a minute)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, "--requirement", str(REQUIREMENTS[0])], check=True)
    subprocess.run([*pip, "--no-deps", "--requirement", str(REQUIREMENTS[1])], check=True)
    marker.write_text(digest)
    return python


def lay_out_hub_cache(home: Path, model_name: str, model_dir: Path) -> None:
    """Put all of a model but its weights where `from_pretrained(model_name)` looks for it.

    Args:
        home: to be HF_HOME of the recipes.
        model_name: `owner/name`.
        model_dir: directory with the tokenizer and the config.
    """
    repository = home / "hub" / f"models--{model_name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    shutil.copytree(model_dir, repository / "snapshots" / REVISION, ignore=shutil.ignore_patterns(*WEIGHTS))


def offline_environment(home: Path) -> dict[str, str]:
    """Environment variables of a recipe: no hub, no tracker, no network but loopback."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIECEWORK_", "TINKER_", "WANDB_", "HF_", "TRANSFORMERS_", "PYTHON"))
        and not name.lower().endswith("_proxy")
    }
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HTTPS_PROXY": NOTHING_LISTENS,
        "https_proxy": NOTHING_LISTENS,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
