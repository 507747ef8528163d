"""Sampling sessions and samples: opened and accepted at once, refused through the future."""

from __future__ import annotations

from typing import Any

import pytest

from jobs import operations
from jobs.operations import Sample
from storage import journal
from storage.open import Storage
from tests.announcements import Announcements
from tests.api.conftest import MODEL, Account


def open_sampler(account: Account, session: str | None = None, seq: int = 0, **changes: Any) -> Any:
    body = {"session_id": session or account.session(), "sampling_session_seq_id": seq, "base_model": MODEL}
    return account.post("create_sampling_session", {k: v for k, v in (body | changes).items() if v is not None})


def sample_body(sampling_session: str, **changes: Any) -> dict[str, Any]:
    return {
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 3, "seed": 3, "stop": ["a"], "temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "sampling_session_id": sampling_session,
        "seq_id": 0,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
        "type": "sample",
    } | changes


@pytest.fixture
def sampling_session(alice: Account) -> str:
    return str(open_sampler(alice).json()["sampling_session_id"])


def test_a_sampling_session_opened_again_is_the_same(alice: Account) -> None:
    session = alice.session()
    first, again = open_sampler(alice, session), open_sampler(alice, session)
    assert first.json() == again.json()
    assert first.json()["sampling_session_id"] == f"{session}:sample:0"


def test_samplers_say_their_base_model_to_their_account_only(
    alice: Account, bob: Account, sampling_session: str
) -> None:
    expected = {"sampler_id": sampling_session, "base_model": MODEL, "model_path": None}
    assert alice.get(f"samplers/{sampling_session}").json() == expected
    assert bob.get(f"samplers/{sampling_session}").status_code == 404


def test_copies_get_numbers_of_their_own(alice: Account, sampling_session: str) -> None:
    body = {"sampling_session_id": sampling_session, "type": "join_sampling_session"}
    assert [alice.post("join_sampling_session", body).json()["client_counter"] for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "status", "complaint"),
    [
        ({"base_model": "gpt-9"}, 400, f"'gpt-9' is not served here; served are: '{MODEL}'"),
        ({"base_model": None}, 400, "one of base_model and model_path"),
        ({"base_model": None, "model_path": "tinker://x"}, 400, "tinker://RUN/"),
        ({"base_model": None, "model_path": "tinker://r/weights/a"}, 404, "no checkpoint 'tinker://r/weights/a'"),
        ({"session_id": "nobody"}, 404, "no session 'nobody'"),
    ],
)
def test_what_cannot_be_sampled_from_is_refused_in_words(
    changes: dict[str, Any], status: int, complaint: str, alice: Account
) -> None:
    answer = open_sampler(alice, **changes)
    assert answer.status_code == status
    assert complaint in answer.json()["detail"]


def test_a_sample_is_a_row_and_names_its_sequences(
    alice: Account, sampling_session: str, storage: Storage, announcements: Announcements
) -> None:
    answer = alice.post("asample", sample_body(sampling_session)).json()
    assert answer["sample_sequence_ids"] == [f"{answer['request_id']}:0", f"{answer['request_id']}:1"]
    with storage.database.read() as tx:
        operation = journal.get_operation(tx, answer["request_id"])
    body = operations.decode(storage.payloads.get(operation.payload))
    assert isinstance(body, Sample)
    assert (body.num_samples, body.params.seed, body.params.stop) == (2, 3, ("a",))
    assert announcements.samples == 1
    # and: the same seq again is the same sample
    assert alice.post("asample", sample_body(sampling_session)).json() == answer
    assert announcements.samples == 1


def test_seq_ids_are_64_bit(alice: Account, sampling_session: str) -> None:
    answer = alice.post("asample", sample_body(sampling_session, seq_id=1_000_000_000 * 999_999_999 + 7))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": {"chunks": []}}, "prompt: is empty"),
        ({"prompt": {"chunks": [{"tokens": list(range(17))}]}}, "over the context limit of 16"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"prompt_alt_tokens_k": 3}, "prompt_alt_tokens_k"),
        ({"record_stability_info": True}, "record_stability_info"),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "images are not supported"),
    ],
)
def test_a_bad_sample_fails_through_the_future(
    changes: dict[str, Any], complaint: str, alice: Account, sampling_session: str
) -> None:
    answer = alice.post("asample", sample_body(sampling_session, **changes))
    assert answer.status_code == 200
    assert len(answer.json()["sample_sequence_ids"]) == 2
    failure = alice.retrieve(answer.json()["request_id"]).json()
    assert failure["category"] == "user"
    assert complaint in failure["error"]


@pytest.mark.parametrize("changes", [{"num_samples": 0}, {"num_samples": 10**9}, {"seq_id": None}])
def test_a_sample_that_cannot_be_numbered_is_400(
    changes: dict[str, Any], alice: Account, sampling_session: str
) -> None:
    answer = alice.post("asample", sample_body(sampling_session, **changes))
    assert answer.status_code == 400
    assert next(iter(changes)) in answer.json()["detail"]


def test_another_accounts_sampling_session_is_404(alice: Account, bob: Account, sampling_session: str) -> None:
    assert bob.post("asample", sample_body(sampling_session)).status_code == 404
    assert bob.post("join_sampling_session", {"sampling_session_id": sampling_session}).status_code == 404
