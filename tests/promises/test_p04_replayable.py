"""P4: after `kill -9` of anything training goes on by itself; the client sees a pause, and the very same losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import tinker
from tinker import types

from tests.servers import CephServer, PostgresServer, RabbitServer
from tests.setups.deployment import MODEL, Deployment
from tests.setups.test_sdk import grad_norm, make_datum

pytestmark = pytest.mark.processes

STEPS = 14
AWAY_S = 1.0
Results = list[tuple[float, float]]


def train(client: tinker.ServiceClient, *, disturb: Mapping[int, Callable[[], object]] | None = None) -> Results:
    """Loss and gradient norm of each step; a disturbance comes while the operations of its step are under way."""
    training = client.create_lora_training_client(MODEL, rank=4, seed=21).result()
    results = []
    for step in range(STEPS):
        forward_backward = training.forward_backward(
            [make_datum(seed) for seed in range(step, step + 3)], "cross_entropy"
        )
        optim_step = training.optim_step(types.AdamParams(learning_rate=2e-3, weight_decay=0.01))
        if disturb and step in disturb:
            disturb[step]()
        results.append((forward_backward.result().metrics["loss:sum"], grad_norm(optim_step.result())))
    return results


class Servers:
    """What the deployed service stands on; each can be killed, and comes back a while later."""

    def __init__(self, postgres: PostgresServer, s3: CephServer, rabbitmq: RabbitServer) -> None:
        self._postgres, self._s3, self._rabbitmq = postgres, s3, rabbitmq

    def crash_database(self) -> None:
        """The database; it knows all that was committed."""
        self._postgres.process.kill()
        time.sleep(AWAY_S)
        self._postgres.restart()

    def crash_object_store(self) -> None:
        """The S3 server; it has all that was put."""
        self._s3.gateway.kill()
        time.sleep(AWAY_S)
        self._s3.restart_gateway()

    def crash_broker(self) -> None:
        """The broker, with its durable queues."""
        self._rabbitmq.process.kill()
        time.sleep(AWAY_S)
        self._rabbitmq.restart(empty=False)


@pytest.fixture
def servers(postgres: PostgresServer, s3: CephServer, rabbitmq: RabbitServer) -> Servers:
    """The servers of the deployed service."""
    return Servers(postgres, s3, rabbitmq)


@pytest.fixture(scope="module")
def expected(embedded: Deployment) -> Results:
    """What comes of the training when nothing happens to it."""
    embedded.wait_until_healthy()
    with tinker.ServiceClient(base_url=embedded.url, api_key=embedded.api_key) as client:
        return train(client)


@pytest.fixture
def deployed_client(deployed: Deployment) -> Iterator[tinker.ServiceClient]:
    """The official SDK, connected to the deployed service."""
    with tinker.ServiceClient(base_url=deployed.url, api_key=deployed.api_key) as connected:
        yield connected


def test_no_death_of_a_process_changes_a_bit_of_the_losses(
    service: Deployment, client: tinker.ServiceClient, expected: Results
) -> None:
    # given the losses of an undisturbed training
    # when each process of the embedded service is killed once while operations are under way
    roles = ("worker", "api", "scheduler", "broker", "worker")
    kills = {2 * place + 2: lambda role=role: service.kill(role) for place, role in enumerate(roles)}
    disturbed = train(client, disturb=kills)

    # then the script has seen no error, and nothing but the same numbers
    assert disturbed == expected
    assert not service.events("replay_mismatch")


@pytest.mark.servers
def test_no_death_of_a_process_or_a_server_changes_a_bit_of_the_losses(
    deployed: Deployment, deployed_client: tinker.ServiceClient, expected: Results, servers: Servers
) -> None:
    # given the losses of an undisturbed training, and servers that come back a while after they were killed
    # when each process and each server of the deployed service is killed once while operations are under way
    kills = {
        1: lambda: deployed.kill("worker"),
        3: lambda: deployed.kill("api"),
        5: servers.crash_database,
        7: servers.crash_object_store,
        9: lambda: deployed.kill("scheduler"),
        11: servers.crash_broker,
    }
    disturbed = train(deployed_client, disturb=kills)

    # then the script has seen no error, and nothing but the same numbers, whatever the set-up
    assert disturbed == expected
    assert not deployed.events("replay_mismatch")
