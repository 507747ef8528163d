"""Keys: fresh, ordered, plain, and read back as they were built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import keys
from storage.errors import InvalidObjectKeyError
from storage.keys import KeyKind

_RUN = "0f8fad5b-d9cb-469f-a165-70867728950e:train:0"
_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=18)
_seqs = st.integers(0, 10**keys.SEQ_DIGITS - 1)


def test_two_keys_for_the_same_thing_differ() -> None:
    assert keys.snapshot_key(_RUN, 7) != keys.snapshot_key(_RUN, 7)


def test_the_forms_of_keys_stay_as_they_are() -> None:
    # Given one set of files
    token = "0123456789abcdef"
    # Then
    assert keys.checkpoint_key(_RUN, "weights", "step 1", "adapter_model.safetensors", token=token) == (
        "checkpoints/0f8fad5b-d9cb-469f-a165-70867728950e=3Atrain=3A0/weights/step=201/0123456789abcdef"
        "/adapter_model.safetensors"
    )
    assert keys.base_model_key("Qwen/Qwen3-0.6B", "config.json", token=token) == (
        "base_models/Qwen=2FQwen3-0.6B/0123456789abcdef/config.json"
    )
    assert keys.export_key("a", "b.tar", token=token) == "exports/a/0123456789abcdef/b.tar"
    assert keys.snapshot_key("r", 7).startswith("snapshots/r/0000000000000000007-")
    assert keys.payload_key("r", 7).startswith("payloads/r/0000000000000000007-")
    assert keys.result_key("r:7").startswith("results/")


@given(st.lists(_seqs, min_size=2, unique=True))
def test_keys_sort_as_their_seqs_do(seqs: list[int]) -> None:
    built = [keys.snapshot_key(_RUN, seq) for seq in sorted(seqs)]
    assert built == sorted(built)


@given(owner=_names, seq=_seqs)
def test_payload_and_snapshot_keys_are_read_back(owner: str, seq: int) -> None:
    payload, snapshot = keys.parse(keys.payload_key(owner, seq)), keys.parse(keys.snapshot_key(owner, seq))
    assert (payload.kind, payload.owner, payload.seq) == (KeyKind.PAYLOAD, owner, seq)
    assert (snapshot.kind, snapshot.owner, snapshot.seq) == (KeyKind.SNAPSHOT, owner, seq)


@given(_names)
def test_result_keys_are_read_back(request: str) -> None:
    parsed = keys.parse(keys.result_key(request))
    assert (parsed.kind, parsed.owner) == (KeyKind.RESULT, request)


@given(run=_names, kind=_names, name=_names, filename=_names)
def test_checkpoint_keys_are_read_back(run: str, kind: str, name: str, filename: str) -> None:
    token = keys.new_token()
    parsed = keys.parse(keys.checkpoint_key(run, kind, name, filename, token=token))
    assert (parsed.kind, parsed.owner, parsed.token) == (KeyKind.CHECKPOINT, run, token)
    assert (parsed.checkpoint_kind, parsed.name, parsed.filename) == (kind, name, filename)


@given(owner=_names, filename=_names)
def test_base_model_and_export_keys_are_read_back(owner: str, filename: str) -> None:
    model, export = keys.parse(keys.base_model_key(owner, filename)), keys.parse(keys.export_key(owner, filename))
    assert (model.kind, model.owner, model.filename) == (KeyKind.BASE_MODEL, owner, filename)
    assert (export.kind, export.owner, export.filename) == (KeyKind.EXPORT, owner, filename)


@given(first=_names, second=_names)
def test_different_names_never_share_a_prefix_directory(first: str, second: str) -> None:
    shared = keys.prefix(KeyKind.BASE_MODEL, first) == keys.prefix(KeyKind.BASE_MODEL, second)
    assert shared == (first == second)


@given(_names)
def test_an_owners_keys_begin_with_its_prefix(owner: str) -> None:
    assert keys.snapshot_key(owner, 1).startswith(keys.prefix(KeyKind.SNAPSHOT, owner))
    assert keys.snapshot_key(owner, 1).startswith(keys.prefix(KeyKind.SNAPSHOT))
    assert keys.base_model_key(owner, "f").startswith(keys.prefix(KeyKind.BASE_MODEL, owner))


def test_results_have_no_prefix_by_owner() -> None:
    with pytest.raises(ValueError, match="journal"):
        keys.prefix(KeyKind.RESULT, "r:1")


@pytest.mark.parametrize("seq", [-1, 10**keys.SEQ_DIGITS])
def test_a_seq_that_does_not_fit_is_refused(seq: int) -> None:
    with pytest.raises(InvalidObjectKeyError, match="19 digits"):
        keys.snapshot_key(_RUN, seq)


def test_a_name_that_is_too_long_is_refused_with_what_to_change() -> None:
    with pytest.raises(InvalidObjectKeyError, match="shorten the name"):
        keys.checkpoint_key(_RUN, "weights", "n" * 241, "f")
    with pytest.raises(InvalidObjectKeyError, match="not an object key"):
        keys.base_model_key("", "f")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "snapshots",
        "snapshots/r/7-0123456789abcdef.safetensors",
        "snapshots/r/0000000000000000007.safetensors",
        "snapshots/r/x/0000000000000000007-0123456789abcdef.safetensors",
        "unknown/r/0000000000000000007-0123456789abcdef.bin",
        "base_models/a/nothex/f",
        "base_models/a=3/0123456789abcdef/f",
        "base_models/a=3a/0123456789abcdef/f",
        "base_models/a=41/0123456789abcdef/f",
        "base_models/a=FF/0123456789abcdef/f",
        "exports/../0123456789abcdef/f",
    ],
)
def test_what_no_function_here_builds_is_not_read(key: str) -> None:
    with pytest.raises(InvalidObjectKeyError):
        keys.parse(key)
