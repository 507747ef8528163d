"""Training requests are accepted, whatever is wrong with them, once key and run are known."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from tinker.proto.response_conv import deserialize_forward_backward_output

from api import tinker_public_pb2 as pb
from jobs import operations
from jobs.operations import ForwardBackward, ForwardBackwardOutcome, Kind, ModelCreated, OptimStepOutcome, Outcome
from storage import journal
from storage.open import Storage
from tests.announcements import Announcements
from tests.api.conftest import MODEL, Account

PROTO = {"Content-Type": "application/x-protobuf"}


def message(
    run: str, seq: int, *, loss_fn: str = "cross_entropy", tokens: tuple[int, ...] = (1, 2, 3)
) -> pb.ForwardBackwardRequest:
    ids = np.array(tokens, "<i4").tobytes()
    targets = pb.Tensor(dense=np.array(tokens, "<i8").tobytes(), dtype=pb.DTYPE_INT64, shape=[len(tokens)])
    datum = pb.Datum(
        model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=ids))], loss_fn_inputs={"target_tokens": targets}
    )
    return pb.ForwardBackwardRequest(model_id=run, seq_id=seq, loss_fn=loss_fn, data=[datum])


def post(account: Account, body: bytes, **headers: str) -> str:
    """Submit protobuf; the request id."""
    answer = account.post("forward_backward", content=body, headers=PROTO | headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def stored(storage: Storage, request_id: str) -> journal.Operation:
    with storage.database.read() as tx:
        return journal.get_operation(tx, request_id)


def test_a_forward_backward_is_a_row_with_its_payload_before_it_is_answered(
    alice: Account, storage: Storage, announcements: Announcements
) -> None:
    # when
    run = alice.run()
    request_id = post(alice, message(run, 1).SerializeToString())
    # then
    operation = stored(storage, request_id)
    assert (operation.run_id, operation.seq, operation.kind, operation.status) == (run, 1, "forward_backward", "queued")
    body = operations.decode(storage.payloads.get(operation.payload))
    assert isinstance(body, ForwardBackward)
    assert body.data[0].tokens.tolist() == [1, 2, 3]
    assert announcements.runs[-1] == run


def test_the_same_seq_again_gives_the_same_request_id(alice: Account) -> None:
    run = alice.run()
    body = message(run, 1).SerializeToString()
    assert post(alice, body) == post(alice, body)


def test_seqs_may_arrive_in_any_order(alice: Account, storage: Storage) -> None:
    run = alice.run()
    later, earlier = post(alice, message(run, 2).SerializeToString()), post(alice, message(run, 1).SerializeToString())
    assert [stored(storage, later).status, stored(storage, earlier).status] == ["queued", "queued"]


def test_zstd_bodies_are_read(alice: Account, storage: Storage) -> None:
    run = alice.run()
    body = zstandard.ZstdCompressor().compress(message(run, 1).SerializeToString())
    assert stored(storage, post(alice, body, **{"Content-Encoding": "zstd"})).status == "queued"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda m: (m.SerializeToString() + b"\xff\xff", {}), "not a ForwardBackwardRequest"),
        (lambda m: (m.SerializeToString() + bytes(30_000), {}), "over the limit of 20000 bytes"),
        (
            lambda m: (
                zstandard.ZstdCompressor().compress(m.SerializeToString() + bytes(10**7)),
                {"Content-Encoding": "zstd"},
            ),
            "over the limit of 20000 bytes",
        ),
        (
            lambda m: (
                zstandard.ZstdCompressor().compress(m.SerializeToString() + np.random.default_rng(1).bytes(9000))[
                    :-500
                ],
                {"Content-Encoding": "zstd"},
            ),
            "not",
        ),
    ],
    ids=["garbage", "too large", "too large once decompressed", "cut off"],
)
def test_a_body_that_cannot_be_read_is_accepted_as_a_failed_operation(
    damage: Callable[[pb.ForwardBackwardRequest], tuple[bytes, dict[str, str]]],
    complaint: str,
    alice: Account,
    storage: Storage,
) -> None:
    # given
    run = alice.run()
    body, headers = damage(message(run, 1))
    # when
    request_id = post(alice, body, **headers)
    # then: its seq is consumed, and its future says why
    assert stored(storage, request_id).seq == 1
    failure = alice.retrieve(request_id).json()
    assert failure["category"] == "user"
    assert complaint in failure["error"]
    # and: the run's next operation is accepted as usual
    assert stored(storage, post(alice, message(run, 2).SerializeToString())).status == "queued"


def test_a_bad_loss_name_fails_through_the_future_and_names_the_allowed_ones(alice: Account) -> None:
    run = alice.run()
    request_id = post(alice, message(run, 1, loss_fn="nll").SerializeToString())
    failure = alice.retrieve(request_id, accept="application/x-protobuf")
    assert failure.headers["content-type"] == "application/json"
    assert "'nll' is not one of cispo, cross_entropy" in failure.json()["error"]


def test_a_token_outside_the_vocabulary_names_datum_and_place(alice: Account) -> None:
    run = alice.run()
    failure = alice.retrieve(post(alice, message(run, 1, tokens=(1, 100)).SerializeToString())).json()
    assert "data[0].model_input[1]: token id 100 is outside the vocabulary; ids are 0 to 99" in failure["error"]


def test_a_request_that_belongs_nowhere_is_refused_with_a_body(alice: Account) -> None:
    answer = alice.post("forward_backward", content=b"\xff\xff", headers=PROTO)
    assert answer.status_code == 400
    assert "model_id and seq_id" in answer.json()["detail"]


def test_an_unknown_run_is_404(alice: Account) -> None:
    assert (
        alice.post("forward_backward", content=message("S:train:0", 1).SerializeToString(), headers=PROTO).status_code
        == 404
    )


def test_another_accounts_run_is_404_and_gets_no_operation(alice: Account, bob: Account, storage: Storage) -> None:
    run = alice.run()
    answer = bob.post("forward_backward", content=message(run, 1).SerializeToString(), headers=PROTO)
    missing = bob.post("forward_backward", content=message("x", 1).SerializeToString(), headers=PROTO)
    assert (answer.status_code, missing.status_code) == (404, 404)
    assert answer.json()["detail"].replace(run, "x") == missing.json()["detail"]
    with storage.database.read() as tx:
        assert len(journal.list_operations(tx, run, limit=10)) == 1


@pytest.mark.parametrize("key", ["", "tml-wrong", "secret", None])
def test_a_wrong_key_is_401_in_words(key: str | None, alice: Account) -> None:
    headers = {} if key is None else {"X-API-Key": key}
    answer = alice.http.post("/api/v1/optim_step", json={}, headers=headers)
    assert answer.status_code == 401
    assert "X-API-Key" in answer.json()["detail"]


def test_results_come_as_protobuf_or_json_as_the_client_accepts(
    alice: Account, complete: Callable[[str, Outcome], None]
) -> None:
    # given
    run = alice.run()
    request_id = post(alice, message(run, 1).SerializeToString())
    complete(request_id, ForwardBackwardOutcome((np.array([-1, -2, -3], np.float32),), {"loss:sum": 6.0}))
    # when
    proto, plain = alice.retrieve(request_id, accept="application/x-protobuf"), alice.retrieve(request_id)
    # then
    assert proto.headers["content-type"] == "application/x-protobuf"
    output = deserialize_forward_backward_output(proto.content)
    assert output.loss_fn_outputs[0]["logprobs"].data == [-1, -2, -3]
    assert plain.json()["metrics"] == {"loss:sum": 6.0}


class TestOptimStep:
    def test_is_accepted_and_its_nan_metrics_are_strings(
        self, alice: Account, complete: Callable[[str, Outcome], None]
    ) -> None:
        run = alice.run()
        body = {"model_id": run, "seq_id": 1, "adam_params": {"learning_rate": 1e-4}, "type": "optim_step"}
        request_id = alice.post("optim_step", body).json()["request_id"]
        complete(request_id, OptimStepOutcome({"grad_norm": float("nan"), "step": 1.0}))
        assert alice.retrieve(request_id).json() == {"metrics": {"grad_norm": "NaN", "step": 1.0, "cost_usd": 0.0}}

    @pytest.mark.parametrize("rate", ["NaN", "-1e-4", "Infinity", '"fast"'])
    def test_a_bad_learning_rate_fails_through_the_future(self, rate: str, alice: Account) -> None:
        run = alice.run()
        body = f'{{"model_id": "{run}", "seq_id": 1, "adam_params": {{"learning_rate": {rate}}}}}'
        answer = alice.post("optim_step", content=body)
        failure = alice.retrieve(answer.json()["request_id"]).json()
        assert failure["category"] == "user"
        assert "adam_params.learning_rate" in failure["error"]

    @pytest.mark.parametrize(
        "body", ['{"model_id": "RUN", "seq_id": 1, "adam', '["x", {"model_id": "RUN", "seq_id": 1}]']
    )
    def test_damaged_json_is_accepted_as_failed(self, body: str, alice: Account, storage: Storage) -> None:
        run = alice.run()
        request_id = alice.post("optim_step", content=body.replace("RUN", run)).json()["request_id"]
        assert stored(storage, request_id).status == "failed"

    @pytest.mark.parametrize("seq", [0, -1, "1", None, 1.5])
    def test_a_seq_that_is_no_seq_is_400(self, seq: object, alice: Account) -> None:
        answer = alice.post("optim_step", {"model_id": alice.run(), "seq_id": seq, "adam_params": {}})
        assert answer.status_code == 400
        assert "seq_id" in answer.json()["detail"]


class TestOlderClients:
    def test_forward_backward_and_forward_as_json(self, alice: Account, storage: Storage) -> None:
        run = alice.run()
        targets = {"data": [1, 2], "dtype": "int64", "shape": None}
        given = {
            "data": [{"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": {"target_tokens": targets}}],
            "loss_fn": "cross_entropy",
            "loss_fn_config": None,
        }
        first = alice.post("forward_backward", {"forward_backward_input": given, "model_id": run, "seq_id": 1})
        second = alice.post("forward", {"forward_input": given, "model_id": run, "seq_id": 2})
        kinds = [stored(storage, answer.json()["request_id"]).kind for answer in (first, second)]
        assert kinds == [Kind.FORWARD_BACKWARD, Kind.FORWARD]

    def test_json_that_is_too_large_is_accepted_as_failed(self, alice: Account, storage: Storage) -> None:
        run = alice.run()
        body = {"forward_backward_input": {"data": ["x" * 30_000]}, "model_id": run, "seq_id": 1}
        request_id = alice.post("forward_backward", body).json()["request_id"]
        assert "over the limit" in alice.retrieve(request_id).json()["error"]


class TestCreateModel:
    def test_is_a_run_and_its_operation_0(
        self, alice: Account, storage: Storage, complete: Callable[[str, Outcome], None]
    ) -> None:
        session = alice.session()
        run = alice.run(session, lora_config={"rank": 4, "seed": 7, "train_mlp": False})
        assert run == f"{session}:train:0"
        complete(f"{run}:0", ModelCreated(run))
        assert alice.retrieve(f"{run}:0").json() == {"model_id": run, "type": "create_model"}
        body = operations.decode(storage.payloads.get(stored(storage, f"{run}:0").payload))
        assert (body.lora.rank, body.lora.seed, body.lora.train_mlp, body.lora.train_attn) == (4, 7, False, True)

    def test_repeated_is_the_same_run(self, alice: Account) -> None:
        session = alice.session()
        assert alice.run(session) == alice.run(session)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"base_model": "gpt-9"}, f"'gpt-9' is not served here; served are: '{MODEL}'"),
            ({"lora_config": {"rank": 0}}, "lora_config.rank: 0"),
            ({"optimizer_config": {"type": "dimuon", "version": 1}}, "'dimuon' is not supported"),
        ],
    )
    def test_what_cannot_be_made_fails_through_the_future(
        self, changes: dict[str, object], complaint: str, alice: Account
    ) -> None:
        run = alice.run(**changes)
        failure = alice.retrieve(f"{run}:0").json()
        assert failure["category"] == "user"
        assert complaint in failure["error"]
        # and: an operation on the run that was never made says so
        later = alice.post("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}}).json()["request_id"]
        assert complaint in alice.retrieve(later).json()["error"]

    def test_of_another_accounts_session_is_404(self, alice: Account, bob: Account) -> None:
        body = {"session_id": alice.session(), "model_seq_id": 0, "base_model": MODEL}
        assert bob.post("create_model", body).status_code == 404

    def test_get_info_works_right_away(self, alice: Account, bob: Account) -> None:
        run = alice.run()
        info = alice.post("get_info", {"model_id": run, "type": "get_info"}).json()
        assert info["model_data"] == {"model_name": MODEL, "tokenizer_id": MODEL, "arch": "Qwen3ForCausalLM"}
        assert (info["model_id"], info["lora_rank"], info["is_lora"]) == (run, 32, True)
        assert bob.post("get_info", {"model_id": run}).status_code == 404

    def test_a_custom_loss_on_the_server_is_refused_in_words(self, alice: Account) -> None:
        answer = alice.post("create_custom_loss", {"session_id": alice.session()})
        assert answer.status_code == 400
        assert "client" in answer.json()["detail"]


def test_operations_of_a_finished_session_fail_in_words(alice: Account) -> None:
    session = alice.session()
    run = alice.run(session)
    alice.post(f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    request_id = alice.post("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}}).json()["request_id"]
    assert "finished" in alice.retrieve(request_id).json()["error"]


def test_json_bodies_in_error_never_get_an_empty_answer(alice: Account) -> None:
    answer = alice.post("create_session", content=b"")
    assert answer.status_code == 400
    assert json.loads(answer.content)["detail"]


def test_a_learning_rate_that_is_no_number_fails_through_the_future(alice: Account) -> None:
    # given a learning rate of NaN, of which JSON makes null
    run = alice.run()

    # when the step is submitted
    body = {"model_id": run, "seq_id": 1, "adam_params": {"learning_rate": None}, "type": "optim_step"}
    answer = alice.retrieve(alice.post("optim_step", body).json()["request_id"]).json()

    # then it has failed, and says which field is wrong
    assert answer["category"] == "user"
    assert "learning_rate" in answer["error"]


def test_a_refusal_is_numbered_when_the_client_learns_of_it(alice: Account, storage: Storage) -> None:
    # given a forward_backward that was refused when it was accepted
    run = alice.run()
    body = {"model_id": run, "seq_id": 1, "forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}
    request_id = alice.post("forward_backward", body).json()["request_id"]
    with storage.database.read() as tx:
        assert journal.get_operation(tx, request_id).failure_number is None

    # when its outcome is fetched, twice
    answers = [alice.retrieve(request_id).json() for _ in range(2)]

    # then it counts as one failure that the client knows of
    assert answers[0] == answers[1]
    assert answers[0]["category"] == "user"
    with storage.database.read() as tx:
        assert journal.get_operation(tx, request_id).failure_number == 1
