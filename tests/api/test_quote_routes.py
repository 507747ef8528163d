"""Quotes over HTTP and on the command line, counted with the model's own tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from api.examples import ExampleError, TokenCounter
from storage import base_models, runs
from storage.base_models import BaseModel, StoredFile
from storage.open import Storage
from tests.api.conftest import Account, a_base_model
from tests.cli.test_admin import run as run_cli
from tests.cli.test_admin import run_json
from tests.factories import bill, make_operation, make_usage
from tests.tiny_model import make_tokenizer

NAME = "counted"
TEMPLATE = "{% for m in messages if m['role'] == 'nobody' %}{{ raise_exception('who?') }}{% endfor %}"
TEMPLATE += "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if loop.last %}.{% endif %}\n{% endfor %}"
CHAT = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4, as ever"}]


@pytest.fixture
def model(storage: Storage, tmp_path: Path) -> BaseModel:
    """A base model with a tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    files = {}
    for path in sorted((tmp_path / "model").iterdir()):
        storage.payloads.put_object(path.read_bytes(), f"models/{path.name}")
        files[path.name] = StoredFile(f"models/{path.name}", path.stat().st_size)
    model = dataclasses.replace(a_base_model(NAME), files=files, context_length=200)
    with storage.database.begin() as tx:
        base_models.add_base_model(tx, model)
    return model


def test_examples_are_as_long_as_the_models_own_tokenizer_makes_them(storage: Storage, model: BaseModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    expected = {
        json.dumps({"tokens": [5, 6, 7]}): 3,
        json.dumps({"text": "many words"}): len(tokenizer("many words")["input_ids"]),
        json.dumps({"prompt": "2 + 2 =", "completion": " 4"}): len(tokenizer("2 + 2 = 4")["input_ids"]),
        json.dumps({"messages": CHAT}): len(chat),
    }
    counter = TokenCounter(storage.objects, model)
    found = {text: counter.count(json.loads(text), "here") + 1 for text in expected}
    assert found == expected


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ({"tokens": [1]}, "at least two tokens"),
        ({"tokens": ["1", "2"]}, "an example is an object with"),
        ({"tokens": list(range(100_000))}, "context; shorten it"),
        ("text", "an example is an object with"),
        ({"messages": ["hello"]}, "an example is an object with"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "refuses these messages: who?"),
    ],
)
def test_what_is_no_example_is_named(storage: Storage, model: BaseModel, example: Any, says: str) -> None:
    with pytest.raises(ExampleError, match=says) as error:
        TokenCounter(storage.objects, model).count(example, "line 3")
    assert str(error.value).startswith("line 3: ")


def train(storage: Storage, account: Account, seq: int, *, tags: list[str]) -> None:
    session = account.post(
        "create_session", {"tags": tags, "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
    ).json()["session_id"]
    run_id = account.run(session, base_model=NAME)
    with storage.database.begin() as tx:
        run, now = runs.get_run(tx, run_id), storage.database.now(tx)
        used = make_usage(device_ns=seq * 10**9, tokens_trained=1_000)
        operation = dataclasses.replace(make_operation(tx, run, seq), base_model=NAME)
        bill(tx, run, operation, used, now=now)


@pytest.mark.usefixtures("model")
def test_a_quote_shows_how_far_off_earlier_ones_were(alice: Account, storage: Storage) -> None:
    # given 1 ms of device time a token
    train(storage, alice, 1, tags=[])
    # When
    body = {"base_model": NAME, "data": [{"tokens": [1, 2, 3]}] * 5, "epochs": 2, "batch_size": 2}
    first = alice.post("quotes", body).json()
    # then 2 epochs of 5 examples of 2 trained tokens
    assert (first["tokens"], first["steps"], Decimal(first["device_seconds"])) == (20, 6, Decimal("0.02"))
    assert Decimal(first["amount"]) > 0
    assert first["past"] is None
    assert first["measured"] == {"trained_tokens": 1_000, "steps": 0}
    # when a script with its tag takes twice as long
    train(storage, alice, 2, tags=[first["tag"]])
    second = alice.post("quotes", {"base_model": NAME, "examples": 5, "tokens": 10}).json()
    # then
    assert second["past"] == {"quotes": 1, "median_error": pytest.approx(1.0), "worst_error": pytest.approx(1.0)}
    listed = alice.get("quotes").json()["quotes"]
    assert [each["error"] for each in listed] == [None, pytest.approx(1.0)]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("made_by", ["route", "command"])
def test_nobody_waits_while_a_quote_reads(alice: Account, storage: Storage, tmp_path: Path, made_by: str) -> None:
    # given what is done in transactions that others wait for
    train(storage, alice, 1, tags=[])
    data = tmp_path / "data.jsonl"
    data.write_text('{"tokens": [1, 2, 3, 4]}\n')
    transactions: list[list[str]] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("BEGIN"):
            transactions.append([])
        transactions[-1].append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        # when
        if made_by == "route":
            alice.post("quotes", {"base_model": NAME, "examples": 5, "tokens": 10})
        else:
            run_json(storage.settings.data_dir, "quote", "--model", NAME, "--data", str(data))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    # then one of them writes the quote down, and none reads usage
    writing = [statement for begin, *done in transactions if begin == "BEGIN IMMEDIATE" for statement in done]
    assert len([statement for statement in writing if "INSERT INTO quote" in statement]) == 1
    assert not [statement for statement in writing if "usage_" in statement]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"base_model": NAME}, 400),
        ({"base_model": NAME, "data": [{"tokens": [1]}]}, 400),
        ({"base_model": "none", "examples": 1, "tokens": 5}, 404),
        ({"base_model": NAME, "examples": 1, "tokens": 5, "epochs": 0}, 400),
        ({"base_model": NAME, "examples": 1, "tokens": 2**50, "epochs": 10**6}, 400),
    ],
)
def test_what_cannot_be_quoted_says_why(alice: Account, body: dict[str, Any], status: int) -> None:
    answer = alice.post("quotes", body)
    assert (answer.status_code, bool(answer.json()["detail"])) == (status, True)


