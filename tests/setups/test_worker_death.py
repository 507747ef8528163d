"""A worker dies or leaves in mid-training; the script notices nothing but a pause, and the losses are the same."""

from __future__ import annotations

import tinker
from tinker import types

from tests.setups.deployment import MODEL, Deployment
from tests.setups.test_sdk import grad_norm, make_datum

STEPS = 16
KILL_AFTER = (4, 9)


def losses(
    client: tinker.ServiceClient, deployment: Deployment, *, kill_after: tuple[int, ...]
) -> list[tuple[float, float]]:
    """Train; `kill -9` the worker while the operations of these steps are under way."""
    training = client.create_lora_training_client(MODEL, rank=8, seed=11).result()
    results = []
    for step in range(STEPS):
        data = [make_datum(seed) for seed in range(step, step + 4)]
        forward_backward = training.forward_backward(data, "cross_entropy")
        optim_step = training.optim_step(types.AdamParams(learning_rate=2e-3, weight_decay=0.01))
        if step in kill_after:
            deployment.kill_worker()
        results.append((forward_backward.result().metrics["loss:sum"], grad_norm(optim_step.result())))
    return results


def test_killed_workers_change_nothing_but_the_time_it_takes(
    client: tinker.ServiceClient, deployment: Deployment
) -> None:
    # given the losses of an undisturbed run
    undisturbed = losses(client, deployment, kill_after=())

    # when the worker is killed twice in mid-training
    disturbed = losses(client, deployment, kill_after=KILL_AFTER)

    # then another one went on, bit for bit
    assert disturbed == undisturbed
    assert "replay_mismatch" not in deployment.log()
