"""Training examples as they lie in files, and how many tokens of a base model each one is.

An example is an object with one of `tokens` (ids), `text`, `prompt` and `completion`, or `messages` (rendered with the
model's chat template). It trains one token less than it has: the last one is only a target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from storage.base_models import BaseModel
from storage.objects import ObjectStore

TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
KINDS = "`tokens`, `text`, `prompt` and `completion`, or `messages`"


class ExampleError(ValueError):
    """An example cannot be read; the message says which and what to change."""


class TokenCounter:
    """Counts as the base model's own tokenizer does."""

    def __init__(self, objects: ObjectStore, model: BaseModel) -> None:
        self._objects = objects
        self._model = model
        self._tokenizer: Tokenizer | None = None
        self._template: jinja2.Template | None = None
        self._special: Mapping[str, str] = {}

    def count(self, example: Any, place: str) -> int:
        """Trained tokens of an example.

        Args:
            place: of it, for messages, e.g. `line 7`.

        Raises:
            ExampleError: it is none, or longer than the model's context.
        """
        length = self._length(example, place)
        if length < 2:
            raise ExampleError(f"{place}: an example needs at least two tokens; leave it out")
        if length - 1 > self._model.context_length:
            raise ExampleError(
                f"{place}: {length - 1} tokens are more than the {self._model.context_length} of "
                f"{self._model.name}'s context; shorten it"
            )
        return length - 1

    def _length(self, example: Any, place: str) -> int:
        match example:
            case {"tokens": list(tokens)} if all(type(token) is int for token in tokens):
                return len(tokens)
            case {"text": str(text)}:
                return self._encoded(text, place)
            case {"prompt": str(prompt), "completion": str(completion)}:
                return self._encoded(prompt, place) + self._encoded(completion, place, special=False)
            case {"messages": list(messages)} if all(isinstance(message, dict) for message in messages):
                return self._encoded(self._rendered(messages, place), place, special=False)
        raise ExampleError(f"{place}: an example is an object with {KINDS}")

    def _encoded(self, text: str, place: str, *, special: bool = True) -> int:
        if self._tokenizer is None:
            data = self._file(TOKENIZER)
            if data is None:
                raise ExampleError(f"{place}: {self._model.name} has no {TOKENIZER} to count with; give `tokens`")
            self._tokenizer = Tokenizer.from_str(data.decode())
            self._tokenizer.no_truncation()
        return len(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _rendered(self, messages: list[Any], place: str) -> str:
        if self._template is None:
            self._template = self._read_template(place)
        try:
            return self._template.render(messages=messages, add_generation_prompt=False, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ExampleError(
                f"{place}: the chat template of {self._model.name} refuses these messages: {error}"
            ) from error

    def _read_template(self, place: str) -> jinja2.Template:
        config = json.loads(self._file(TOKENIZER_CONFIG) or b"{}")
        source = self._file(CHAT_TEMPLATE)
        text = config.get("chat_template") if source is None else source.decode()
        if not isinstance(text, str):
            raise ExampleError(f"{place}: {self._model.name} has no chat template; give `text` or `tokens`")
        self._special = {
            name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        # as transformers renders them: https://huggingface.co/docs/transformers/chat_templating_writing
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ExampleError(f"{place}: the chat template of {self._model.name} is none: {error}") from error

    def _file(self, name: str) -> bytes | None:
        stored = self._model.files.get(name)
        return None if stored is None else self._objects.get(stored.key)


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Examples of a JSON Lines file with their places; blank lines are passed over.

    Raises:
        ExampleError: a line is no JSON.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError as error:
            raise ExampleError(f"line {number}: not JSON: {error}") from error


def _content(token: Any) -> str:
    """A special token's text; configs hold it plain or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
