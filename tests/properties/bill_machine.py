"""The same histories with money in them: prices that change, payments, corrections, closings, budgets, rollups.

What holds after every step is worked out here in plain integers from the rows, and by the checks that users have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import invariant, precondition, rule
from sqlalchemy import Connection, select

from billing import (
    budgets,
    closing,
    corrections,
    credit_notes,
    invoices,
    ledger,
    money,
    rate_cards,
    rollups,
    usage_totals,
    verify,
)
from billing.budgets import Scope
from billing.dimensions import Dimensions
from billing.invoices import InvoiceError
from billing.ledger import EntryKind, NewEntry
from billing.usage import Usage
from storage import billing_tables, journal
from storage.journal import FINAL, Operation
from storage.open import Storage
from tests.factories import make_usage
from tests.properties.keeping_machine import CrashError, KeepingMachine
from tests.properties.machine import PICKS

ENTRY = billing_tables.ledger_entry
CARD = """
[device_seconds]
"*" = "{0}.000000000007"

[million_tokens."*"]
trained = "{0}.3333333333"
prefilled = "0.1"
cached = "0.01"
sampled = "7"

[gigabyte_months]
checkpoint = "{0}.1"
state = "900.7"
"""


def _most(operation: Operation) -> int:
    """What is held for an operation, in units."""
    return operation.id * 999_999_937


class BillMachine(KeepingMachine):
    """An account that is charged, pays, is credited and gets invoices while all else goes on."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.account_id = self.sampling.account_id
        self.references = 0
        self.balances: list[tuple[datetime, int]] = []
        self.issued: dict[int, str] = {}
        run = self.runs[0]
        with self.database.begin() as tx:
            now = self.database.now(tx)
            rate_cards.add(tx, CARD.format(1), now=now)
            for scope, scope_id in [(Scope.ACCOUNT, self.account_id), (Scope.RUN, run.id), (Scope.BATCH, "none")]:
                budgets.add(tx, self.account_id, scope, scope_id, cap=money.SCALE, now=now)
        self.wait(rate_cards.LEAD_S + 1)
        for place in (0, 1):
            self.work(place, 2)
        self.wait(1.0)
        self.close_period(crashes=False, twice=False)
        self.work(0, 1)

    def _usage(self, operation: Operation) -> Usage:
        """Something that does not come out even."""
        number = operation.id
        return make_usage(
            device_ns=number * 333_333_331 % 10**10,
            tokens_trained=number * 37 % 1_000,
            tokens_prefilled=number * 11 % 100,
            tokens_cached=number % 7,
            tokens_sampled=number % 13,
            attempt=operation.attempts,
        )

    # ----------------------------------------------------------------------------------------------------------- money

    @rule(price=st.integers(0, 9), own=st.booleans(), crashes=st.booleans())
    def change_prices(self, price: int, *, own: bool, crashes: bool) -> None:
        """An operator adds a rate card, for all or for this account."""
        whose = self.account_id if own else None
        self._book(lambda tx, now: rate_cards.add(tx, CARD.format(price), now=now, account_id=whose), crashes)

    @rule(units=st.integers(1, 3 * money.SCALE), given=st.booleans(), twice=st.booleans(), crashes=st.booleans())
    def pay(self, units: int, *, given: bool, twice: bool, crashes: bool) -> None:
        """A payment or a credit is booked, perhaps told of twice."""
        self.references += 1
        kind = EntryKind.CREDIT if given else EntryKind.TOP_UP
        entry = NewEntry(kind, f"{kind}:{self.references}", Dimensions(self.account_id), -units)
        for _ in range(1 + twice):
            self._book(lambda tx, now: ledger.append_once(tx, entry, now=now), crashes)

    @precondition(lambda self: self._entries())
    @rule(pick=PICKS, percent=st.integers(-120, 50), twice=st.booleans(), crashes=st.booleans())
    def correct(self, pick: int, percent: int, *, twice: bool, crashes: bool) -> None:
        """An operator corrects an entry, perhaps by more than there is."""
        entries = self._entries()
        entry = entries[pick % len(entries)]
        units = entry.amount * percent // 100 or 1
        self.references += 1
        arguments = {"units": units, "reason": "why", "reference": str(self.references)}
        for _ in range(1 + twice):
            with contextlib.suppress(InvoiceError):
                self._book(lambda tx, now: corrections.adjust(tx, entry.id, **arguments, now=now), crashes)

    @rule(crashes=st.booleans(), twice=st.booleans())
    def close_period(self, *, crashes: bool, twice: bool) -> None:
        """A period is closed, perhaps by two schedulers."""
        for _ in range(1 + twice):
            self._book(lambda tx, now: closing.close(tx, self.account_id, end=now, now=now), crashes)

    @precondition(lambda self: self.issued)
    @rule(pick=PICKS, cents=st.none() | st.integers(1, 50), crashes=st.booleans())
    def credit_an_invoice(self, pick: int, cents: int | None, *, crashes: bool) -> None:
        """Charges of an invoice are taken back, all or some; a credit note, or an invoice without charges, has none."""
        number = sorted(self.issued)[pick % len(self.issued)]
        units = None if cents is None else cents * money.SCALE // 100

        def credit(tx: Connection, now: datetime) -> None:
            credit_notes.credit(tx, invoices.get(tx, number), reason="why", units=units, now=now)

        with contextlib.suppress(InvoiceError):
            self._book(credit, crashes)

    @precondition(lambda self: not self.held)
    @rule(place=st.integers(0, 1), num=st.integers(1, 3))
    def work(self, place: int, num: int) -> None:
        """A client submits what comes next, and a worker executes it undisturbed; else charges would be rare."""
        seq = self._run(self.runs[place].id).state_seq
        for following in range(seq + 1, seq + 1 + num):
            self.put_payload(place, following, "optim_step", 10, refused=False)
            self.write_row(len(self.submissions) - 1, again=False)
        self.acquire("a", place)
        while self.held and self._take_turn(self.held[0]):
            pass
        while self.held:
            self.release(0)

    @rule(batch=st.integers(1, 5), anew=st.booleans())
    def roll_up(self, batch: int, *, anew: bool) -> None:
        """Usage is rolled up by the hour; or all of it once more."""
        if anew:
            rollups.rebuild(self.database, pass_s=0)
        rollups.roll_up(self.database, pass_s=0, batch=batch)

    @rule()
    def remember_the_balance(self) -> None:
        """What is owed at a moment that is over is what it will ever have been."""
        with self.database.read() as tx:
            now = self.database.now(tx)
        self.balances.append((now, self._owed()))
        self.database.clock.advance(1.0)  # type: ignore[attr-defined]

    def _book(self, verb: Callable[[Connection, datetime], Any], crashes: bool) -> None:
        with contextlib.suppress(CrashError), self.database.begin() as tx:
            verb(tx, self.database.now(tx))
            if crashes:
                raise CrashError

    # ------------------------------------------------------------------------------------------------------ what holds

    @invariant()
    def the_bill_adds_up(self) -> None:
        """After every step."""
        with self.database.read() as tx:
            assert list(verify.differences(tx)) == []
            assert list(invoices.check(tx)) == []
            every = tx.execute(select(ENTRY)).all()
            issued = invoices.list_invoices(tx)
            owed = sum(row.amount for row in every)
            open_ = sum(row.amount for row in every if row.invoice_id is None)
            assert (
                owed
                == sum(invoice.units for invoice in issued) + open_
                == -money.to_units(ledger.balance(tx, self.account_id))
            )
            charges = [row for row in every if row.kind == EntryKind.CHARGE]
            totals = usage_totals.totals(tx)
            assert sum(row.amount for row in charges) == sum(total.charge for total in totals)
            assert sum(row.operation_id is not None for row in charges) == sum(total.operations for total in totals)
            self._budgets_count_every_entry(tx, every)
            self._what_was_issued_stays(tx)
            for moment, units in self.balances:
                assert -money.to_units(ledger.balance(tx, self.account_id, at=moment)) == units

    def _budgets_count_every_entry(self, tx: Connection, every: Sequence[Any]) -> None:
        run_id = self.runs[0].id
        expected = [
            sum(row.amount for row in every),
            sum(row.amount for row in every if row.run_id == run_id),
            0,
        ]
        found = budgets.list_budgets(tx, [self.account_id], now=self.database.now(tx))
        assert [budget.spent for budget in found] == expected
        account, _, batch = found
        assert batch.held == 0
        assert account.held == sum(_most(operation) for operation in self._waiting(tx))

    def _accepted(self, tx: Connection, operation: Operation) -> None:
        """What it may cost is held on the budgets that cover it, unless it was accepted as failed."""
        if operation.status in FINAL:
            return
        whom = Dimensions(operation.account_id, run_id=operation.run_id)
        covering = budgets.lock(tx, [whom], now=self.database.now(tx))
        budgets.hold(tx, covering, operation.id, _most(operation))

    def _waiting(self, tx: Connection) -> Sequence[Operation]:
        """What was accepted and has no outcome."""
        operations = (journal.get_operation(tx, request_id) for request_id in self.book.accepted)
        return [operation for operation in operations if operation.status not in FINAL]

    def _what_was_issued_stays(self, tx: Connection) -> None:
        documents = {invoice.number: invoices.text(tx, invoice) for invoice in invoices.list_invoices(tx)}
        assert sorted(documents) == list(range(1, len(documents) + 1))
        assert self.issued.items() <= documents.items()
        self.issued = documents

    def teardown(self) -> None:
        """At the end all is charged, rolled up and on invoices."""
        super().teardown()
        self.keep(2 * 3600.0)
        self.meter(2, wholly=True, crashes=False)
        self.hours_hold_what_was_kept()
        self.roll_up(1, anew=True)
        rollups.roll_up(self.database, pass_s=60)
        self.database.clock.advance(1.0)  # type: ignore[attr-defined]
        self.close_period(crashes=False, twice=True)
        self.the_bill_adds_up()
        with self.database.read() as tx:
            assert not [row for row in self._entries() if row.invoice_id is None]
            assert not self._waiting(tx)
            assert self._owed() == sum(invoice.units for invoice in invoices.list_invoices(tx))

    # --------------------------------------------------------------------------------------------------------- looking

    def _owed(self) -> int:
        return sum(row.amount for row in self._entries())

    def _entries(self) -> Sequence[Any]:
        with self.database.read() as tx:
            return tx.execute(select(ENTRY).order_by(ENTRY.c.id)).all()
