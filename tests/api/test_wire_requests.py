"""What the SDK sends becomes the operation it means."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from api import tinker_public_pb2 as pb
from api.wire import address, json_requests, requests
from jobs.operations import OptimStep, SaveExternal, SaveForSampler, SaveState
from jobs.validation import InvalidOperationError


def sdk_bytes(*data: tinker.Datum, loss_fn: str = "cross_entropy", **config: float | str) -> bytes:
    """A request as the SDK itself encodes it."""
    given = ForwardBackwardInput(data=list(data), loss_fn=loss_fn, loss_fn_config=config or None)
    request = ForwardBackwardRequest(forward_backward_input=given, model_id="S:train:0", seq_id=3)
    return forward_backward_request_to_proto(request).SerializeToString()


def sdk_datum(*tokens: int, **inputs: torch.Tensor) -> tinker.Datum:
    named = {name: tinker.TensorData.from_torch(tensor) for name, tensor in inputs.items()}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(tokens)), loss_fn_inputs=named)


def test_a_forward_backward_of_the_sdk_is_read_whole() -> None:
    # given
    weights = torch.tensor([0.0, 1.0, -0.5])
    data = sdk_bytes(
        sdk_datum(1, 2, 3, target_tokens=torch.tensor([2, 3, 4]), weights=weights),
        sdk_datum(5, target_tokens=torch.tensor([6]), weights=torch.ones(1)),
        loss_fn="ppo",
        clip_low_threshold=0.7,
        note="x",
    )
    # when
    body = requests.forward_backward(data)
    # then
    assert [datum.tokens.tolist() for datum in body.data] == [[1, 2, 3], [5]]
    assert body.data[0].inputs["weights"].tolist() == weights.tolist()
    assert body.data[0].inputs["target_tokens"].dtype == np.int64
    assert (body.loss_fn, body.forward_only) == ("ppo", False)
    assert body.loss_config == {"clip_low_threshold": 0.7, "note": "x"}
    assert address.from_protobuf(data) == address.Address("S:train:0", 3)


def test_forward_only_is_a_forward() -> None:
    message = pb.ForwardBackwardRequest(model_id="r", seq_id=1, loss_fn="cross_entropy", forward_only=True)
    assert requests.forward_backward(message.SerializeToString()).forward_only


@pytest.mark.parametrize(
    ("chunk", "complaint"),
    [
        (pb.Chunk(image=pb.ImageChunk(data=b"x", format="png")), r"data\[0\]\.model_input\[0\]: images"),
        (pb.Chunk(dmel=pb.DmelChunk(dmel=b"x")), "audio"),
        (pb.Chunk(), "empty chunk"),
        (pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=b"123")), "whole number"),
    ],
)
def test_chunks_that_are_not_tokens_are_refused_by_place(chunk: pb.Chunk, complaint: str) -> None:
    message = pb.ForwardBackwardRequest(model_id="r", seq_id=1, data=[pb.Datum(model_input=[chunk])])
    with pytest.raises(InvalidOperationError, match=complaint):
        requests.forward_backward(message.SerializeToString())


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(InvalidOperationError, match="not a ForwardBackwardRequest"):
        requests.forward_backward(b"\xff\xff\xff")


class TestAddress:
    def test_is_found_before_the_place_where_a_body_was_cut(self) -> None:
        data = sdk_bytes(sdk_datum(*range(1000)))
        assert address.from_protobuf(data[:40]) == address.Address("S:train:0", 3)

    def test_is_found_behind_fields_of_other_numbers(self) -> None:
        later = pb.ForwardBackwardRequest(model_id="r", seq_id=2).SerializeToString()
        earlier = pb.ForwardBackwardRequest(loss_fn="x", forward_only=True, data=[pb.Datum()]).SerializeToString()
        assert address.from_protobuf(earlier + later) == address.Address("r", 2)

    @pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x0a\x05ab", b"\x0a\x02\xff\xff\x10\x01", b"\x0b"])
    def test_is_none_in_bytes_that_hold_none(self, data: bytes) -> None:
        assert address.from_protobuf(data) is None

    @pytest.mark.parametrize(
        ("head", "tail"),
        [
            (b'{"model_id": "S:train:0", "seq_id": 3, "forward_backward_input": {', b"]}}"),
            (b'{"forward_backward_input": {', b'}, "model_id":"S:train:0","seq_id":3}'),
            (b'{"model_id": "S:train:0", "forward_input": {', b'}, "seq_id":3}'),
        ],
    )
    def test_is_found_at_either_end_of_json(self, head: bytes, tail: bytes) -> None:
        assert address.from_json(head, tail) == address.Address("S:train:0", 3)

    @pytest.mark.parametrize("text", [b"", b'{"model_id": "r"}', b'{"seq_id": 3}', b'{"model_id": "r", "seq_id": 3.5}'])
    def test_is_none_in_json_without_it(self, text: bytes) -> None:
        assert address.from_json(text, text) is None


class TestOlderClients:
    def test_forward_backward_as_json_without_discriminators(self) -> None:
        # given: what SDK 0.16.1 sends, explicit nulls included
        datum = {
            "model_input": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": None},
                "weights": {"data": [1.0, 0, 1.0], "dtype": "float32", "shape": [3]},
            },
        }
        payload = {"forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy", "loss_fn_config": None}}
        # when
        body = json_requests.forward_backward(payload, forward_only=False)
        # then
        assert body.data[0].tokens.tolist() == [1, 2, 3]
        assert body.data[0].inputs["weights"].tolist() == [1.0, 0.0, 1.0]

    def test_forward_has_its_own_field(self) -> None:
        payload = {"forward_input": {"data": [], "loss_fn": "cross_entropy"}}
        assert json_requests.forward_backward(payload, forward_only=True).forward_only

    @pytest.mark.parametrize("chunk", [{"data": "aGk=", "format": "png"}, {"location": "tinker://x", "format": "png"}])
    def test_images_are_known_by_their_keys(self, chunk: dict[str, str]) -> None:
        datum = {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {}}
        payload = {"forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
        with pytest.raises(InvalidOperationError, match="images are not supported"):
            json_requests.forward_backward(payload, forward_only=False)

    @pytest.mark.parametrize("payload", [{}, {"adam_params": {}}, {"adam_params": None}])
    def test_adam_parameters_that_are_not_sent_take_the_documented_defaults(self, payload: dict[str, object]) -> None:
        assert json_requests.optim_step(payload) == OptimStep(1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0)

    def test_sampling_parameters_that_are_not_sent_take_their_defaults(self) -> None:
        body = json_requests.sample({"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 3}})
        assert (body.params.temperature, body.params.top_k, body.params.top_p) == (1.0, -1, 1.0)
        assert body.num_samples == 1


class TestOptimStep:
    def test_other_families_than_adam_are_refused(self) -> None:
        with pytest.raises(InvalidOperationError, match="dimuon"):
            json_requests.optim_step({"optimizer_params": {"type": "dimuon", "learning_rate": 1e-3}})

    @pytest.mark.parametrize("bad", ["1e-4", True, [1]])
    def test_a_learning_rate_that_is_no_number_is_refused_by_name(self, bad: object) -> None:
        with pytest.raises(InvalidOperationError, match=r"adam_params\.learning_rate"):
            json_requests.optim_step({"adam_params": {"learning_rate": bad}})

    def test_an_unknown_parameter_is_refused_instead_of_ignored(self) -> None:
        with pytest.raises(InvalidOperationError, match="amsgrad"):
            json_requests.optim_step({"adam_params": {"amsgrad": 1.0}})


class TestSaves:
    def test_each_kind_of_save(self) -> None:
        assert json_requests.save_state({"path": "a", "ttl_seconds": 3600, "overwrite": True}) == SaveState(
            "a", 3600, True
        )
        named = json_requests.save_for_sampler({"path": "b", "kind": "inflight"})
        assert named == SaveForSampler("b")
        ephemeral = json_requests.save_for_sampler({"sampling_session_seq_id": 4, "kind": "snapshot"})
        assert ephemeral == SaveForSampler(None, 4)
        assert json_requests.save_external({"path": "c"}) == SaveExternal("c")

    @pytest.mark.parametrize("payload", [{}, {"path": "a", "sampling_session_seq_id": 0}])
    def test_a_sampler_save_is_named_or_ephemeral(self, payload: dict[str, object]) -> None:
        with pytest.raises(InvalidOperationError, match="exactly one"):
            json_requests.save_for_sampler(payload)

    def test_encryption_is_refused_instead_of_ignored(self) -> None:
        with pytest.raises(InvalidOperationError, match="age_encryption_recipients"):
            json_requests.save_external({"path": "c", "age_encryption_recipients": ["age1"]})


class TestSample:
    PROMPT = {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("stop", "read"), [(None, None), ([], ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([7, 8], (7, 8))]
    )
    def test_every_form_of_stop(self, stop: object, read: object) -> None:
        body = json_requests.sample({"prompt": self.PROMPT, "sampling_params": {"stop": stop}})
        assert body.params.stop == read

    @pytest.mark.parametrize("stop", [[1, "a"], [1.5], 7])
    def test_other_forms_of_stop_are_refused(self, stop: object) -> None:
        with pytest.raises(InvalidOperationError, match="stop"):
            json_requests.sample({"prompt": self.PROMPT, "sampling_params": {"stop": stop}})

    def test_a_seed_that_is_not_given_is_drawn_and_any_integer_is_folded(self) -> None:
        drawn = {json_requests.sample({"prompt": self.PROMPT}).params.seed for _ in range(3)}
        assert len(drawn) == 3
        assert json_requests.sample({"prompt": self.PROMPT, "sampling_params": {"seed": -1}}).params.seed == 2**63 - 2

    def test_targets_may_be_sparse_and_list_none_by_minus_one(self) -> None:
        targets = {
            "data": [9],
            "dtype": "int64",
            "shape": [1, 3],
            "sparse_crow_indices": [0, 1],
            "sparse_col_indices": [1],
        }
        body = json_requests.sample({"prompt": self.PROMPT, "target_prompt_logprobs": targets})
        assert body.target_prompt_logprobs is not None
        assert body.target_prompt_logprobs.tolist() == [[-1, 9, -1]]

    @pytest.mark.parametrize(
        ("option", "value"),
        [("prompt_alt_tokens_k", 2), ("record_stability_info", True), ("sampling_params", {"min_p": 0.1})],
    )
    def test_options_that_are_not_supported_are_refused_by_name(self, option: str, value: object) -> None:
        with pytest.raises(InvalidOperationError, match=option):
            json_requests.sample({"prompt": self.PROMPT, option: value})

    @pytest.mark.parametrize("prompt", [None, {}, {"chunks": [{}]}, {"chunks": ["x"]}, {"chunks": [{"dmel": "x"}]}])
    def test_prompts_that_are_no_tokens_are_refused(self, prompt: object) -> None:
        with pytest.raises(InvalidOperationError, match="prompt"):
            json_requests.sample({"prompt": prompt})
