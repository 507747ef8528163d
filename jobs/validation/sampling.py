"""Prompts and sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jobs.operations import Array, Sample, SamplingParams
from jobs.validation.errors import InvalidOperationError
from jobs.validation.models import ModelFacts
from jobs.validation.numbers import check_integer, check_tokens

SAMPLES_MAX = 1024
TOPK_MAX = 20
STOPS_MAX = 64
STOP_TEXT_MAX = 256
TARGETS_MAX = 1024
TEMPERATURE_MIN = 1e-5
"""Below this (but not at 0, which is greedy) dividing the logits overflows."""


def check_sample(body: Sample, model: ModelFacts) -> None:
    """Refuse a sample that cannot be drawn from `model`."""
    _check_prompt(body.prompt, model)
    check_num_samples(body.num_samples)
    _check_params(body.params, model)
    if body.prompt_logprobs_last_n is not None:
        if not body.prompt_logprobs:
            raise InvalidOperationError("prompt_logprobs_last_n: needs prompt_logprobs=true")
        if len(body.prompt) < 2:
            raise InvalidOperationError("prompt_logprobs_last_n: needs a prompt of at least 2 tokens")
        check_integer(body.prompt_logprobs_last_n, "prompt_logprobs_last_n", 1, len(body.prompt) - 1)
    topk_max = min(TOPK_MAX, model.vocab_size)
    check_integer(body.topk_prompt_logprobs, "topk_prompt_logprobs", 0, topk_max)
    check_integer(body.topk_sample_logprobs, "topk_sample_logprobs", 0, topk_max)
    if body.target_prompt_logprobs is not None:
        _check_targets(body.target_prompt_logprobs, len(body.prompt), model)


def check_num_samples(num_samples: int) -> None:
    """Refuse to draw none, or more than one request may draw."""
    check_integer(num_samples, "num_samples", 1, SAMPLES_MAX)


def _check_prompt(prompt: Array, model: ModelFacts) -> None:
    if len(prompt) == 0:
        raise InvalidOperationError("prompt: is empty; send at least one token")
    if len(prompt) > model.context_length:
        raise InvalidOperationError(
            f"prompt: {len(prompt)} tokens are over the context limit of {model.context_length} of {model.name}"
        )
    check_tokens(prompt, "prompt", model.vocab_size)


def _check_params(params: SamplingParams, model: ModelFacts) -> None:
    field = "sampling_params"
    if params.max_tokens is not None:
        check_integer(params.max_tokens, f"{field}.max_tokens", 1)
    temperature = params.temperature
    if temperature != 0 and not (math.isfinite(temperature) and temperature >= TEMPERATURE_MIN):
        raise InvalidOperationError(
            f"{field}.temperature: {temperature} is not allowed; it must be 0 (greedy) or a finite number from"
            f" {TEMPERATURE_MIN} on"
        )
    if params.top_k != -1:
        check_integer(params.top_k, f"{field}.top_k (-1 is off)", 1)
    if not 0 < params.top_p <= 1:
        raise InvalidOperationError(f"{field}.top_p: {params.top_p} is not allowed; it must be above 0 and at most 1")
    _check_stop(params.stop or (), model, f"{field}.stop")


def _check_stop(stop: Sequence[str | int], model: ModelFacts, field: str) -> None:
    check_integer(len(stop), f"{field}: number of entries", 0, STOPS_MAX)
    for index, item in enumerate(stop):
        if isinstance(item, str):
            check_integer(len(item), f"{field}[{index}]: number of characters", 1, STOP_TEXT_MAX)
        elif not 0 <= item < model.vocab_size:
            raise InvalidOperationError(
                f"{field}[{index}]: token id {item} is outside the vocabulary; ids are 0 to {model.vocab_size - 1}"
            )


def _check_targets(targets: Array, prompt_length: int, model: ModelFacts) -> None:
    field = "target_prompt_logprobs"
    if targets.dtype.kind != "i" or targets.ndim != 2 or targets.shape[0] != prompt_length - 1:
        raise InvalidOperationError(
            f"{field}: {targets.dtype} {list(targets.shape)} is not allowed; it must be int64 [{prompt_length - 1}, K],"
            " one row per prompt position after the first"
        )
    check_integer(targets.shape[1], f"{field}: number of columns", 1, TARGETS_MAX)
    check_tokens(targets, field, model.vocab_size, none=-1)