@pytest.mark.usefixtures("model")
def test_a_base_model_that_is_not_served_is_answered_with_those_that_are(
    alice: Account, storage: Storage, tmp_path: Path
) -> None:
    # given
    data = tmp_path / "data.jsonl"
    data.write_text('{"tokens": [1, 2, 3]}\n')
    # when
    answer = alice.post("quotes", {"base_model": "Acme/Big", "examples": 1, "tokens": 5})
    refused = run_cli(storage.settings.data_dir, "quote", "--model", "Acme/Big", "--data", str(data))
    # then
    offered = alice.get("get_server_capabilities").json()["supported_models"]
    served = [each["model_name"] for each in offered]
    assert answer.status_code == 404
    assert all(repr(name) in answer.json()["detail"] for name in served)
    says = f"there is no base model 'Acme/Big' (served: {', '.join(served)}); add one: piecework models add Acme/Big"
    assert (refused.exit_code, refused.output) == (1, f"Error: {says}\n")


@pytest.mark.usefixtures("model")
def test_a_price_that_lacks_device_time_says_so(alice: Account, storage: Storage, tmp_path: Path) -> None:
    # given device time of one device
    train(storage, alice, 1, tags=[])
    data = tmp_path / "data.jsonl"
    data.write_text('{"tokens": [1, 2, 3]}\n')
    arguments = ("quote", "--model", NAME, "--data", str(data), "--account", "alice")
    # when
    known = run_cli(storage.settings.data_dir, *arguments)
    lacking = run_cli(storage.settings.data_dir, *arguments, "--device", "cuda")
    # then
    assert (known.exit_code, lacking.exit_code) == (0, 0), lacking.output
    assert "without device time" not in known.output
    assert "USD without device time" in lacking.output


def test_another_account_does_not_see_a_quote(make_account: Callable[[str], Account], model: BaseModel) -> None:
    one, two = make_account("one"), make_account("two")
    one.post("quotes", {"base_model": model.name, "examples": 1, "tokens": 5})
    assert len(one.get("quotes").json()["quotes"]) == 1
    assert two.get("quotes").json()["quotes"] == []


@pytest.mark.usefixtures("model")
def test_a_file_is_quoted_on_the_command_line(alice: Account, storage: Storage, tmp_path: Path) -> None:
    # Given
    train(storage, alice, 1, tags=[])
    data, data_dir = tmp_path / "data.jsonl", storage.settings.data_dir
    data.write_text('{"text": "some words"}\n\n{"tokens": [1, 2, 3, 4]}\n')
    # When
    arguments = ("quote", "--model", NAME, "--data", str(data), "--epochs", "10")
    told = run_json(data_dir, *arguments)
    # Then
    assert told["tokens"] == 10 * (len(make_tokenizer()("some words")["input_ids"]) - 1 + 3)
    assert told["tag"] in run_cli(data_dir, *arguments).output or "batch:quote-" in run_cli(data_dir, *arguments).output
    # When
    data.write_text('{"text": "some words"}\n{"text": \n')
    broken = run_cli(data_dir, *arguments)
    # Then
    assert broken.exit_code == 1
    assert "data.jsonl" in broken.output
    assert "line 2" in broken.output
