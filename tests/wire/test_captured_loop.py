"""The captured loop of SDK 0.38.0, replayed call by call with its exact bodies."""

from __future__ import annotations

import httpx
import pytest
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from tests.setups.deployment import Deployment
from tests.wire.conftest import PROTOBUF, TIMEOUT_S, Wire
from tests.wire.messages import datum, forward_backward

pytestmark = pytest.mark.processes


def test_the_captured_loop_of_the_sdk_is_answered_call_by_call(service: Deployment) -> None:
    with httpx.Client(base_url=service.url, headers={"X-API-Key": service.api_key}, timeout=TIMEOUT_S) as http:
        wire = Wire(http, session="")
        version = {"sdk_version": "0.38.0"}
        # start-up
        assert wire.post("client/config", version).json()["parallel_fwdbwd_chunks"] is False
        assert wire.post("client/dynamic_config", version).status_code == 200
        created = {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0", "type": "create_session"}
        session = wire.post("create_session", created).json()["session_id"]

        # a run
        model = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": wire.base_model,
            "lora_config": {"rank": 16, "train_unembed": True, "train_mlp": True, "train_attn": True},
            "optimizer_config": {"type": "adamw"},
            "type": "create_model",
        }
        run = wire.result(wire.submit("create_model", model))["model_id"]
        assert run == f"{session}:train:0"
        info = wire.post("get_info", {"model_id": run, "type": "get_info"}).json()
        assert info["model_id"] == run
        assert info["model_data"]["model_name"] == wire.base_model
        assert info["model_data"]["tokenizer_id"] == wire.base_model

        # training, both submitted before either is polled
        data = [datum([5, 6, 7, 8]), datum([9, 10, 11])]
        trained = wire.submit_protobuf(forward_backward(run, 1, data))
        adam = {
            "learning_rate": 0.0001,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-12,
            "weight_decay": 0.0,
            "grad_clip_norm": 0.0,
        }
        stepped = wire.submit("optim_step", {"model_id": run, "seq_id": 2, "type": "optim_step", "adam_params": adam})
        answer = wire.outcome(trained, accept=PROTOBUF)
        assert answer.headers["content-type"] == PROTOBUF
        output = deserialize_forward_backward_output(answer.content)
        assert [len(item["logprobs"].data) for item in output.loss_fn_outputs] == [3, 2]
        logprobs = [value for item in output.loss_fn_outputs for value in item["logprobs"].data]
        assert output.metrics["loss:sum"] == pytest.approx(-sum(logprobs), rel=1e-5)
        assert wire.result(stepped)["metrics"]["grad_norm"] > 0

        # an ephemeral sampler
        saved = wire.submit(
            "save_weights_for_sampler",
            {
                "model_id": run,
                "sampling_session_seq_id": 0,
                "kind": "snapshot",
                "seq_id": 3,
                "type": "save_weights_for_sampler",
            },
        )
        sampler = wire.result(saved)["sampling_session_id"]
        assert sampler == f"{session}:sample:0"

        # a sample
        asked = {
            "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [5, 6, 7], "type": "encoded_text"}]},
            "sampling_params": {
                "max_tokens": 3,
                "seed": 3,
                "stop": ["a"],
                "temperature": 1.0,
                "top_k": -1,
                "top_p": 1.0,
            },
            "sampling_session_id": sampler,
            "seq_id": 0,
            "prompt_logprobs": False,
            "topk_prompt_logprobs": 0,
            "topk_sample_logprobs": 0,
            "prompt_alt_tokens_k": 0,
            "record_stability_info": False,
            "type": "sample",
        }
        accepted = wire.post("asample", asked).json()
        assert len(accepted["sample_sequence_ids"]) == 2
        response = deserialize_sample_response(wire.outcome(accepted["request_id"], accept=PROTOBUF).content)
        assert len(response.sequences) == 2
        for sequence in response.sequences:
            assert 1 <= len(sequence.tokens) == len(sequence.logprobs or []) <= 3

        # the end
        beat = {"session_id": session, "type": "session_heartbeat"}
        assert wire.post("session_heartbeat", beat).status_code == 200
        events = {"events": [], "platform": "x", "sdk_version": "0.38.0", "session_id": session, "process_uuid": "u"}
        assert wire.post("telemetry", events).json() == {"status": "accepted"}
        finish = {"reason": {"type": "success"}, "detail": None}
        assert wire.post(f"sessions/{session}/finish", finish).status_code == 204
        assert wire.post("session_heartbeat", beat).status_code == 410
