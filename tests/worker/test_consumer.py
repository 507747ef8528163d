"""How a worker comes back to its broker."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from worker.consumer import PromptConsumer

WAITED_MAX_S = 2.0
ROUNDING_S = 1e-6


def test_a_broker_that_was_away_for_long_is_asked_again_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a broker that does not listen, and a clock that does not make us wait
    waited_s: list[float] = []

    def sleep(seconds: float) -> None:
        waited_s.append(seconds)
        if sum(waited_s) > 60.0:
            raise KeyboardInterrupt

    tried_at_s: list[float] = []

    def connect(self: Connection) -> Any:
        tried_at_s.append(sum(waited_s))
        raise ConnectionRefusedError

    monkeypatch.setattr("kombu.utils.functional.sleep", sleep)
    monkeypatch.setattr(Connection, "_connection_factory", connect)
    consumer = PromptConsumer.__new__(PromptConsumer)
    consumer.app = Celery(set_as_current=False)
    consumer.app.conf.broker_connection_max_retries = None
    consumer.app.conf.broker_connection_retry_on_startup = True
    consumer.first_connection_attempt, consumer.broker_connection_retry_attempt = True, 0

    # when the worker tries to reach it for a minute
    with pytest.raises(KeyboardInterrupt):
        consumer.ensure_connected(Connection("redis://127.0.0.1:1/0"))

    # then no two tries lie further apart
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried_at_s)]
    assert len(gaps) > 10
    assert max(gaps) <= WAITED_MAX_S + ROUNDING_S
