"""Each check says no where its sentence does not hold."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, update

from billing import budgets
from billing.budgets import Scope
from billing.dimensions import Dimensions
from storage import billing_tables, tables, workers
from storage.journal import Operation
from storage.open import Storage
from storage.runs import Run, Session
from storage.workers import Work
from tests.chaos import checks
from tests.chaos.campaign import STORAGE_CHECKS
from tests.chaos.clients import Record
from tests.factories import NOW, bill, complete, make_operation, make_run, make_session, make_upload, make_usage


def a_round(tx: Connection, number: int, *, tokens: int = 10) -> tuple[Run, Operation]:
    """One completed and billed operation of a script's round."""
    session: Session = make_session(tx, user_metadata={"script": "supervised", "round": str(number)})
    run = make_run(tx, session=session)
    operation = make_operation(tx, run)
    complete(tx, operation)
    tx.execute(update(tables.run).where(tables.run.c.id == run.id).values(state_seq=0))
    bill(tx, run, operation, make_usage(tokens_trained=tokens), now=operation.accepted_at)
    return run, operation


def broken(storage: Storage) -> set[str]:
    """Names of the checks that say no."""
    return {check.__name__ for check in STORAGE_CHECKS if check(storage)}


def test_two_equal_rounds_hold(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        a_round(tx, 0)
        a_round(tx, 1)

    # then
    assert broken(storage) == set()


def test_an_operation_that_waits_for_ever_is_found(storage: Storage) -> None:
    # given an operation that nobody executes
    with storage.database.begin() as tx:
        run, _ = a_round(tx, 0)
        make_operation(tx, run, 1)

    # then
    assert broken(storage) == {"every_future_is_resolved", "every_run_is_at_its_last_operation"}


def test_a_second_round_with_another_bill_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        a_round(tx, 0)
        a_round(tx, 1, tokens=11)

    # then
    assert broken(storage) == {"billed_tokens_are_those_of_the_undisturbed"}


def test_a_completed_operation_that_was_not_billed_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        _, operation = a_round(tx, 0)
        tx.execute(
            billing_tables.usage_record.delete().where(billing_tables.usage_record.c.operation_id == operation.id)
        )

    # then
    assert broken(storage) == {
        "every_completed_operation_has_one_usage_record",
        "every_charge_and_budget_can_be_computed_again",
    }


def test_a_failed_operation_that_was_billed_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        a_round(tx, 0)
        tx.execute(update(tables.operation).values(status="failed"))

    # then
    assert broken(storage) == {
        "no_operation_failed",
        "every_completed_operation_has_one_usage_record",
        "every_completed_operation_has_one_charge",
    }


def test_what_is_held_for_an_operation_that_has_ended_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        run, operation = a_round(tx, 0)
        budgets.add(tx, run.account_id, Scope.RUN, run.id, cap=10**12, now=NOW)
        budgets.hold(tx, budgets.lock(tx, [Dimensions(run.account_id, run_id=run.id)], now=NOW), operation.id, 5)

    # then
    assert broken(storage) == {"every_charge_and_budget_can_be_computed_again"}


def test_an_object_that_no_row_names_is_found(storage: Storage) -> None:
    # given
    storage.objects.put("payloads/run/0000000000000000000-0123456789abcdef.bin", b"lost")

    # then
    assert broken(storage) == {"no_object_without_a_row"}


def test_a_row_whose_object_is_gone_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        a_round(tx, 0)
        tx.execute(update(tables.operation).values(payload_key="payloads/run/none"))

    # then
    assert broken(storage) == {"no_row_without_its_object"}


def test_an_upload_that_nobody_ended_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        make_upload(tx, "payloads/run/begun")

    # then
    assert broken(storage) == {"no_upload_is_left"}


def test_a_lease_that_is_held_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        a_round(tx, 0)
        expires_at = storage.database.after(tx, 10.0)
        tx.execute(update(tables.run).values(lease_worker="w", lease_expires_at=expires_at))

    # then
    assert broken(storage) == {"nothing_is_held"}


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0000000000000004, 3.0], [1.0, 2.0, 3.0, 4.0]])
def test_one_bit_of_difference_is_found(values: list[float]) -> None:
    # given the undisturbed round and another
    done = frozenset({0, 1})
    record = Record({0: [1.0, 2.0, 3.0], 1: values}, done)

    # then
    assert checks.results_are_those_of_the_undisturbed({"supervised": record})
    assert not checks.results_are_those_of_the_undisturbed({"supervised": Record({0: values, 1: values}, done)})


def test_a_round_that_goes_on_still_is_compared_as_far_as_it_has_come() -> None:
    # given one that is right so far, and one that is not
    right = Record({0: [1.0, 2.0, 3.0], 1: [1.0, 2.0]}, frozenset({0}))
    wrong = Record({0: [1.0, 2.0, 3.0], 1: [1.0, 2.5]}, frozenset({0}))

    # then
    assert not checks.results_are_those_of_the_undisturbed({"supervised": right})
    assert checks.results_are_those_of_the_undisturbed({"supervised": wrong})


def test_device_time_that_is_nowhere_is_found(storage: Storage) -> None:
    # given
    with storage.database.begin() as tx:
        a_round(tx, 0)
        workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=NOW)
        work = Work(busy_ns=2 * 10**9, overhead_ns=2 * 10**9 - 1_000 - 10**8)
        workers.add_work(tx, "w", work, number=1, under_way_ns=0, tail_p95_ns=0)

    # then
    assert broken(storage) == {"billed_and_overhead_are_the_busy_time"}
    assert checks.billed_and_overhead_are_the_busy_time(storage) == [
        "w was busy for 2000000000 ns and is 100000000 ns off"
    ]
