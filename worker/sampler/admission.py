"""Which requests can be served at all; the others fail alone, before they cost anything."""

from __future__ import annotations

import numpy as np

from jobs.operations import Failure, Sample


def num_new_max(body: Sample, *, context_length: int, cache_tokens: int) -> int:
    """Tokens after which a sequence ends.

    Without `max_tokens` that is as long as the context and the cache allow. The last token drawn is never fed to the
    model, so a prompt that fills the context still has one.
    """
    asked = body.params.max_tokens
    in_context = max(1, context_length - len(body.prompt))
    if asked is None:
        return max(1, min(in_context, cache_tokens - len(body.prompt) + 1))
    return min(asked, in_context)


def find_refusal(
    body: Sample, *, vocab_size: int, context_length: int, cache_tokens: int, has_tokenizer: bool
) -> Failure | None:
    """Why a request cannot be served, or None.

    Args:
        body: as it came.
        vocab_size, context_length: of the base model.
        cache_tokens: what the key-value cache holds as a whole.
        has_tokenizer: whether text can be decoded.
    """
    num_prompt = len(body.prompt)
    num_new = num_new_max(body, context_length=context_length, cache_tokens=cache_tokens)
    if num_prompt == 0:
        return Failure(
            "prompt: is empty; sampling needs at least one token, the beginning-of-sequence token if nothing else"
        )
    if body.num_samples < 1 or num_new < 1:
        return Failure("num_samples and max_tokens: must be at least 1")
    if num_prompt > context_length:
        return Failure(
            f"prompt: has {num_prompt} tokens, the model's context holds {context_length}; shorten the prompt"
        )
    if num_prompt + num_new - 1 > cache_tokens:
        return Failure(
            f"max_tokens: {num_prompt} prompt tokens and {num_new} sampled ones do not fit into the key-value cache of "
            f"{cache_tokens} tokens; ask for fewer, or have PIECEWORK_KV_TOKENS_MAX raised on the worker",
        )
    wrong = _find_wrong_token(body, vocab_size)
    if wrong:
        return Failure(wrong)
    if not has_tokenizer and any(isinstance(item, str) for item in body.params.stop or ()):
        return Failure("stop: this base model was added without a tokenizer; give stop token ids instead of strings")
    return None


def _find_wrong_token(body: Sample, vocab_size: int) -> str | None:
    targets = body.target_prompt_logprobs
    if int(np.min(body.prompt)) < 0 or int(np.max(body.prompt)) >= vocab_size:
        return f"prompt: holds a token id outside the vocabulary; allowed are 0 to {vocab_size - 1}"
    if targets is not None and targets.size and not -1 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        return f"target_prompt_logprobs: holds a token id outside the vocabulary; allowed are -1 to {vocab_size - 1}"
    if targets is not None and (targets.ndim != 2 or len(targets) != len(body.prompt) - 1):
        return f"target_prompt_logprobs: must have a row for each prompt token but the first, {len(body.prompt) - 1}"
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(body, name) <= vocab_size:
            return f"{name}: must be between 0 and the size of the vocabulary, {vocab_size}"
    return None
