"""Identifiers have the forms that the SDK computes by itself, and secrets cannot be guessed."""

import pytest

from storage import ids
from storage.ids import CheckpointPath


def test_ids_of_a_session_have_the_forms_that_the_sdk_computes() -> None:
    assert ids.run_id("s", 3) == "s:train:3"
    assert ids.sampling_session_id("s", 2) == "s:sample:2"
    assert ids.training_request_id("s:train:3", 7) == "s:train:3:7"
    assert ids.sample_request_id("s:sample:2", 7) == "s:sample:2:7"
    assert ids.sequence_id("s:sample:2:7", 1) == "s:sample:2:7:1"


def test_secrets_are_long_and_never_the_same() -> None:
    # When
    secrets = {ids.new_api_key() for _ in range(50)}
    # Then
    assert len(secrets) == 50
    assert all(secret.startswith("tml-") and len(secret) >= 4 + 43 for secret in secrets)
    assert len({ids.new_session_id() for _ in range(50)} | {ids.new_token() for _ in range(50)}) == 100


@pytest.mark.parametrize("kind", CheckpointPath.KINDS)
def test_a_checkpoint_path_is_read_as_it_is_written(kind: str) -> None:
    # Given
    path = CheckpointPath("s:train:0", kind, "step-1")
    # Then
    assert CheckpointPath.parse(str(path)) == path
    assert path.checkpoint_id == f"{kind}/step-1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tinker://",
        "tinker://run/weights",
        "tinker://run/weights/",
        "tinker://run//name",
        "tinker:///weights/name",
        "tinker://run/weights/name/more",
        "tinker://run/other_weights/name",
        "http://run/weights/name",
        "run/weights/name",
    ],
)
def test_what_is_no_checkpoint_path_is_told_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="the form is tinker://RUN/"):
        CheckpointPath.parse(text)
