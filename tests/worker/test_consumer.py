"""How a worker comes back to its broker."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu import Connection
from kombu.common import QoS

from jobs.app import make_app
from jobs.settings import JobsSettings
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


def test_no_thread_of_the_pool_touches_the_connection_after_it_was_made_anew() -> None:
    # given a consumer that came back to its broker with fewer messages at a time than it may have
    touched: list[dict[str, int]] = []
    consumer = PromptConsumer.__new__(PromptConsumer)
    consumer.app = make_app(JobsSettings(broker_url="amqp://guest:guest@127.0.0.1:1//"))
    consumer.prefetch_multiplier, consumer.initial_prefetch_count = 1, 1
    consumer.pool = SimpleNamespace(num_processes=16)
    consumer._maximum_prefetch_restored = False
    consumer.qos = QoS(lambda **asked: touched.append(asked), 1)

    # when a task ends, in its own thread
    consumer._restore_prefetch_count_after_connection_restart(None)

    # then nothing is asked of the broker, whose answer the main thread might read
    assert touched == []
