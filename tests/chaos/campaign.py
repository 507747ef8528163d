"""One campaign: an undisturbed round of every script, then faults one after the other, then the checks."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from billing.reconciliation import Reconciliation
from jobs.settings import JobsSettings
from storage import sweeper
from storage.open import Storage
from tests.chaos import checks
from tests.chaos.clients import Clients, ClientsStuckError, Record
from tests.chaos.faults import Struck, strike
from tests.chaos.schedule import Fault, SetUp, faults
from tests.chaos.servers import BrokerKind, Servers
from tests.chaos.service import LEASE_S, RETENTION_S, UPLOAD_EXPIRY_S, Service
from tests.tiny_model import write_tiny_model

PAUSE_MAX_S = 300.0
"""Without any result for so long, the clients count as stuck."""
FINISH_S = 600.0
SWEEP_S = 60.0
CAP = "1000000"
"""Of the account: more than it can spend, so that something is held for every operation and none waits."""
ENDED_BY_ITSELF = (0, -signal.SIGTERM)
"""What an api process ends with, and a worker that was still starting."""
SETTLE_S = max(LEASE_S, UPLOAD_EXPIRY_S) + 1.0

STORAGE_CHECKS: Sequence[Callable[[Storage], Sequence[str]]] = (
    checks.every_future_is_resolved,
    checks.no_operation_failed,
    checks.every_run_is_at_its_last_operation,
    checks.every_completed_operation_has_one_usage_record,
    checks.every_completed_operation_has_one_charge,
    checks.billed_and_overhead_are_the_busy_time,
    checks.every_charge_and_budget_can_be_computed_again,
    checks.billed_tokens_are_those_of_the_undisturbed,
    checks.no_object_without_a_row,
    checks.no_row_without_its_object,
    checks.no_upload_is_left,
    checks.nothing_is_held,
)


@dataclass(frozen=True)
class Plan:
    """What is to be done; everything random follows from `seed`.

    Attributes:
        minutes: after which no fault is begun any more.
        only: kinds of faults (`schedule.faults`); empty for all.
    """

    setup: SetUp
    seed: int
    kills: int
    broker: BrokerKind = "rabbitmq"
    minutes: float = math.inf
    only: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        struck: every fault, also those whose point nobody reached.
        violations: per check what contradicts it.
        stopped_by: why it ended before all faults were through; empty if it did not.
        longest_pause_s: of any client, from one result to the next.
        device_time: busy, billed and in vain, over all workers.
    """

    plan: Plan
    struck: list[Struck] = field(default_factory=list)
    violations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    stopped_by: str = ""
    wall_s: float = 0.0
    longest_pause_s: float = 0.0
    undisturbed_pause_s: float = 0.0
    num_rounds: int = 0
    num_results: int = 0
    device_time: Reconciliation | None = None

    @property
    def num_kills(self) -> int:
        """Faults that happened."""
        return sum(struck.happened for struck in self.struck)

    @property
    def passed(self) -> bool:
        """Whether everything was asked and everything holds."""
        return not self.stopped_by and not any(self.violations.values())


def run(plan: Plan, directory: Path, on_fault: Callable[[Struck], None]) -> Outcome:
    """Carry a plan out in an empty directory, where all logs stay; tells of each fault once it is over."""
    outcome, began = Outcome(plan), time.monotonic()
    with ExitStack() as stack:
        servers = None
        if plan.setup == "deployed":
            servers = Servers(plan.broker)
            stack.callback(servers.close)
            stack.callback(servers.keep_logs, directory)
        service = Service(directory, write_tiny_model(directory / "model"), servers)
        stack.callback(service.shut_down)
        service.command("budgets", "add", CAP, "--account", "tests")
        clients = Clients(directory / "clients", service.url, service.api_key)
        stack.callback(clients.kill)
        try:
            _disturb(plan, service, clients, outcome, on_fault)
            clients.finish(timeout_s=FINISH_S)
        except ClientsStuckError as error:
            outcome.stopped_by = str(error)
        clients.kill()
        _note(outcome, clients.records())
        outcome.violations = dict(_violations(service, clients.records(), outcome))
    outcome.wall_s = time.monotonic() - began
    return outcome


def _disturb(
    plan: Plan, service: Service, clients: Clients, outcome: Outcome, on_fault: Callable[[Struck], None]
) -> None:
    """The reference first; then a fault at a random moment after there was progress, until there were enough."""
    clients.wait_for_round(checks.UNDISTURBED, timeout_s=PAUSE_MAX_S)
    outcome.undisturbed_pause_s = max(record.longest_pause_s for record in clients.records().values())
    schedule: Iterator[Fault] = faults(plan.setup, plan.seed, lease_s=LEASE_S, only=plan.only)
    ends_at = time.monotonic() + 60.0 * plan.minutes
    while outcome.num_kills < plan.kills and time.monotonic() < ends_at:
        fault = next(schedule)
        clients.wait_for_results(clients.num_results() + fault.after_records, timeout_s=PAUSE_MAX_S)
        time.sleep(fault.delay_s)
        struck, over_at = strike(service, fault), time.monotonic()
        clients.wait_for_results(clients.num_results() + 1, timeout_s=PAUSE_MAX_S)
        outcome.struck.append(replace(struck, result_after_s=time.monotonic() - over_at))
        on_fault(outcome.struck[-1])
        if differences := checks.results_are_those_of_the_undisturbed(clients.records()):
            outcome.stopped_by = f"after {fault}: {differences[0]}"
            return


def _note(outcome: Outcome, records: Mapping[str, Record]) -> None:
    outcome.longest_pause_s = max(record.longest_pause_s for record in records.values())
    outcome.num_rounds = sum(len(record.done) for record in records.values())
    outcome.num_results = sum(len(values) for record in records.values() for values in record.rounds.values())


def _violations(
    service: Service, records: Mapping[str, Record], outcome: Outcome
) -> Iterator[tuple[str, Sequence[str]]]:
    """Shut down, sweep, and ask everything."""
    time.sleep(SETTLE_S)  # what the killed had held, and what they had begun to upload, expires
    statuses = service.shut_down()
    unwilling = [f"{name} ended with {code}" for name, code in statuses.items() if code not in ENDED_BY_ITSELF]
    yield "Every part ends by itself on SIGTERM.", unwilling
    with service.storage() as storage:
        _sweep(storage)
        outcome.device_time = checks.reconciled(storage)
        for check in STORAGE_CHECKS:
            yield _sentence(check), check(storage)
    yield (
        _sentence(checks.results_are_those_of_the_undisturbed),
        checks.results_are_those_of_the_undisturbed(records),
    )


def _sweep(storage: Storage) -> None:
    """Twice, since what a writer puts after its upload was swept away is swept away later."""
    for _ in range(2):
        time.sleep(UPLOAD_EXPIRY_S + 0.5)
        sweeper.sweep(
            storage.database,
            storage.objects,
            result_retention_s=RETENTION_S,
            sampling_session_idle_s=JobsSettings().sampling_session_idle_s,
            pass_s=SWEEP_S,
        )


def _sentence(check: Callable[..., object]) -> str:
    return (check.__doc__ or check.__name__).splitlines()[0]
