"""P8: what others do on the same device changes when an operation finishes, never what comes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.promises.conftest import Connect
from tests.promises.kit import PROGRAM, PatientWire
from tests.setups.deployment import Deployment

pytestmark = pytest.mark.processes

OTHERS = 2
FOLLOWING = PROGRAM[-1] + 1


def train_and_sample(wire: PatientWire) -> list[Any]:
    """Everything a script gets: results of training, and samples of base model and trained weights."""
    run = wire.run()
    results = wire.run_program(run)
    body = {"model_id": run, "sampling_session_seq_id": 7, "seq_id": FOLLOWING, "type": "save_weights_for_sampler"}
    trained = wire.result(wire.submit("save_weights_for_sampler", body))["sampling_session_id"]
    drawn = [
        wire.sample(sampler, seq, seed=seq, max_tokens=24) for sampler in (wire.sampler(), trained) for seq in (0, 1)
    ]
    return results + [wire.result(request_id)["sequences"] for request_id in drawn]


class Company:
    """Another account, which trains and samples until it is told to stop."""

    def __init__(self, wire: PatientWire) -> None:
        self.num_done = 0
        self._wire = wire
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is under way."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        run, sampler, seq = self._wire.run(rank=8), self._wire.sampler(), 0
        while not self._stopping.is_set():
            submitted = [self._wire.submit_seq(run, 2 * seq + 1), self._wire.submit_seq(run, 2 * seq + 2)]
            submitted += [self._wire.sample(sampler, 3 * seq + place, seed=seq, max_tokens=16) for place in range(3)]
            for request_id in submitted:
                self._wire.result(request_id)
            self.num_done += len(submitted)
            seq += 1


@pytest.fixture
def company(service: Deployment, connect: Connect) -> Iterator[list[Company]]:
    """Other accounts, at work."""
    others = [Company(connect(service, service.create_account(f"other-{number}"))) for number in range(OTHERS)]
    for other in others:
        other.start()
    yield others
    for other in others:
        other.stop()


def test_results_are_the_same_alone_and_in_company(
    service: Deployment, connect: Connect, request: pytest.FixtureRequest
) -> None:
    # given what a script gets when it is alone
    alone = train_and_sample(connect(service))

    # when it runs once more while other accounts train and sample on the same worker
    company: list[Company] = request.getfixturevalue("company")
    before = [other.num_done for other in company]
    together = train_and_sample(connect(service))
    after = [other.num_done for other in company]

    # then every loss, gradient norm, log-probability and token is the same
    assert together == alone
    assert all(was < now for was, now in zip(before, after, strict=True)), "the others did nothing meanwhile"
