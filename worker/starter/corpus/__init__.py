"""The training text of the starter model: conversations and short prose in plain English.

Hand-written parts lie beside this file (`conversations.txt`, `prose.txt`), the rest is filled in from word lists
(`tables.json`, `templates.py`). The same bytes everywhere: one fixed seed, and no order that depends on hashing.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from worker.starter.corpus import templates

FOLDER = Path(__file__).parent
SEED = 0

Message = dict[str, str]
"""`{"role": …, "content": …}`, as chat templates take it."""

_ROLES = {"S": "system", "U": "user", "A": "assistant"}


@dataclass(frozen=True)
class Corpus:
    """Everything that the starter model reads, apart from the additions."""

    conversations: list[list[Message]]
    prose: list[str]

    def texts(self) -> list[str]:
        """Every piece of text by itself, in order: what a tokenizer is trained on."""
        return [message["content"] for turns in self.conversations for message in turns] + self.prose

    def sha256(self) -> str:
        """Digest of the whole corpus; differs as soon as one character does."""
        blob = json.dumps([self.conversations, self.prose], ensure_ascii=True)
        return hashlib.sha256(blob.encode()).hexdigest()


def _read_paragraphs(name: str) -> list[str]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def parse_conversation(paragraph: str) -> list[Message]:
    """Turn lines that begin with `S:`, `U:` or `A:` into messages; other lines continue the message above."""
    messages: list[Message] = []
    for line in paragraph.splitlines():
        mark, _, rest = line.partition(": ")
        if mark in _ROLES:
            messages.append({"role": _ROLES[mark], "content": rest})
        else:
            messages[-1]["content"] += "\n" + line
    return messages


def _conversation(turn: templates.Turn) -> list[Message]:
    question, answer = turn
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def load_corpus() -> Corpus:
    """Read the hand-written parts and fill in the templates.

    Returns:
        The corpus, the same on every machine.
    """
    rng = random.Random(SEED)  # noqa: S311
    tables = json.loads((FOLDER / "tables.json").read_text(encoding="utf-8"))
    stories = list(templates.stories(tables, rng))
    turns = [
        *templates.animal_turns(tables["animals"]),
        *templates.food_turns(tables["foods"]),
        *templates.tool_turns(tables["tools"]),
        *templates.job_turns(tables["jobs"]),
        *templates.word_turns(tables["opposites"], tables["sequences"]),
        *templates.story_turns(tables, stories, rng),
    ]
    written = [parse_conversation(paragraph) for paragraph in _read_paragraphs("conversations.txt")]
    return Corpus(
        conversations=written + [_conversation(turn) for turn in turns],
        prose=_read_paragraphs("prose.txt") + stories[1::2],
    )
