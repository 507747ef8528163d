"""Conversations and short prose made from word lists.

Sentences are filled in table by table; the only random choices are drawn from the generator that is handed in, so the
same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

Table = dict[str, Any]
Turn = tuple[str, str]
"""A question and its answer."""

STORIES = 260


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def animal_turns(animals: list[Table]) -> Iterator[Turn]:
    """Questions about animals: home, food, sound, legs, character."""
    for a in animals:
        name, one = a["name"], with_article(a["name"])
        yield f"Where does {one} live?", f"{_capital(one)} lives in {a['home']}."
        yield f"What does {one} eat?", f"{_capital(one)} eats {a['food']}."
        yield f"What does the {name} do?", f"The {name} {a['does']}."
        yield f"How many legs does {one} have?", f"{_capital(one)} has {a['legs']} legs."
        yield f"What is {one} like?", f"{_capital(one)} is {a['is']}."
        yield (
            f"Tell me about the {name}.",
            f"The {name} is {a['is']}. It lives in {a['home']}, eats {a['food']}, and {a['does']}.",
        )
        if a["says"] != "nothing":
            yield f"What does the {name} say?", f"The {name} says {a['says']}."
            yield f"Which animal says {a['says']}?", f"The {name} says {a['says']}."
        else:
            yield f"What does the {name} say?", f"The {name} says nothing at all."


def food_turns(foods: list[Table]) -> Iterator[Turn]:
    """Questions about food: color, taste, origin, use."""
    for f in foods:
        one = with_article(f["name"])
        yield f"What color is {one}?", f"{_capital(one)} is {f['color']}."
        yield f"How does {one} taste?", f"{_capital(one)} tastes {f['taste'].removeprefix('a little ')}."
        yield f"Where does {one} come from?", f"{_capital(one)} comes from {f['from']}."
        yield f"What can I make with {one}?", f"You can use {one} for {f['use']}."
        yield (
            f"Describe {one}.",
            f"{_capital(one)} is {f['color']}, it comes from {f['from']}, and people use it for {f['use']}.",
        )
        yield f"Is {one} {f['taste']}?", f"Yes, {one} is {f['taste']}."
        yield f"I have {one}. What should I cook?", f"With {one} you could make {f['use'].split(' and ')[0]}."


def tool_turns(tools: list[Table]) -> Iterator[Turn]:
    """Questions about things in the house: purpose, material, place."""
    for t in tools:
        name, one = t["name"], with_article(t["name"])
        yield f"What is {one} for?", f"You use {one} to {t['use']}."
        yield f"What is {one} made of?", f"{_capital(one)} is made of {t['made']}."
        yield f"Where do you keep the {name}?", f"The {name} is {t['kept']}."
        yield f"How can I {t['use']}?", f"Take {one}. That is what it is for."
        yield f"What is {one}?", f"{_capital(one)} is a thing that people use to {t['use']}."
        yield f"I cannot find the {name}.", f"Look {t['kept']}. That is where the {name} belongs."
        yield f"Do I need {one} to {t['use']}?", f"Yes, {one} is the right thing to {t['use']}."


def job_turns(jobs: list[Table]) -> Iterator[Turn]:
    """Questions about work: what somebody does, where, with what."""
    for j in jobs:
        name, one = j["name"], with_article(j["name"])
        yield f"What does {one} do?", f"{_capital(one)} {j['does']}."
        yield f"Where does {one} work?", f"{_capital(one)} works {j['where']}."
        yield f"What does {one} need?", f"{_capital(one)} needs {j['needs']}."
        yield f"What is a good {name} good at?", f"A good {name} is good at {j['good']}."
        yield f"Who {j['does']}?", f"The {name} {j['does']}."
        yield f"I want to become {one}.", f"Then get {j['needs']}, and practice {j['good']}."
        yield (
            f"Describe the work of {one}.",
            f"{_capital(one)} {j['does']}. The work is done {j['where']}, and it takes {j['needs']}.",
        )


def word_turns(opposites: list[list[str]], sequences: list[list[str]]) -> Iterator[Turn]:
    """Questions about words: opposites, what comes before and after."""
    for one, other in opposites:
        yield f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
        yield f"Name the opposite of {other}.", f"The opposite of {other} is {one}."
        yield f"Use the word {one} in a sentence.", f"One day is {one}, and the next day is {other}."
        yield f"Is {one} the same as {other}?", f"No, {one} is the opposite of {other}."
    for words in sequences:
        for before, after in pairwise(words):
            yield f"What comes after {before}?", f"After {before} comes {after}."
            yield f"What comes before {after}?", f"Before {after} comes {before}."


def stories(tables: Table, rng: random.Random) -> Iterator[str]:
    """Short stories of three or four sentences, each with a person, a place, a thing and a feeling."""
    for _ in range(STORIES):
        person, friend = rng.sample(tables["people"], 2)
        place, other_place = rng.sample(tables["places"], 2)
        thing = rng.choice(tables["things"])
        weather, ending = rng.choice(tables["weather"]), rng.choice(tables["endings"])
        feeling = rng.choice(tables["feelings"])
        opening = rng.choice(
            (
                f"One morning {person} walked to {place}.",
                f"{person} was on the way to {place} when {weather}.",
                f"It was evening, and {weather}. {person} came back from {place}.",
                f"{person} and {friend} met at {place}.",
            )
        )
        middle = rng.choice(
            (
                f"There {person} found {thing}.",
                f"On the way {person} bought {thing} for {friend}.",
                f"Near {other_place} somebody had left {thing}.",
                f"{friend} had forgotten {thing} at {other_place}.",
            )
        )
        close = rng.choice(
            (
                f"{person} was {feeling}, took it along {ending}",
                f"{person} picked it up {ending}",
                f'"This belongs to {friend}," said {person} {ending}',
                f"{friend} looked at {person} {ending}",
            )
        )
        yield f"{opening} {middle} {close}"


def story_turns(tables: Table, texts: list[str], rng: random.Random) -> Iterator[Turn]:
    """Every second story as the answer to a request for one."""
    for text in texts[::2]:
        yield (
            rng.choice(
                (
                    "Tell me a short story.",
                    "Can you tell me a story?",
                    "Please tell me something.",
                    f"Tell me what happened at {rng.choice(tables['places'])}.",
                )
            ),
            text,
        )
