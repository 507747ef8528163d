"""`piecework models`: what is taken from a directory, what is refused and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from api.cli.commands import piecework
from storage import base_models
from storage.open import open_storage
from storage.settings import StorageSettings

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 128,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_model(directory: Path, **config: Any) -> Path:
    """A directory in the Hugging Face layout: 16 x 4 embeddings, a 16 x 4 output, 3 more numbers."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "tokenizer.json").write_text("{}")
    weights = {"embed": np.zeros((16, 4), np.float32), "lm_head.weight": np.zeros((16, 4), np.float32)}
    save_file({**weights, "norm": np.zeros(3, np.float32)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty data directory."""
    return tmp_path / "data"


def run(data_dir: Path, *arguments: str) -> Result:
    """Run a command in this process."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("PIECEWORK_")}
    return CliRunner().invoke(piecework, [*arguments, "--data-dir", str(data_dir)], env=clean)


def test_directory_is_served_with_its_facts_and_files(tmp_path: Path, data_dir: Path) -> None:
    # given a model with a pickle, code and a picture beside it
    model = make_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "modeling_evil.py", "logo.png"):
        (model / name).write_text("x")

    # when
    added = run(data_dir, "models", "add", str(model), "--name", "Acme/Tiny", "--json")

    # then its facts are those of config and weights, and clients load the tokenizer by its name
    assert added.exit_code == 0, added.output
    told = json.loads(added.stdout)
    assert told["name"] == told["tokenizer_id"] == "Acme/Tiny"
    assert told["num_parameters"] == 16 * 4 * 2 + 3
    assert (told["context_length"], told["vocab_size"], told["dtype"]) == (128, 16, "bfloat16")

    # then only weights, config and tokenizer lie in the object store, whole
    storage = open_storage(StorageSettings(data_dir=data_dir))
    with storage.database.read() as tx:
        files = base_models.get_base_model(tx, "Acme/Tiny").files
    assert set(files) == {"config.json", "tokenizer.json", "model.safetensors"}
    for name, file in files.items():
        assert storage.objects.get(file.key) == (model / name).read_bytes()
    storage.close()


def test_directory_without_name_is_called_by_its_path(tmp_path: Path, data_dir: Path) -> None:
    model = make_model(tmp_path / "model")
    told = json.loads(run(data_dir, "models", "add", str(model), "--dtype", "float32", "--json").stdout)
    assert told["name"] == told["tokenizer_id"] == str(model.resolve())
    assert told["dtype"] == "float32"


def test_tied_output_is_counted_once(tmp_path: Path, data_dir: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    told = json.loads(run(data_dir, "models", "add", str(model), "--name", "tied", "--json").stdout)
    assert told["num_parameters"] == 16 * 4 + 3


def test_model_is_listed_and_removed(tmp_path: Path, data_dir: Path) -> None:
    # given
    run(data_dir, "models", "add", str(make_model(tmp_path / "model")), "--name", "one")
    assert [m["name"] for m in json.loads(run(data_dir, "models", "list", "--json").stdout)["base_models"]] == ["one"]

    # when
    assert run(data_dir, "models", "remove", "one").exit_code == 0

    # then
    assert json.loads(run(data_dir, "models", "list", "--json").stdout)["base_models"] == []
    assert "no base model 'one' is served" in run(data_dir, "models", "remove", "one").output


def test_name_that_is_taken_is_refused_before_anything_is_copied(tmp_path: Path, data_dir: Path) -> None:
    # given
    model = make_model(tmp_path / "model")
    run(data_dir, "models", "add", str(model), "--name", "one")
    before = sorted((data_dir / "objects").rglob("*"))

    # when
    refused = run(data_dir, "models", "add", str(model), "--name", "one")

    # then
    assert refused.exit_code == 1
    assert "piecework models remove one" in refused.output
    assert sorted((data_dir / "objects").rglob("*")) == before


def break_config(model: Path) -> None:
    """No config."""
    (model / "config.json").unlink()


def break_weights(model: Path) -> None:
    """Pickled weights alone."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def cut_weights(model: Path) -> None:
    """A download that stopped."""
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def lose_shard(model: Path) -> None:
    """An index that names more files than there are."""
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def break_tokenizer(model: Path) -> None:
    """No tokenizer."""
    (model / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (break_config, "no config.json"),
        (break_weights, "only pytorch_model.bin"),
        (cut_weights, "download it again"),
        (lose_shard, "lacks model-2.safetensors"),
        (break_tokenizer, "no tokenizer"),
    ],
)
def test_unusable_directory_is_refused_in_one_line(tmp_path: Path, data_dir: Path, breaks: Any, says: str) -> None:
    # given
    model = make_model(tmp_path / "model")
    breaks(model)

    # when
    refused = run(data_dir, "models", "add", str(model))

    # then
    assert refused.exit_code == 1
    assert says in refused.output
    assert refused.output.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertModel"]}, "causal language model"),
        ({"max_position_embeddings": None}, "`max_position_embeddings` must be a positive number"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
    ],
)
def test_model_of_a_wrong_kind_is_refused(tmp_path: Path, data_dir: Path, config: Any, says: str) -> None:
    refused = run(data_dir, "models", "add", str(make_model(tmp_path / "model", **config)))
    assert refused.exit_code == 1
    assert says in refused.output


def test_path_that_does_not_exist_is_not_taken_for_a_hub_id(data_dir: Path) -> None:
    refused = run(data_dir, "models", "add", "/no/such/directory")
    assert refused.exit_code == 1
    assert "neither a directory nor a hub id" in refused.output


def test_hub_that_cannot_be_reached_is_said_in_one_line(data_dir: Path) -> None:
    # given a process that may not use the network
    offline = "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True; from api.cli import main; main()"
    command = [sys.executable, "-P", "-c", offline, "models", "add", "acme/no-such-model", "--data-dir", str(data_dir)]

    # when
    refused = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)

    # then
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: 'acme/no-such-model' is no directory here and cannot be fetched")
    assert refused.stderr.count("\n") == 1
