"""What must hold after any number of faults. Each check returns what contradicts its sentence; nothing: it holds.

The service has been shut down when these are asked, and the sweeper has run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, func, select

from billing import verify
from billing.reconciliation import Reconciliation, reconcile
from storage import billing_tables, tables, uploads
from storage.journal import Status
from storage.open import Storage
from tests.chaos.clients import Record

UNDISTURBED = 0
"""The round of each script that ran before the first fault."""

operation, usage, run = tables.operation, billing_tables.usage_record, tables.run
charge = billing_tables.ledger_entry


def every_future_is_resolved(storage: Storage) -> Sequence[str]:
    """Every accepted operation has an outcome."""
    with storage.database.read() as tx:
        rows = tx.execute(select(operation).where(operation.c.finished_at.is_(None))).all()
    return [f"{row.request_id} ({row.kind}) is {row.status}" for row in rows]


def no_operation_failed(storage: Storage) -> Sequence[str]:
    """No operation failed: none of them was at fault."""
    with storage.database.read() as tx:
        rows = tx.execute(select(operation).where(operation.c.status == Status.FAILED)).all()
    return [f"{row.request_id} ({row.kind}) failed: {row.error}" for row in rows]


def every_run_is_at_its_last_operation(storage: Storage) -> Sequence[str]:
    """The state of every run is that after its last operation, and no `seq` is missing."""
    query = select(run.c.id, run.c.state_seq, func.max(operation.c.seq), func.count()).join_from(run, operation)
    with storage.database.read() as tx:
        rows = tx.execute(query.group_by(run.c.id)).all()
    return [
        f"{run_id} is at {state_seq}, its last operation is {last}, it has {number}"
        for run_id, state_seq, last, number in rows
        if not state_seq == last == number - 1
    ]


def every_completed_operation_has_one_usage_record(storage: Storage) -> Sequence[str]:
    """Every completed operation has exactly one usage record, and nothing else has one."""
    query = (
        select(operation.c.request_id, operation.c.status, func.count(usage.c.id))
        .join_from(operation, usage, operation.c.id == usage.c.operation_id, isouter=True)
        .group_by(operation.c.id)
    )
    with storage.database.read() as tx:
        rows = tx.execute(query).all()
    return [
        f"{request_id} is {status} and has {number} usage records"
        for request_id, status, number in rows
        if number != (status == Status.COMPLETED)
    ]


def every_completed_operation_has_one_charge(storage: Storage) -> Sequence[str]:
    """Every completed operation is charged exactly once, and nothing else is."""
    query = (
        select(operation.c.request_id, operation.c.status, func.count(charge.c.id))
        .join_from(operation, charge, operation.c.id == charge.c.operation_id, isouter=True)
        .group_by(operation.c.id)
    )
    with storage.database.read() as tx:
        rows = tx.execute(query).all()
    return [
        f"{request_id} is {status} and has {number} charges"
        for request_id, status, number in rows
        if number != (status == Status.COMPLETED)
    ]


def billed_and_overhead_are_the_busy_time(storage: Storage) -> Sequence[str]:
    """Device time that was billed, and that was in vain, is that of the clocks around the engines, within 0.1 %."""
    found = reconciled(storage)
    return [
        f"{balance.worker_id} was busy for {balance.busy_ns} ns and is {balance.drift_ns} ns off"
        for balance in found.balances
        if found.alarm and balance == found.worst
    ]


def every_charge_and_budget_can_be_computed_again(storage: Storage) -> Sequence[str]:
    """Usage and prices give the charges that are there, and entries and holds what budgets have spent and hold."""
    with storage.database.read() as tx:
        found = list(verify.differences(tx))
    return [f"{each.source}: {each.wrong}: {each.expected} expected, {each.found} found" for each in found]


def reconciled(storage: Storage) -> Reconciliation:
    """Busy device time held against what was billed and what was in vain."""
    with storage.database.read() as tx:
        return reconcile(tx)


def billed_tokens_are_those_of_the_undisturbed(storage: Storage) -> Sequence[str]:
    """Each round of a script was billed the operations and tokens of its undisturbed round, kind by kind."""
    # how much of a prompt is found in a cache depends on who was there before
    prompts = usage.c.tokens_prefilled + usage.c.tokens_cached
    tokens = (usage.c.tokens_trained, prompts.label("tokens_prefilled"), usage.c.tokens_sampled)
    query = select(tables.session.c.user_metadata, usage.c.kind, *tokens)
    query = query.join_from(usage, tables.session, usage.c.session_id == tables.session.c.id)
    billed: dict[tuple[str, int], Counter[tuple[str, str]]] = defaultdict(Counter)
    with storage.database.read() as tx:
        for metadata, kind, *counts in tx.execute(query):
            bill = billed[metadata["script"], int(metadata["round"])]
            bill.update({(kind, "operations"): 1})
            bill.update({(kind, column.name): count for column, count in zip(tokens, counts, strict=True)})
    return [
        f"round {number} of {script} was billed {dict(bill - known)} too much and {dict(known - bill)} too little"
        for (script, number), bill in billed.items()
        if bill != (known := billed[script, UNDISTURBED])
    ]


def no_object_without_a_row(storage: Storage) -> Sequence[str]:
    """After the sweeper, the store holds no object that no row names."""
    with storage.database.read() as tx:
        named = {key for _, key in _named_keys(tx)}
    return [f"{found.key} is named by no row" for found in storage.objects.list() if found.key not in named]


def no_row_without_its_object(storage: Storage) -> Sequence[str]:
    """Every object that a row names lies in the store and counts as referenced."""
    stored = {found.key for found in storage.objects.list()}
    with storage.database.read() as tx:
        named = list(_named_keys(tx))
        states = dict(tx.execute(select(tables.stored_object.c.key, tables.stored_object.c.state)).all())
    missing = [f"{whose} names {key}, which is not in the store" for whose, key in named if key not in stored]
    return missing + [
        f"{whose} names {key}, whose row says {states.get(key, 'nothing')}"
        for whose, key in named
        if states.get(key) != uploads.REFERENCED
    ]


def no_upload_is_left(storage: Storage) -> Sequence[str]:
    """After the sweeper, nothing is announced, released or being deleted any more."""
    row = tables.stored_object
    with storage.database.read() as tx:
        rows = tx.execute(select(row.c.key, row.c.state).where(row.c.state != uploads.REFERENCED)).all()
    return [f"{key} is still {state}" for key, state in rows]


def nothing_is_held(storage: Storage) -> Sequence[str]:
    """No lease is held and no claim stands."""
    with storage.database.read() as tx:
        now = storage.database.now(tx)
        leased = tx.execute(select(run.c.id, run.c.lease_worker).where(run.c.lease_expires_at >= now)).all()
        claimed = tx.execute(
            select(operation.c.request_id, operation.c.worker_id).where(
                operation.c.finished_at.is_(None), operation.c.claim_expires_at.is_not(None)
            )
        ).all()
    return [f"{worker} holds {what}" for what, worker in [*leased, *claimed]]


def results_are_those_of_the_undisturbed(records: Mapping[str, Record]) -> Sequence[str]:
    """Losses, gradient norms, log-probabilities and sampled tokens of every round are bit for bit the undisturbed's."""
    return [
        f"round {number} of {script} differs from the undisturbed at result {_first_difference(values, expected)}"
        for script, record in records.items()
        for number, values in record.rounds.items()
        if list(values) != list(expected := _expected(record, number))
    ]


