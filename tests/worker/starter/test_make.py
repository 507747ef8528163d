"""The starter model is made whole or not at all, and once."""

import json
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.starter import StarterModelError, make
from worker.starter.__main__ import main
from worker.starter.school import Progress, Recipe

TINY = Recipe(
    hidden=32,
    intermediate=48,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    steps_second=2,
    steps_max=3,
    steps_warmup=1,
    steps_cooldown=1,
    steps_between_estimates=1,
    text_rows=2,
    addition_rows=2,
    num_estimate=4,
    num_exam=4,
    share_known=0.0,
    share_min=0.0,
    text_loss_max=100.0,
)


def test_three_steps_make_a_directory_that_transformers_loads(tmp_path: Path) -> None:
    # when a tiny model is made
    steps: list[Progress] = []
    directory = make.make_starter_model(tmp_path / "model", recipe=TINY, report=steps.append)
    # then every step was reported, and the loss fell
    assert [step.step for step in steps] == [1, 2, 3]
    assert steps[-1].text_loss < steps[0].text_loss
    # and model and tokenizer load without network and fit together
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    assert model.config.model_type == "qwen3"
    assert model.config.max_position_embeddings >= 4096
    assert all(p.dtype == torch.float32 for p in model.parameters())
    tokens = tokenizer("Hello!", return_tensors="pt")
    assert model(**tokens).logits.shape[-1] == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_finished_directory_is_returned_at_once(tmp_path: Path) -> None:
    # given a finished model
    directory = make.make_starter_model(tmp_path / "model", recipe=TINY)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    # when it is asked for again
    steps: list[Progress] = []
    make.make_starter_model(directory, recipe=TINY, report=steps.append)
    # then nothing was trained or written
    assert not steps
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_the_number_of_threads_is_put_back(tmp_path: Path) -> None:
    # given a process that computes on some number of threads
    before = torch.get_num_threads()
    seen: list[int] = []
    # when a model is made in it
    make.make_starter_model(tmp_path / "model", recipe=TINY, report=lambda _: seen.append(torch.get_num_threads()))
    # then it took one thread, and none are missing afterwards
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == before


def test_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    one = make.make_starter_model(tmp_path / "one", recipe=TINY)
    two = make.make_starter_model(tmp_path / "two", recipe=TINY)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_an_interrupted_call_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    # given a call that ends in the middle
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make.make_starter_model(tmp_path / "model", recipe=TINY, report=stop)
    # then only the lock is left
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]
    # and the next call makes the model
    assert make.is_finished(make.make_starter_model(tmp_path / "model", recipe=TINY))


def test_the_draft_of_a_killed_call_is_removed_by_the_next_one(tmp_path: Path) -> None:
    # given what a call leaves that was killed
    (tmp_path / ".model.draft").mkdir()
    (tmp_path / ".model.draft" / "config.json").write_text("{}")
    # when the model is made
    make.make_starter_model(tmp_path / "model", recipe=TINY)
    # then only the model and the lock are there
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_callers_at_the_same_time_make_one_model(tmp_path: Path) -> None:
    # given two callers that start together
    steps: list[Progress] = []
    callers = [
        threading.Thread(
            target=make.make_starter_model, args=(tmp_path / "model",), kwargs={"recipe": TINY, "report": steps.append}
        )
        for _ in range(2)
    ]
    # when both are done
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    # then one of them trained
    assert [step.step for step in steps] == [1, 2, 3]
    assert make.is_finished(tmp_path / "model")


def test_a_directory_with_something_else_is_not_touched(tmp_path: Path) -> None:
    # given a directory of the user's
    (tmp_path / "mine").write_text("keep")
    # then it is refused
    with pytest.raises(FileExistsError, match="choose another directory"):
        make.make_starter_model(tmp_path, recipe=TINY)
    assert (tmp_path / "mine").read_text() == "keep"


def test_missing_the_aim_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    # given a recipe that cannot reach its aim in three steps
    strict = Recipe(**{**TINY.__dict__, "text_loss_max": 0.0})
    # then it ends, and nothing is left
    with pytest.raises(StarterModelError, match="try another --seed"):
        make.make_starter_model(tmp_path / "model", recipe=strict)
    assert not (tmp_path / "model").exists()


def test_the_cache_directory_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a cache with a finished model of this version
    monkeypatch.setenv("PIECEWORK_CACHE_DIR", str(tmp_path))
    made = make.make_starter_model(tmp_path / f"starter-{make.version()}", recipe=TINY)
    # then that is the one
    assert make.ensure_starter_model() == made


def test_the_command_prints_the_directory_and_how_the_model_does(tmp_path: Path) -> None:
    # given a finished model
    directory = make.make_starter_model(tmp_path / "model", recipe=TINY)
    made = json.loads((directory / make.MARKER).read_text())
    # when the command is called on it
    result = CliRunner().invoke(main, ["--out", str(directory)])
    # then it says where it is and what was measured
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(directory)
    assert f"text loss {made['text_loss']:.2f}" in result.stderr.replace("\n", " ")
