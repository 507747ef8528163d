"""Line by line, what a server of the protocol must do: one test per line of the checklist, against real processes."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tinker
import torch
import zstandard
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from tests.setups.deployment import Deployment
from tests.tiny_model import CONTEXT_LENGTH, VOCAB_SIZE
from tests.wire.conftest import PROTOBUF, Wire
from tests.wire.messages import datum, forward_backward

pytestmark = pytest.mark.processes

TEXT = [5, 6, 7, 8, 9, 10]


def output(wire: Wire, request_id: str) -> tinker.ForwardBackwardOutput:
    """The result of a forward(-backward), decoded by the SDK."""
    answer = wire.outcome(request_id, accept=PROTOBUF)
    assert answer.headers["content-type"] == PROTOBUF, answer.text
    return deserialize_forward_backward_output(answer.content)


def sampler(wire: Wire, number: int = 0) -> str:
    """A sampling session on the base model."""
    body = {"session_id": wire.session, "sampling_session_seq_id": number, "base_model": wire.base_model}
    return str(wire.post("create_sampling_session", body).json()["sampling_session_id"])


def sample(sampling_session: str, seq: int, **params: object) -> dict[str, object]:
    """The body of `asample`."""
    return {
        "sampling_session_id": sampling_session,
        "seq_id": seq,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": TEXT}]},
        "sampling_params": {"max_tokens": 4, "seed": 1} | params,
        "type": "sample",
    }


def test_01_submissions_are_answered_without_waiting_for_execution(wire: Wire) -> None:
    # given: a run that has work to do, and a gap before the operations that follow
    run = wire.run()
    # when: operations are submitted that cannot be executed, since seq 1 is missing
    started = time.monotonic()
    later = [wire.submit_protobuf(forward_backward(run, seq, [datum(TEXT)])) for seq in range(2, 12)]
    submitting_s = time.monotonic() - started
    # then: every one has a request id, long before the first could be executed
    assert len(set(later)) == 10
    assert submitting_s < 10
    # and: once the gap closes, all are executed
    wire.submit_protobuf(forward_backward(run, 1, [datum(TEXT)]))
    assert {len(output(wire, request_id).loss_fn_outputs) for request_id in later} == {1}


def test_02_operations_take_effect_in_seq_order_whatever_order_they_arrive_in(wire: Wire) -> None:
    # given: two runs alike
    in_order, shuffled = wire.run(0), wire.run(1)

    def submit(run: str, seq: int) -> str:
        if seq % 2 == 0:
            return wire.step(run, seq)
        return wire.submit_protobuf(forward_backward(run, seq, [datum(TEXT)]))

    # when: the same six operations arrive in order at one, and out of order and twice at the other
    expected = [submit(in_order, seq) for seq in range(1, 7)]
    twice = [(seq, submit(shuffled, seq)) for seq in (3, 6, 2, 3, 5, 1, 4, 1)]
    # then: a seq has one request id
    request_ids = dict(twice)
    assert all(request_ids[seq] == request_id for seq, request_id in twice)
    # and: both compute the same
    for seq in (1, 3, 5):
        losses = [output(wire, ids).metrics["loss:sum"] for ids in (expected[seq - 1], request_ids[seq])]
        assert losses[0] == losses[1]


def test_03_a_failure_goes_through_the_future_and_the_run_goes_on(wire: Wire) -> None:
    # given: a bad operation, with a step pipelined behind it
    run = wire.run()
    bad = wire.submit_protobuf(forward_backward(run, 1, [datum([1, VOCAB_SIZE, 2])]))
    failure = wire.failure(bad)
    assert failure["category"] == "user"
    assert f"token id {VOCAB_SIZE} is outside the vocabulary" in failure["error"]
    # when: the next operations follow
    good = wire.submit_protobuf(forward_backward(run, 2, [datum(TEXT)]))
    step = wire.step(run, 3)
    # then
    assert len(output(wire, good).loss_fn_outputs) == 1
    assert wire.result(step)["metrics"]["grad_norm"] > 0


def test_04_polls_are_held_and_then_answered_408_with_what_they_wait_for(wire: Wire) -> None:
    # given: an operation behind a gap
    run = wire.run()
    waiting = wire.step(run, 2)
    # when
    started = time.monotonic()
    answer = wire.post("retrieve_future", {"request_id": waiting, "allow_metadata_only": True})
    held_s = time.monotonic() - started
    # then: held for 20 to 30 seconds, below the client's 45
    assert answer.status_code == 408
    assert 20 <= held_s <= 40
    body = answer.json()
    assert (body["type"], body["request_id"]) == ("try_again", waiting)
    assert "seq_id 1 has not arrived" in body["queue_state_reason"]
    # and: results stay for a second fetch; what never existed is 404
    first = wire.submit_protobuf(forward_backward(run, 1, [datum(TEXT)]))
    assert output(wire, first).metrics == output(wire, first).metrics
    assert wire.outcome("never").status_code == 404


def test_05_samples_name_their_sequences_and_are_numbered_up_to_64_bits(wire: Wire) -> None:
    opened = sampler(wire)
    for seq in (0, 10**9 * 10**9 - 1):
        accepted = wire.post("asample", sample(opened, seq)).json()
        assert len(accepted["sample_sequence_ids"]) == 2
        assert wire.post("asample", sample(opened, seq)).json() == accepted
        drawn = deserialize_sample_response(wire.outcome(accepted["request_id"], accept=PROTOBUF).content)
        assert len(drawn.sequences) == 2


def test_06_results_are_encoded_as_the_client_accepts(wire: Wire) -> None:
    run = wire.run()
    trained = wire.submit_protobuf(forward_backward(run, 1, [datum(TEXT)]))
    plain = wire.result(trained)
    assert plain["metrics"] == output(wire, trained).metrics
    assert plain["loss_fn_outputs"][0]["logprobs"]["shape"] == [len(TEXT) - 1]
    drawn = wire.submit("asample", sample(sampler(wire), 0))
    proto = deserialize_sample_response(wire.outcome(drawn, accept=PROTOBUF).content)
    assert [s["tokens"] for s in wire.result(drawn)["sequences"]] == [s.tokens for s in proto.sequences]


def test_07_metrics_have_suffixes_and_every_datum_its_logprobs_in_order(wire: Wire) -> None:
    run = wire.run()
    lengths = [3, 6, 2, 5]
    result = output(wire, wire.submit_protobuf(forward_backward(run, 1, [datum(TEXT[:n]) for n in lengths])))
    assert [len(item["logprobs"].data) for item in result.loss_fn_outputs] == [n - 1 for n in lengths]
    assert "loss:sum" in result.metrics
    assert [key for key in result.metrics if not re.fullmatch(r"[^:]+:[^:]+", key)] == []


def test_08_cross_entropy_is_linear_in_its_weights_dense_or_sparse_forward_or_backward(wire: Wire) -> None:
    # given: 3 targets per position, most of weight 0, so that the SDK sends them sparse
    run = wire.run()
    length, width = len(TEXT), 12
    targets = torch.zeros(length, width, dtype=torch.int64)
    weights = torch.zeros(length, width)
    targets[1, 2], weights[1, 2] = 7, 1.5
    targets[4, 11], weights[4, 11] = 9, -0.25
    sparse = {
        "target_tokens": tinker.TensorData.from_torch_sparse(targets),
        "weights": tinker.TensorData.from_torch_sparse(weights),
    }
    assert sparse["weights"].sparse_crow_indices is not None
    # when
    sent = [
        forward_backward(run, 1, [datum(TEXT, **sparse)]),
        forward_backward(run, 2, [datum(TEXT, target_tokens=targets, weights=weights)]),
        forward_backward(run, 3, [datum(TEXT, target_tokens=targets, weights=-2 * weights)], forward_only=True),
    ]
    results = [output(wire, wire.submit_protobuf(content)) for content in sent]
    # then
    logprobs = np.array(results[0].loss_fn_outputs[0]["logprobs"].data).reshape(length, width)
    expected = -(1.5 * logprobs[1, 2] - 0.25 * logprobs[4, 11])
    assert results[0].loss_fn_outputs[0]["logprobs"].shape == [length, width]
    assert results[0].metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert results[1].metrics["loss:sum"] == results[0].metrics["loss:sum"]
    assert results[2].metrics["loss:sum"] == pytest.approx(-2 * expected, rel=1e-5)


def test_09_no_conflicts_and_no_empty_refusals(wire: Wire) -> None:
    run = wire.run()
    saved = [wire.submit("save_weights", {"model_id": run, "seq_id": n, "path": "same"}) for n in (1, 2)]
    # then: a name taken twice fails through the future
    assert wire.result(saved[0])["path"] == f"tinker://{run}/weights/same"
    assert "exists already" in wire.failure(saved[1])["error"]
    # and: publishing twice is no conflict
    publish = f"training_runs/{run}/checkpoints/weights/same/publish"
    assert [wire.post(publish).status_code for _ in range(2)] == [204, 204]
    # and: what is refused says why
    for route, body in [("create_session", b""), ("optim_step", b"{}"), ("forward_backward", b"")]:
        refused = wire.post(route, content=body)
        assert refused.status_code == 400
        assert refused.json()["detail"]


def test_10_ids_follow_the_scheme_and_names_have_no_slash(wire: Wire) -> None:
    run = wire.run(4)
    assert run == f"{wire.session}:train:4"
    bad = wire.submit("save_weights", {"model_id": run, "seq_id": 1, "path": "a/b"})
    assert "checkpoint name" in wire.failure(bad)["error"]


def test_11_heartbeats_are_answered_until_finish_and_then_410(wire: Wire) -> None:
    beat = {"session_id": wire.session, "type": "session_heartbeat"}
    assert wire.post("session_heartbeat", beat).status_code == 200
    assert wire.post(f"sessions/{wire.session}/finish", {"reason": {"type": "success"}}).status_code == 204
    assert wire.post("session_heartbeat", beat).status_code == 410


def test_12_telemetry_and_config_have_their_one_form_and_json_has_no_nan(wire: Wire) -> None:
    assert wire.post("telemetry", {"events": []}).json() == {"status": "accepted"}
    assert isinstance(wire.post("client/config", {"sdk_version": "0.38.0"}).json(), dict)
    # given: a loss that overflows
    run = wire.run()
    huge = datum(TEXT, target_tokens=torch.tensor(TEXT), weights=torch.full((len(TEXT),), 3e38))
    trained = wire.submit_protobuf(forward_backward(run, 1, [huge]))
    # then: whatever comes of it is JSON that a strict parser reads
    answers = [wire.outcome(trained), wire.outcome(wire.step(run, 2))]
    for answer in answers:
        assert not re.search(r"\b(NaN|-?Infinity)\b(?!\")", answer.text), answer.text[:200]


def test_13_external_weights_are_downloaded_without_a_key(wire: Wire) -> None:
    # given
    run = wire.run()
    saved = wire.result(wire.submit("save_weights_external", {"model_id": run, "seq_id": 1, "path": "dl"}))
    assert saved["path"] == f"tinker://{run}/external_weights/dl"
    at = f"/api/v1/training_runs/{run}/checkpoints/external_weights/dl"
    # when
    links = wire.http.get(f"{at}/external_weights_urls").json()["urls"]
    # then
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(links)
    config = httpx.get(links["adapter_config.json"]).json()
    assert (config["r"], config["lora_alpha"]) == (4, 32)
    weights = httpx.get(links["adapter_model.safetensors"])
    assert int(weights.headers["content-length"]) == len(weights.content) > 0
    # and: older clients get the archive behind a redirect
    redirect = wire.http.get(f"{at}/archive")
    assert redirect.status_code == 302
    assert b"checkpoint_complete" in httpx.get(redirect.headers["location"]).content


def test_14_compressed_bodies_of_several_megabytes_are_read(wire: Wire) -> None:
    # given: as many datums as the SDK puts into one request
    run = wire.run()
    tokens = [3 + place % 50 for place in range(CONTEXT_LENGTH)]
    body = forward_backward(run, 1, [datum(tokens[:9], **_padded(8))] * 4)
    large = body + _unknown_field(6_000_000)
    # when
    compressed = zstandard.ZstdCompressor().compress(large)
    request_id = wire.submit_protobuf(compressed, **{"Content-Encoding": "zstd"})
    # then
    assert len(output(wire, request_id).loss_fn_outputs) == 4


def test_many_polls_at_once_are_all_answered(wire: Wire) -> None:
    """As the SDK polls 300 outstanding samples."""
    opened = sampler(wire)
    ids = [wire.submit("asample", sample(opened, seq, max_tokens=2)) for seq in range(60)]
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda request_id: wire.outcome(request_id, accept=PROTOBUF), ids))
    assert {answer.headers["content-type"] for answer in answers} == {PROTOBUF}


def test_a_wrong_key_is_told_so(service: Deployment) -> None:
    answer = httpx.post(f"{service.url}/api/v1/client/config", json={}, headers={"X-API-Key": "tml-wrong"})
    assert answer.status_code == 401
    assert "piecework keys create" in answer.json()["detail"]


def _padded(length: int) -> dict[str, torch.Tensor]:
    return {"target_tokens": torch.ones(length + 1, dtype=torch.int64), "weights": torch.ones(length + 1)}


def _unknown_field(size: int) -> bytes:
    """A protobuf field of a number that is not in use, as a later SDK might send."""
    length = b""
    value = size
    while value >= 0x80:
        length += bytes([value & 0x7F | 0x80])
        value >>= 7
    return bytes([15 << 3 | 2]) + length + bytes([value]) + bytes(size)
