"""The tokenizer of the starter model: byte-level BPE, every digit a token of its own, ChatML.

Digits alone keep addition learnable by a small model: a sum is a short rule over ten symbols and not a table of
numbers. Text is cut before merging by the same rule as Qwen's tokenizers, so libraries that load the directory as one
of those produce the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens that stay visible in decoded text, as chat templates and parsers of replies expect."""

_ALWAYS_MERGED = ("system", "user", "assistant", "What is + ?", "\n\n")
"""Pieces of every conversation and addition, each to be one token."""

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
CONTEXT_TOKENS_MAX = 4096
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.txt")

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CONFIG_FILE = "tokenizer_config.json"


def train_tokenizer(texts: Sequence[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn merges from texts.

    Args:
        texts: what the model will read, without chat markup.
        vocabulary: number of tokens in all; at least 256 bytes and the special tokens.

    Returns:
        A fast tokenizer with the chat template; `<|im_end|>` ends a turn, `<|endoftext|>` pads.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(MARKUP_TOKENS),
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *_ALWAYS_MERGED * 100], trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[MESSAGE_START],
        model_max_length=CONTEXT_TOKENS_MAX,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer with its chat template inside the configuration.

    The class is named as every version of transformers knows it, so that older clients load the directory too.

    Args:
        tokenizer: what `train_tokenizer` returned.
        directory: where the files go; it exists.
    """
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    path = directory / _CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