def _expected(record: Record, number: int) -> Sequence[Any]:
    """What a round should have given by now: of one that goes on still, as much as it has."""
    undisturbed = record.rounds[UNDISTURBED]
    return undisturbed if number in record.done else undisturbed[: len(record.rounds[number])]


def _named_keys(tx: Connection) -> Iterator[tuple[str, str]]:
    """Every object that a row names, and which row that is."""
    sources = (
        (operation.c.request_id, operation.c.payload_key),
        (operation.c.request_id, operation.c.outcome_key),
        (operation.c.request_id, operation.c.loads_key),
        (tables.snapshot.c.run_id, tables.snapshot.c.object_key),
        (tables.checkpoint.c.name, tables.checkpoint.c.object_key),
    )
    for whose, key in sources:
        yield from tx.execute(select(whose, key).where(key.is_not(None)))
    sampling = tables.sampling_session
    query = select(sampling.c.id, sampling.c.object_key).where(
        sampling.c.object_key.is_not(None), sampling.c.ended_at.is_(None)
    )
    yield from tx.execute(query)
    for table in (tables.checkpoint, tables.base_model):
        for name, files in tx.execute(select(table.c.name, table.c.files)):
            yield from ((name, file["key"]) for file in files.values())


def _first_difference(values: Sequence[Any], undisturbed: Sequence[Any]) -> str:
    for place, (one, other) in enumerate(zip(values, undisturbed, strict=False)):
        if one != other:
            return f"{place}: {str(one)[:200]} instead of {str(other)[:200]}"
    return f"{min(len(values), len(undisturbed))}: {len(values)} results instead of {len(undisturbed)}"
