"""Kinds of identifier: how each is made, and how it is read.

What a client may guess from an identifier is nothing but the counters it sent itself: the random part comes first.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass

KEY_PREFIX = "tml-"


def new_session_id() -> str:
    """A session; the SDK derives run ids from it."""
    return str(uuid.uuid4())


def run_id(session_id: str, model_seq_id: int) -> str:
    """A training run. The SDK computes the same text by itself, so the form is fixed."""
    return f"{session_id}:train:{model_seq_id}"


def sampling_session_id(session_id: str, sampling_session_seq_id: int) -> str:
    """A sampling session of a session."""
    return f"{session_id}:sample:{sampling_session_seq_id}"


def training_request_id(run: str, seq: int) -> str:
    """An operation of a training run: the same `seq` always has the same request id."""
    return f"{run}:{seq}"


def sample_request_id(sampling_session: str, seq: int) -> str:
    """A sample: the same `seq` always has the same request id."""
    return f"{sampling_session}:{seq}"


def sequence_id(request_id: str, index: int) -> str:
    """One of the sequences that a sample draws."""
    return f"{request_id}:{index}"


def new_api_key() -> str:
    """A credential with 256 random bits. It is shown once and stored only as a hash."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def new_token() -> str:
    """96 random bits, for names that must not collide."""
    return secrets.token_hex(12)


@dataclass(frozen=True)
class CheckpointPath:
    """`tinker://{run}/{kind}/{name}`; kind is `weights`, `sampler_weights` or `external_weights`."""

    run: str
    kind: str
    name: str

    KINDS = ("weights", "sampler_weights", "external_weights")

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """`{kind}/{name}`, unique within a run."""
        return f"{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> CheckpointPath:
        """Read a path.

        Raises:
            ValueError: not such a path; the message shows the form.
        """
        scheme, _, rest = text.partition("://")
        parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 3 or not all(parts) or parts[1] not in cls.KINDS:
            kinds = "|".join(cls.KINDS)
            raise ValueError(f"{text!r} is not a checkpoint path; the form is tinker://RUN/{kinds}/NAME")
        return cls(*parts)
