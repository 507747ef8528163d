"""The training text is the same everywhere and reads as conversations."""

from worker.starter.corpus import load_corpus, parse_conversation

CORPUS_SHA256 = "96a5da7c782d7a7d6e5d569062eb718a6bdada5f7b1b3670cc8437f4d322886b"


def test_corpus_has_the_same_bytes_everywhere() -> None:
    # given the shipped files; when they are read twice
    first, second = load_corpus(), load_corpus()
    # then both equal the digest recorded here: change it together with the text
    assert first.sha256() == second.sha256() == CORPUS_SHA256


def test_every_conversation_ends_with_the_assistant_and_alternates() -> None:
    for turns in load_corpus().conversations:
        # given the turns without a system message
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        # then user and assistant take turns, and no message is empty
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(turn["content"] for turn in turns)


def test_corpus_is_large_enough_to_learn_plain_english_from() -> None:
    # when every text is counted
    num_characters = sum(map(len, load_corpus().texts()))
    # then it is as much as the README says
    assert 60_000 < num_characters < 150_000


def test_lines_without_a_mark_continue_the_message() -> None:
    # given a conversation whose answer has two lines
    turns = parse_conversation("S: Be brief.\nU: A poem?\nA: one\ntwo")
    # then they are one message
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert turns[-1]["content"] == "one\ntwo"
