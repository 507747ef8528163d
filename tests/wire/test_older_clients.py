"""SDK 0.16.1: JSON in both directions, only the fields that the user set, explicit nulls, no discriminators."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.wire.conftest import Wire

pytestmark = pytest.mark.processes

TEXT = [5, 6, 7, 8, 9]


def training_input(tokens: list[int] = TEXT) -> dict[str, Any]:
    """Next-token targets of weight 1."""
    targets = {"data": tokens[1:], "dtype": "int64", "shape": [len(tokens) - 1]}
    weights = {"data": [1.0] * (len(tokens) - 1), "dtype": "float32", "shape": None}
    datum = {
        "model_input": {"chunks": [{"tokens": tokens[:-1]}]},
        "loss_fn_inputs": {"target_tokens": targets, "weights": weights},
    }
    return {"data": [datum], "loss_fn": "cross_entropy", "loss_fn_config": None}


def test_the_loop_of_0_16_trains_resumes_and_samples(wire: Wire) -> None:
    # given: a run made without a session configuration of any kind
    made = {"session_id": wire.session, "model_seq_id": 0, "base_model": wire.base_model, "lora_config": {"rank": 8}}
    run = wire.result(wire.submit("create_model", made))["model_id"]

    # when: it trains with JSON
    first = wire.submit("forward_backward", {"forward_backward_input": training_input(), "model_id": run, "seq_id": 1})
    step = wire.submit("optim_step", {"adam_params": {}, "model_id": run, "seq_id": 2})
    scored = wire.submit("forward", {"forward_input": training_input(), "model_id": run, "seq_id": 3})
    saved = wire.submit("save_weights", {"model_id": run, "path": "old", "seq_id": 4})

    # then: results are JSON
    trained = wire.result(first)
    assert trained["loss_fn_outputs"][0]["logprobs"]["dtype"] == "float32"
    assert len(trained["loss_fn_outputs"][0]["logprobs"]["data"]) == len(TEXT) - 1
    assert wire.result(step)["metrics"]["grad_norm"] > 0
    assert wire.result(scored)["metrics"]["loss:sum"] != trained["metrics"]["loss:sum"]
    path = wire.result(saved)["path"]

    # and: it resumes as old clients do, with a fresh run and a load as its first operation
    info = wire.post("weights_info", {"tinker_path": path}).json()
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == (wire.base_model, True, 8)
    resumed = wire.result(wire.submit("create_model", made | {"model_seq_id": 1}))["model_id"]
    loaded = wire.submit("load_weights", {"model_id": resumed, "path": path, "seq_id": 1, "optimizer": True})
    assert wire.result(loaded)["path"] == path
    again = wire.submit("forward", {"forward_input": training_input(), "model_id": resumed, "seq_id": 2})
    assert wire.result(again)["metrics"]["loss:sum"] == pytest.approx(wire.result(scored)["metrics"]["loss:sum"])


def test_samples_of_0_16_come_as_json(wire: Wire) -> None:
    # given
    opened = {"session_id": wire.session, "sampling_session_seq_id": 0, "base_model": wire.base_model}
    sampler = wire.post("create_sampling_session", opened | {"model_path": None}).json()["sampling_session_id"]
    # when
    asked = {
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": TEXT}]},
        "sampling_params": {"max_tokens": 3, "stop": None},
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
    }
    drawn = wire.result(wire.submit("asample", asked))
    # then
    assert drawn["type"] == "sample"
    assert len(drawn["sequences"]) == 2
    assert {sequence["stop_reason"] for sequence in drawn["sequences"]} <= {"stop", "length"}
    assert drawn["prompt_logprobs"][0] is None
    assert all(value < 0 for value in drawn["prompt_logprobs"][1:])
    assert drawn["topk_prompt_logprobs"][0] is None
    assert [len(row) for row in drawn["topk_prompt_logprobs"][1:]] == [2] * (len(TEXT) - 1)


def test_the_archive_of_a_sampler_checkpoint_is_behind_a_redirect(wire: Wire) -> None:
    run = wire.run()
    saved = wire.submit("save_weights_for_sampler", {"model_id": run, "path": "arch", "seq_id": 1})
    path = wire.result(saved)["path"]
    at = path.removeprefix("tinker://").replace("/sampler_weights/", "/checkpoints/sampler_weights/")
    answer = wire.http.get(f"/api/v1/training_runs/{at}/archive", headers={"Accept": "application/gzip"})
    assert answer.status_code == 302
    assert answer.headers["expires"].endswith("GMT")
    archive = httpx.get(answer.headers["location"])
    assert archive.headers["content-type"] == "application/x-tar"
    assert b"adapter_model.safetensors" in archive.content
