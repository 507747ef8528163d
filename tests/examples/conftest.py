"""The scripts of `examples/` as modules, and a tokenizer of one token per character."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
END = "\x03"


class CharacterTokenizer:
    """A token per character; a turn is `role:content`, an end character and a newline; `<>` is a closed think block."""

    eos_token_id = ord(END)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> str:
        assert not tokenize
        turns = "".join(f"{m['role']}:{m['content']}{END}\n" for m in messages[:-1])
        if messages:  # the turn that is being produced opens with the block, as in templates of models that think
            last = messages[-1]
            block = "<>" if last["role"] == "assistant" else ""
            turns += f"{last['role']}:{block}{last['content']}{END}\n"
        thought = "" if enable_thinking else "<>"
        return turns + (f"assistant:{thought}" if add_generation_prompt else "")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in tokens if token != self.eos_token_id)


@pytest.fixture
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("supervised", monkeypatch)


@pytest.fixture
def reinforcement(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("reinforcement", monkeypatch)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("service", monkeypatch)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("demo", monkeypatch)
