"""The official SDK and its command line against real processes: what users call, and what goes wrong for them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from tinker import types

from tests.setups.deployment import MODEL, Deployment
from tests.tiny_model import CONTEXT_LENGTH, VOCAB_SIZE
from tests.wire.messages import datum

pytestmark = [
    pytest.mark.processes,
    # loads in place are deprecated in the SDK, and served all the same
    pytest.mark.filterwarnings(r"ignore:DEPRECATED. TrainingClient\.load_state:FutureWarning"),
]

TEXT = [5, 6, 7, 8, 9, 10]
PROMPT = types.ModelInput.from_ints(TEXT)


@pytest.fixture
def training(client: tinker.ServiceClient) -> tinker.TrainingClient:
    """A fresh run."""
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result()


@pytest.fixture
def sampling(client: tinker.ServiceClient) -> tinker.SamplingClient:
    """A sampler of the base model."""
    return client.create_sampling_client(base_model=MODEL).result()


def step(training: tinker.TrainingClient) -> float:
    """One step of training; the loss before it."""
    forward_backward = training.forward_backward([datum(TEXT)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return forward_backward.result().metrics["loss:sum"]


class TestLosses:
    @pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
    def test_policy_losses_move_what_is_rewarded(self, loss: Any, training: tinker.TrainingClient) -> None:
        # given: log-probabilities of the policy itself
        scored = training.forward([datum(TEXT)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
        rewarded = datum(
            TEXT[:-1],
            target_tokens=torch.tensor(TEXT[1:]),
            logprobs=scored,
            advantages=torch.ones(len(TEXT) - 1),
        )
        # when
        trained = training.forward_backward([rewarded], loss).result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        # then: the ratio is 1 to begin with, and the tokens become likelier
        expected = -float(scored.sum()) if loss in ("cispo", "dro") else -(len(TEXT) - 1)
        assert trained.metrics["loss:sum"] == pytest.approx(expected, abs=1e-3)
        after = training.forward([datum(TEXT)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
        assert after.sum() > scored.sum()

    def test_a_custom_loss_in_the_client_trains(self, training: tinker.TrainingClient) -> None:
        def squared(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            loss = sum((values**2).sum() for values in logprobs)
            assert isinstance(loss, torch.Tensor)
            return loss, {"mine": 1.0}

        losses = []
        for _ in range(3):
            result = training.forward_backward_custom([datum(TEXT), datum(TEXT[2:])], squared).result()
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            losses.append(result.metrics["loss:sum"])
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]


class TestSampling:
    def test_prompt_log_probabilities_and_top_k_reach_the_client(self, sampling: tinker.SamplingClient) -> None:
        params = types.SamplingParams(max_tokens=2, temperature=0.0)
        response = sampling.sample(PROMPT, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3).result()
        logprobs, topk = response.prompt_logprobs, response.topk_prompt_logprobs
        assert logprobs is not None
        assert topk is not None
        assert (logprobs[0], topk[0]) == (None, None)
        assert len(logprobs) == len(topk) == len(TEXT)
        for row in topk[1:]:
            assert row is not None
            assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)
        assert sampling.compute_logprobs(PROMPT).result() == logprobs

    def test_without_stops_a_sample_runs_to_its_length(self, sampling: tinker.SamplingClient) -> None:
        params = types.SamplingParams(max_tokens=7, stop=[], seed=1)
        sequence = sampling.sample(PROMPT, 1, params).result().sequences[0]
        assert (len(sequence.tokens), sequence.stop_reason) == (7, "length")

    def test_a_stop_token_is_the_last_token(self, sampling: tinker.SamplingClient) -> None:
        # given: what greedy sampling says, so that its third token can be the stop
        params = types.SamplingParams(max_tokens=6, stop=[], temperature=0.0)
        free = list(sampling.sample(PROMPT, 1, params).result().sequences[0].tokens)
        stop = free[2]
        # when
        params = types.SamplingParams(max_tokens=6, stop=[stop], temperature=0.0)
        stopped = sampling.sample(PROMPT, 1, params).result().sequences[0]
        # then
        assert list(stopped.tokens) == free[: free.index(stop) + 1]
        assert stopped.stop_reason == "stop"
        assert len(stopped.logprobs or []) == len(stopped.tokens)


class TestCheckpoints:
    def test_live_from_saving_to_deletion(self, service: Deployment, training: tinker.TrainingClient) -> None:
        # given
        step(training)
        state = training.save_state("live", user_metadata={"a": "b"}).result().path
        weights = training.save_weights_for_sampler("live").result().path
        rest = tinker.RestClient(base_url=service.url, api_key=service.api_key)
        run_id = training.get_info().model_id
        # then: they are listed
        listed = {row.tinker_path: row for row in rest.list_checkpoints(run_id).result().checkpoints}
        assert set(listed) == {state, weights}
        assert listed[state].user_metadata == {"a": "b"}
        run = rest.get_training_run(run_id).result()
        assert (run.base_model, run.lora_rank) == (MODEL, 4)
        assert run.last_checkpoint is not None
        assert run.last_checkpoint.tinker_path == state
        assert rest.get_weights_info_by_tinker_path(state).result().lora_rank == 4
        # and: shared, given an end, deleted
        rest.publish_checkpoint_from_tinker_path(weights).result()
        rest.set_checkpoint_ttl_from_tinker_path(weights, 3600).result()
        changed = {row.tinker_path: row for row in rest.list_user_checkpoints().result().checkpoints}[weights]
        assert changed.public
        assert changed.expires_at is not None
        rest.delete_checkpoint_from_tinker_path(state).result()
        assert [row.tinker_path for row in rest.list_checkpoints(run_id).result().checkpoints] == [weights]

    def test_weights_without_optimizer_are_loaded_into_a_run_that_exists(
        self, client: tinker.ServiceClient, training: tinker.TrainingClient
    ) -> None:
        # given a state, and training that went on after it
        step(training)
        path = training.save_state("before").result().path
        before = training.forward([datum(TEXT)], "cross_entropy").result().metrics["loss:sum"]
        step(training)
        # when
        training.load_state(path).result()
        # then
        assert training.forward([datum(TEXT)], "cross_entropy").result().metrics["loss:sum"] == before
        resumed = client.create_training_client_from_state(path).result()
        assert resumed.forward([datum(TEXT)], "cross_entropy").result().metrics["loss:sum"] == before

    def test_a_sampler_is_made_from_a_path(self, client: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
        step(training)
        path = training.save_weights_for_sampler("from-path").result().path
        sampling = client.create_sampling_client(model_path=path).result()
        params = types.SamplingParams(max_tokens=3, seed=1)
        assert len(sampling.sample(PROMPT, 1, params).result().sequences) == 1
        assert sampling.get_base_model() == MODEL


class TestBadInput:
    """Each error has the right category, names the field, and disturbs nothing: the run's next operation works."""

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (datum([1, VOCAB_SIZE, 2]), ["data[0].model_input", str(VOCAB_SIZE), f"0 to {VOCAB_SIZE - 1}"]),
            (datum([], target_tokens=torch.tensor([], dtype=torch.int64)), ["data[0].model_input", "empty"]),
            (datum([5] * (CONTEXT_LENGTH + 2)), [f"context limit of {CONTEXT_LENGTH}"]),
            (datum(TEXT, weights=torch.ones(len(TEXT))), ["'target_tokens' is missing"]),
            (datum(TEXT, target_tokens=torch.tensor(TEXT[:3])), ["target_tokens", "[3]", f"[{len(TEXT)}]"]),
            (
                datum(TEXT, target_tokens=torch.tensor(TEXT), weights=torch.full((len(TEXT),), math.nan)),
                ["weights", "nan", "finite"],
            ),
        ],
        ids=["token", "empty", "long", "missing", "shape", "nan"],
    )
    def test_of_training_data(self, bad: types.Datum, words: list[str], training: tinker.TrainingClient) -> None:
        with pytest.raises(tinker.RequestFailedError) as failure:
            training.forward_backward([bad], "cross_entropy").result()
        assert failure.value.category == types.RequestErrorCategory.User
        assert [word for word in words if word not in str(failure.value)] == []
        assert step(training) > 0

    def test_of_a_loss_name(self, training: tinker.TrainingClient) -> None:
        with pytest.raises(tinker.RequestFailedError, match="'nll' is not one of cispo, cross_entropy"):
            training.forward_backward([datum(TEXT)], "nll").result()  # type: ignore[arg-type]
        assert step(training) > 0

    def test_of_an_optimizer_step(self, training: tinker.TrainingClient) -> None:
        with pytest.raises(tinker.RequestFailedError, match="learning_rate"):
            training.optim_step(types.AdamParams(learning_rate=-1.0)).result()
        assert step(training) > 0

    def test_of_a_base_model(self, client: tinker.ServiceClient) -> None:
        with pytest.raises(tinker.RequestFailedError, match=f"'gpt-9' is not served here; served are: '{MODEL}'"):
            client.create_lora_training_client("gpt-9").result()

    def test_of_a_path(self, client: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
        with pytest.raises(tinker.RequestFailedError, match="no checkpoint 'tinker://nobody:train:0/weights/x'"):
            client.create_training_client_from_state("tinker://nobody:train:0/weights/x").result()
        with pytest.raises(tinker.RequestFailedError, match="tinker://nobody:train:0/weights/x"):
            training.load_state("tinker://nobody:train:0/weights/x").result()
        assert step(training) > 0

    def test_of_another_accounts_path(
        self, client: tinker.ServiceClient, service: Deployment, training: tinker.TrainingClient
    ) -> None:
        # given: another account with a run of its own
        path = training.save_state("secret").result().path
        service.command("accounts", "create", "others")
        key = str(service.command_json("keys", "create", "--account", "others")["api_key"])
        with tinker.ServiceClient(base_url=service.url, api_key=key) as other:
            # then: it reads nothing of the first one's, and hears what it would of something that does not exist
            with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
                other.create_training_client_from_state(path).result()
            theirs = other.create_lora_training_client(MODEL, rank=4).result()
            with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
                theirs.load_state(path).result()
            with pytest.raises(tinker.NotFoundError):
                other.create_sampling_client(model_path=path).result()
            assert step(theirs) > 0

    def test_of_a_sample(self, sampling: tinker.SamplingClient) -> None:
        with pytest.raises(tinker.RequestFailedError, match="temperature"):
            sampling.sample(PROMPT, 1, types.SamplingParams(max_tokens=1, temperature=-1.0)).result()
        with pytest.raises(tinker.RequestFailedError, match="context limit"):
            sampling.compute_logprobs(types.ModelInput.from_ints([5] * (CONTEXT_LENGTH + 1))).result()

    def test_of_a_key(self, service: Deployment) -> None:
        with pytest.raises(tinker.AuthenticationError, match="piecework keys create"):
            tinker.RestClient(base_url=service.url, api_key="tml-wrong").get_server_capabilities().result()


class TestCommandLine:
    def test_lists_models_runs_and_checkpoints_and_downloads(
        self, service: Deployment, training: tinker.TrainingClient, tmp_path: Path
    ) -> None:
        # given
        step(training)
        path = training.save_state("cli").result().path

        def run(*arguments: str) -> str:
            environment = os.environ | {"TINKER_BASE_URL": service.url, "TINKER_API_KEY": service.api_key}
            command = [sys.executable, "-m", "tinker.cli", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        # then
        assert MODEL in run("-f", "json", "model", "list")
        assert training.get_info().model_id in run("-f", "json", "run", "list")
        assert path in run("-f", "json", "checkpoint", "list")
        run("checkpoint", "download", path, "--output", str(tmp_path))
        downloaded = {file.name for file in tmp_path.rglob("*") if file.is_file()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= downloaded
