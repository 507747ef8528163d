"""How well the model adds: by sampling as the arithmetic recipe does, and by probability as a cheap estimate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from worker.starter import arithmetic
from worker.starter.lessons import NOT_LEARNED, Lessons, to_batch
from worker.starter.tokenizer import MESSAGE_END

# B rows, T tokens of a row, V vocabulary.


@torch.no_grad()
def answer_probability(model: Qwen3ForCausalLM, lessons: Lessons, pairs: Sequence[arithmetic.Pair]) -> float:
    """Mean probability of the exact reply to the recipe's prompt: what sampling at temperature 1 would find.

    A reply that carries the right number inside other words counts in sampling and not here, so this is slightly low.
    """
    batch = to_batch([lessons.addition(pair) for pair in pairs], lessons.pad)
    logprobs_BTV = model(batch.tokens_BT).logits.float().log_softmax(-1)
    learned_BT = batch.targets_BT != NOT_LEARNED
    targets_BT = batch.targets_BT.where(learned_BT, 0)
    logprobs_BT = logprobs_BTV.gather(-1, targets_BT[..., None])[..., 0] * learned_BT
    return float(logprobs_BT.sum(-1).exp().mean())


@torch.no_grad()
def share_right(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Lessons,
    pairs: Sequence[arithmetic.Pair],
    *,
    seed: int,
) -> float:
    """Share of pairs whose sampled reply is graded right.

    Args:
        model: the model, in float32 on the CPU.
        tokenizer: its tokenizer.
        lessons: renders the prompts.
        pairs: one reply is drawn for each, at temperature 1 and without truncation.
        seed: of the draws.

    Returns:
        Between 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[tuple[arithmetic.Pair, list[int]]]] = defaultdict(list)
    for pair in pairs:
        prompt = lessons.prompt(arithmetic.messages(pair))
        by_length[len(prompt)].append((pair, prompt))
    num_right = 0
    for group in by_length.values():
        replies_BT = _sample(model, torch.tensor([prompt for _, prompt in group]), generator)
        for (pair, _), reply in zip(group, replies_BT.tolist(), strict=True):
            text = tokenizer.decode(reply).partition(MESSAGE_END)[0]
            num_right += arithmetic.is_right(text, pair)
    return num_right / len(pairs)


def _sample(model: Qwen3ForCausalLM, prompts_BT: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a few tokens after prompts of equal length; what follows the end of the turn is ignored by the caller."""
    tokens_BT, cache, drawn = prompts_BT, None, []
    for _ in range(arithmetic.ANSWER_TOKENS_MAX):
        out = model(tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        tokens_BT = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        drawn.append(tokens_BT)
    return torch.cat(drawn, dim=1)
