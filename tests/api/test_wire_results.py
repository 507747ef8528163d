"""Outcomes reach every version of the SDK whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

from api.wire import json_results, results
from jobs.operations import (
    Category,
    Failure,
    ForwardBackwardOutcome,
    Kind,
    Loaded,
    ModelCreated,
    OptimStepOutcome,
    SampledSequence,
    SampleOutcome,
    Saved,
)

ROOT = Path(__file__).parents[2]


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_forward_backward_outputs_keep_their_order_and_ragged_shapes() -> None:
    # given: [N], [N, K], [N] datums between each other
    arrays = (f32(-1, -2), f32(1, 2, 3, 4, 5, 6).reshape(3, 2), f32(7, 8).reshape(1, 2), f32(-3))
    outcome = ForwardBackwardOutcome(arrays, {"loss:sum": 1.5, "odd:mean": math.nan})
    # when: the SDK decodes it
    output = deserialize_forward_backward_output(results.forward_backward(outcome))
    # then
    assert len(output.loss_fn_outputs) == 4
    for array, datum in zip(arrays, output.loss_fn_outputs, strict=True):
        assert datum["logprobs"].shape == list(array.shape)
        assert datum["logprobs"].data == array.ravel().tolist()
    assert output.metrics["loss:sum"] == 1.5
    assert math.isnan(output.metrics["odd:mean"])


def test_samples_keep_every_field() -> None:
    # given
    topk = np.arange(6, dtype=np.int32).reshape(3, 2), f32(*range(6)).reshape(3, 2)
    outcome = SampleOutcome(
        sequences=(
            SampledSequence(np.array([4, 5, 6], np.int32), f32(-1, -2, -3), True, topk[0], topk[1]),
            SampledSequence(np.array([7], np.int32), f32(-0.5), False),
        ),
        prompt_logprobs=f32(math.nan, -1.5),
        topk_prompt_tokens=np.array([[0, 0], [3, 4]], np.int32),
        topk_prompt_logprobs=f32(-99999.0, -99999.0, -0.5, -1.0).reshape(2, 2),
        target_prompt_logprobs=f32(-1.5, 0.0).reshape(1, 2),
        prompt_cache_hit_tokens=1,
    )
    # when
    response = deserialize_sample_response(results.sample(outcome))
    # then
    assert [s.stop_reason for s in response.sequences] == ["stop", "length"]
    assert [s.tokens for s in response.sequences] == [[4, 5, 6], [7]]
    assert response.sequences[0].logprobs == [-1, -2, -3]
    assert response.sequences[0].topk_logprobs == [[(0, 0.0), (1, 1.0)], [(2, 2.0), (3, 3.0)], [(4, 4.0), (5, 5.0)]]
    assert response.prompt_logprobs == [None, -1.5]
    assert response.topk_prompt_logprobs == [None, [(3, -0.5), (4, -1.0)]]
    assert response.target_prompt_logprobs is not None
    assert response.target_prompt_logprobs.shape == [1, 2]
    assert response.prompt_cache_hit_tokens == 1


def test_json_of_training_and_sampling_is_what_older_clients_read() -> None:
    trained = json_results.result(
        Kind.FORWARD_BACKWARD, ForwardBackwardOutcome((f32(-1, math.nan),), {"loss:sum": math.inf})
    )
    assert trained["loss_fn_outputs"] == [{"logprobs": {"data": [-1.0, "NaN"], "dtype": "float32", "shape": [2]}}]
    assert trained["metrics"] == {"loss:sum": "Infinity"}
    drawn = json_results.result(
        Kind.SAMPLE,
        SampleOutcome(
            (SampledSequence(np.array([1], np.int32), f32(-0.5), True),),
            prompt_logprobs=f32(math.nan, -1),
            topk_prompt_tokens=np.array([[0], [3]], np.int32),
            topk_prompt_logprobs=f32(-99999.0, -0.5).reshape(2, 1),
        ),
    )
    assert drawn == {
        "type": "sample",
        "sequences": [{"stop_reason": "stop", "tokens": [1], "logprobs": [-0.5]}],
        "prompt_logprobs": [None, -1.0],
        "topk_prompt_logprobs": [None, [[3, -0.5]]],
        "prompt_cache_hit_tokens": 0,
    }
    json.dumps([trained, drawn], allow_nan=False)


@pytest.mark.parametrize(
    ("kind", "outcome", "expected"),
    [
        (Kind.CREATE_MODEL, ModelCreated("r"), {"model_id": "r", "type": "create_model"}),
        (Kind.OPTIM_STEP, OptimStepOutcome({"grad_norm": math.nan}), {"metrics": {"grad_norm": "NaN"}}),
        (Kind.SAVE_STATE, Saved("p", size_bytes=3), {"path": "p", "type": "save_weights"}),
        (
            Kind.SAVE_FOR_SAMPLER,
            Saved(sampling_session_id="s"),
            {"sampling_session_id": "s", "type": "save_weights_for_sampler"},
        ),
        (
            Kind.SAVE_EXTERNAL,
            Saved("p", size_bytes=3),
            {"path": "p", "size_bytes": 3, "type": "save_weights_external"},
        ),
        (Kind.LOAD_STATE, Loaded("r", "p"), {"path": "p", "model_id": "r", "type": "load_weights"}),
        (Kind.SAMPLE, Failure("no", Category.SERVER), {"error": "no", "category": "server"}),
    ],
)
def test_json_results_have_the_keys_that_the_sdk_requires(kind: Kind, outcome: object, expected: object) -> None:
    assert json_results.result(kind, outcome) == expected  # type: ignore[arg-type]


def test_the_generated_module_is_that_of_the_schema(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", "api/tinker_public.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    made = (tmp_path / "api" / "tinker_public_pb2.py").read_text()
    assert made == (ROOT / "api" / "tinker_public_pb2.py").read_text(), "regenerate it, see api/README.md"
