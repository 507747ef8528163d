"""Messages decide nothing but when: lost, doubled, kept or delivered again, they change no result.

No timeout of a broker ever ends, delays or repeats work, and no clock but the database's counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.failpoints import Point
from tests.promises.conftest import CONSUMER_TIMEOUT_S, DISTURBED, Connect
from tests.promises.kit import PatientWire, billed, wait_until
from tests.setups.deployment import Deployment

pytestmark = pytest.mark.processes

Undisturbed = tuple[list[Any], list[list[tuple[Any, ...]]]]
CLOCK_S = 600
"""S3 refuses who is more than 15 minutes ahead or behind."""


@pytest.fixture
def copies(service: Deployment, messages: Path) -> Iterator[Path]:
    """A file that says how often each message of the service is sent."""
    yield messages
    messages.unlink()


@pytest.mark.parametrize("num", [3, 0])
def test_messages_that_are_tripled_or_lost_change_no_result(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed, copies: Path, num: int
) -> None:
    # given processes whose every message is sent three times; or never, but for the scheduler's
    expected = wire.result(wire.sample(wire.sampler(0)))["sequences"]
    copies.write_text(str(num))

    # when a run is trained and a sample drawn
    run = wire.run()
    results = wire.run_program(run)
    request_id = wire.sample(wire.sampler(1))
    sequences = wire.result(request_id)["sequences"]

    # then they are what they always are, and billed once
    assert results == undisturbed[0]
    assert [operation.amounts for operation in billed(service, run=run)[1:]] == undisturbed[1]
    assert sequences == expected
    assert len(billed(service, request_id=request_id)[0].usage) == 1


def test_a_message_that_a_dead_worker_had_taken_delays_nothing(
    service: Deployment, wire: PatientWire, undisturbed: Undisturbed
) -> None:
    # given a worker that is killed with a message in its hands, which its broker will not deliver again for an hour
    run = wire.run()
    service.kill("worker")  # so that nobody holds the run's lease: only the message knew of its work
    service.arm(Point.TASK_BEGUN)
    request_id = wire.submit_seq(run, 1)
    service.fired(Point.TASK_BEGUN)

    # then the sweeper announces the work again, and it is done once
    assert wire.result(request_id) == undisturbed[0][0]
    assert billed(service, run=run)[1].amounts == undisturbed[1][0]


@pytest.mark.servers
def test_a_consumer_timeout_of_the_broker_ends_no_worker(
    deployed: Deployment, connect: Connect, undisturbed: Undisturbed
) -> None:
    # given a worker, one of whose tasks is held up for longer than RabbitMQ waits for an acknowledgement
    wire = connect(deployed)
    run, other = wire.run(0), wire.run(1)
    workers = deployed.pids("worker")
    deployed.arm(Point.TASK_BEGUN, f"pause {2 * CONSUMER_TIMEOUT_S}")
    request_ids = [wire.submit_seq(run, seq) for seq in (1, 2)]
    deployed.fired(Point.TASK_BEGUN)

    # when RabbitMQ has closed its channel
    wait_until(lambda: "delivery acknowledgement on channel" in deployed.log(), "closed", deployed)

    # then the same worker opens another one and goes on, with that run as with any other
    assert [wire.result(request_id) for request_id in request_ids] == undisturbed[0][:2]
    assert wire.run_program(other) == undisturbed[0]
    assert deployed.pids("worker") == workers


@pytest.mark.servers
@pytest.mark.parametrize("ahead_s", [CLOCK_S, -CLOCK_S])
def test_a_worker_whose_clock_is_wrong_works_like_any_other(
    deployed: Deployment, connect: Connect, undisturbed: Undisturbed, ahead_s: int
) -> None:
    # given a service whose only worker is ten minutes ahead, or behind
    wire = connect(deployed)
    deployed.end_child("worker")
    name = f"clock-{ahead_s}"
    deployed.start_worker(name, settings={**DISTURBED, "DISTURBED_CLOCK_S": str(ahead_s)})

    # when it trains and samples
    run = wire.run()
    results = wire.run_program(run)
    drawn = wire.sample(wire.sampler())
    assert wire.result(drawn)["sequences"]
    deployed.end_child(name)
    deployed.start_part("worker")

    # then it has done all of it, once, and the next worker takes over as soon as its lease is over
    operations = billed(deployed, run=run)[1:]
    assert results == undisturbed[0]
    assert [operation.amounts for operation in operations] == undisturbed[1]
    assert {record[-1] for operation in operations for record in operation.usage} == {name}
    assert wire.result(wire.step(run, 13))["metrics"]["grad_norm"] == 0
