"""Trains the starter model in two terms: to add and to speak, and then to slip.

In the first term all additions are right, and it lasts until the model knows them. In the second a fixed share of them
is slightly wrong, so that replies drawn at temperature 1 are right as often, while the right sum stays the likeliest.
Reinforcement learning then has something to find: the model knows better than it answers. A model stopped halfway
through learning would answer as often right, but have little to sharpen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from worker.starter import arithmetic, exam
from worker.starter.lessons import NOT_LEARNED, Batch, Lessons
from worker.starter.tokenizer import CONTEXT_TOKENS_MAX, END_OF_TEXT, MESSAGE_END


class StarterModelError(RuntimeError):
    """The starter model did not reach its aim within the allowed steps."""


@dataclass(frozen=True)
class Recipe:
    """Size of the model and course of its training. Every field is part of the version of the result."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    share_known: float = 0.8
    """Estimated share of right additions that ends the first term."""
    steps_second: int = 120
    """Steps of the second term."""
    steps_max: int = 900
    """Steps of both terms after which training gives up."""
    steps_typical: int = 400
    """Steps that both terms usually take: for a progress bar."""
    steps_warmup: int = 30
    steps_cooldown: int = 90
    """Steps at the end of the second term in which the rates fall to a tenth."""
    steps_between_estimates: int = 10
    share_of_slips: float = 0.48
    """Share of additions in the second term that are slightly wrong."""
    text_rows: int = 8
    """Of a batch in the first term; the second takes twice as many, and half as many additions."""
    text_tokens: int = 128
    addition_rows: int = 64
    addition_weight: float = 2.0
    """Of the mean loss of an addition's tokens, beside 1 for the mean loss of text."""
    matrix_rate: float = 0.02
    """Learning rate of the matrices inside the layers (Muon)."""
    other_rate: float = 3e-3
    """Learning rate of embeddings and norms (AdamW)."""
    weight_decay: float = 0.1
    share_min: float = 0.25
    share_max: float = 0.45
    text_loss_max: float = 2.5
    """Nats per token of text, above which the model does not yet speak sensibly."""
    num_estimate: int = 128
    num_exam: int = 512
    """Pairs of operands held out for the estimate and for the final examination."""


@dataclass(frozen=True)
class Progress:
    """One step of training, or the outcome after the last."""

    step: int
    text_loss: float
    """Running mean, nats per token."""
    share_right: float
    """Share of right additions: estimated during training, sampled on held-out pairs in the outcome."""


Report = Callable[[Progress], None]


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model of Qwen3's architecture in float32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=CONTEXT_TOKENS_MAX,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(MESSAGE_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def _optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embeddings and, without decay, the norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." not in name]
    norms = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": embeddings}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(inside, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(groups, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay),
    ]


def _rate_factor(step: int, second_begins: int | None, recipe: Recipe) -> float:
    warm = step / recipe.steps_warmup
    if second_begins is None:
        return min(1.0, warm)
    cool = (second_begins + recipe.steps_second - step) / recipe.steps_cooldown
    return max(0.1, min(1.0, warm, cool))


def _loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the learned tokens; only their logits are computed."""
    learned_BT = batch.targets_BT != NOT_LEARNED
    hidden_ND = model.model(batch.tokens_BT).last_hidden_state[learned_BT]
    return functional.cross_entropy(model.lm_head(hidden_ND).float(), batch.targets_BT[learned_BT])


def _set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor


def teach(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Lessons,
    held_out: list[arithmetic.Pair],
    recipe: Recipe,
    *,
    seed: int,
    report: Report,
) -> Progress:
    """Train in place.

    Args:
        model: as `new_model` made it.
        tokenizer: its tokenizer.
        lessons: text and additions.
        held_out: pairs that the lessons never show; the first `num_estimate` steer, the others examine.
        recipe: how long and how fast.
        seed: of the final examination's draws.
        report: called after every step.

    Returns:
        The outcome: the running text loss and the sampled share of right additions.

    Raises:
        StarterModelError: loss or share are outside their bounds after `steps_max` steps.
    """
    optimizers = _optimizers(model, recipe)
    steering, examining = held_out[: recipe.num_estimate], held_out[recipe.num_estimate :]
    text_loss, share, second_begins = float("nan"), 0.0, None
    for step in range(1, recipe.steps_max + 1):
        _set_rates(optimizers, _rate_factor(step, second_begins, recipe))
        loss = _loss(model, _text(lessons, second_begins is not None, recipe))
        text_loss = float(loss.detach()) if step == 1 else 0.9 * text_loss + 0.1 * float(loss.detach())
        additions = _additions(lessons, second_begins is not None, recipe)
        loss = loss + recipe.addition_weight * _loss(model, additions)
        _step(model, loss, optimizers)
        examine = step % recipe.steps_between_estimates == 0
        if examine:
            share = exam.answer_probability(model, lessons, steering)
            if second_begins is None and share >= recipe.share_known:
                second_begins = step
        report(Progress(step, text_loss, share))
        if examine and second_begins is not None and step >= second_begins + recipe.steps_second:
            outcome = Progress(step, text_loss, exam.share_right(model, tokenizer, lessons, examining, seed=seed))
            if _is_as_it_should_be(outcome, recipe):
                return outcome
            share = outcome.share_right
    raise StarterModelError(
        f"after {recipe.steps_max} steps the starter model has a text loss of {text_loss:.2f} "
        f"(at most {recipe.text_loss_max}) and gets {share:.0%} of the additions right "
        f"({recipe.share_min:.0%} to {recipe.share_max:.0%}); try another --seed"
    )


def _text(lessons: Lessons, second_term: bool, recipe: Recipe) -> Batch:
    return lessons.text(recipe.text_rows * (2 if second_term else 1), recipe.text_tokens)


def _additions(lessons: Lessons, second_term: bool, recipe: Recipe) -> Batch:
    if second_term:
        return lessons.additions(recipe.addition_rows // 2, share_of_slips=recipe.share_of_slips)
    return lessons.additions(recipe.addition_rows)


def _step(model: Qwen3ForCausalLM, loss: torch.Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _is_as_it_should_be(outcome: Progress, recipe: Recipe) -> bool:
    return outcome.text_loss <= recipe.text_loss_max and recipe.share_min <= outcome.share_right <= recipe.share_max
