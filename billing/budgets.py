"""Budgets: caps on what a scope may cost, and how much of each has been spent and is held.

A hard cap that is spent pauses what it covers until it is raised, topped up or removed, or its period ends.

What always holds: `spent` is the sum of the scope's ledger entries in the period, `held` the sum of the budget's holds;
this module alone changes them, with the rows locked in order of their ids and after all others of a transaction but a
worker's, so that no two transactions wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, false, insert, or_, select, text, update

from billing import budget_alerts, money, owed
from billing.dimensions import Dimensions
from storage import billing_tables, rows
from storage.database import Database
from storage.errors import RowNotFoundError
from storage.patience import unhurried

_table = billing_tables.budget
_entry = billing_tables.ledger_entry
_hold = billing_tables.budget_hold

ADD_LOCK = 7_263_511_904  # any number, as long as only those who add budgets use it
ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
THRESHOLDS = (50, 80, 100)

REFUSING_S = 60.0
"""So long after it had no room for something a budget is said to refuse; clients ask again every 5 s."""

NOTED_AGAIN_S = 10.0
"""While it refuses, that is written down no more often than this."""

TOLD_AGAIN_S = 600.0
"""It is told anew only after nothing was refused for so long, or once there was more room."""

_WAS_EXHAUSTED = text("budget.is_hard AND budget.spent >= budget.cap")  # the index's words


class Scope(StrEnum):
    """What a budget covers."""

    ACCOUNT = "account"
    PROJECT = "project"
    KEY = "key"
    SESSION = "session"
    RUN = "run"
    BATCH = "batch"


class State(StrEnum):
    """Where a budget stands."""

    OPEN = "open"
    OVER = "over"  # soft, and its cap is spent
    REFUSING = "refusing"  # has room, but lately not enough for something that was asked for
    PAUSED = "paused"  # hard, and its cap is spent


class Period(StrEnum):
    """After what a budget begins anew: never, at midnight, or with the month (UTC)."""

    NONE = "none"
    DAY = "day"
    MONTH = "month"


ENTRY_COLUMN = {
    Scope.ACCOUNT: "account_id",
    Scope.PROJECT: "project_id",
    Scope.KEY: "api_key_id",
    Scope.SESSION: "session_id",
    Scope.RUN: "run_id",
    Scope.BATCH: "batch",
}
"""What entries of a scope have in common."""


@dataclass(frozen=True)
class Cap:
    """What a budget covers."""

    id: int
    account_id: str
    scope: str
    scope_id: str

    def covers(self, whom: Dimensions) -> bool:
        """Whether what is charged to these counts."""
        value = getattr(whom, ENTRY_COLUMN[Scope(self.scope)])
        return whom.account_id == self.account_id and value is not None and str(value) == self.scope_id


@dataclass(frozen=True)
class Budget(Cap):
    """A cap, and where it stands. Amounts are in `money.SCALE`-ths.

    Attributes:
        is_hard: pauses what it covers; a soft one only tells.
        thresholds: per cent of the cap at which it tells.
        spent: the scope's ledger entries since `period_start`: charges, less credits and top-ups.
        held: what accepted operations that are not done may cost at most.
        told_percent: highest threshold told of in this period.
        refused_at: when it last had no room for something that was asked for; None if that is no longer so.
    """

    period: str
    cap: int
    is_hard: bool
    thresholds: Sequence[int]
    period_start: datetime
    spent: int
    held: int
    told_percent: int
    refused_at: datetime | None = None

    @property
    def is_exhausted(self) -> bool:
        """Whether it pauses what it covers."""
        return self.is_hard and self.spent >= self.cap

    @property
    def lacks_room(self) -> bool:
        """Whether it is spent, or lately had no room for something that was asked for."""
        return self.state in (State.PAUSED, State.REFUSING)

    @property
    def name(self) -> str:
        """What to call it where people read it."""
        per = "" if self.period == Period.NONE else f" per {self.period}"
        return f"budget {self.id} ({self.scope} {self.scope_id}: {money.plain(money.from_units(self.cap))}{per})"

    def as_json(self) -> dict[str, Any]:
        """For programs; amounts are decimal strings."""
        amounts = {name: money.plain(money.from_units(getattr(self, name))) for name in ("cap", "spent", "held")}
        kept = {name: getattr(self, name) for name in ("id", "scope", "scope_id", "period", "is_hard")}
        return {**kept, **amounts, "thresholds": list(self.thresholds), "state": str(self.state)}

    @property
    def state(self) -> State:
        """Where it stands."""
        if self.is_exhausted:
            return State.PAUSED
        if self.refused_at is not None:
            return State.REFUSING
        return State.OVER if self.spent >= self.cap else State.OPEN

    def has_room_for(self, units: int) -> bool:
        """Whether this much more may be held."""
        return not self.is_hard or (self.spent < self.cap and self.spent + self.held + units <= self.cap)

    def at(self, now: datetime) -> Budget:
        """The budget at this moment: with nothing spent if a new period has begun."""
        start = start_of_period(self.period, now)
        is_current = start <= self.period_start
        current = self if is_current else replace(self, period_start=start, spent=0, told_percent=0)
        return current if self.was_refused(now, REFUSING_S) else replace(current, refused_at=None)

    def was_refused(self, now: datetime, within_s: float) -> bool:
        """Whether it had no room for something in the last seconds of this period, as far as that is written down."""
        since = max(now - timedelta(seconds=within_s), start_of_period(self.period, now))
        return self.refused_at is not None and self.refused_at > since


def start_of_period(period: str, now: datetime) -> datetime:
    """When the period that this moment lies in has begun."""
    if period == Period.NONE:
        return ALWAYS
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if period == Period.DAY else midnight.replace(day=1)


# ------------------------------------------------------------------------------------------------------ rows


def add(
    tx: Connection,
    account_id: str,
    scope: Scope,
    scope_id: str,
    *,
    cap: int,
    now: datetime,
    period: Period = Period.NONE,
    is_hard: bool = True,
    thresholds: Sequence[int] = THRESHOLDS,
) -> Budget:
    """Add a budget; what its scope has spent in the period counts at once.

    Args:
        scope_id: the account's, project's, key's, session's or run's id, or the batch's name.
        cap: in `money.SCALE`-ths.
    """
    if tx.dialect.name == "postgresql":
        # one at a time is added: budgets are locked in the order of their ids, which has to be that of their commits
        with unhurried(tx):
            tx.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": ADD_LOCK})
        # charges that are being booked are waited for, later ones find the budget
        tx.execute(text("LOCK TABLE ledger_entry IN SHARE MODE"))
    start = start_of_period(period, now)
    values: dict[str, Any] = {
        "account_id": account_id,
        "scope": str(scope),
        "scope_id": scope_id,
        "period": str(period),
        "cap": cap,
        "is_hard": is_hard,
        "thresholds": list(thresholds),
        "period_start": start,
    }
    with unhurried(tx):
        values["spent"] = clamped(_spent_since(tx, account_id, scope, scope_id, start))
    added = insert(_table).values(**values, created_at=now).returning(_table.c.id)
    budget = Budget(id=tx.execute(added).scalar_one(), held=0, told_percent=0, **values)
    told = _told(tx, budget, now)
    _tell_of_pause(tx, replace(budget, is_hard=False), told, now)
    _write(tx, told)
    return told


def set_cap(tx: Connection, account_id: str, budget_id: int, cap: int, *, now: datetime) -> Budget:
    """Change a cap, in `money.SCALE`-ths. Thresholds that are thereby reached are told of.

    Raises:
        RowNotFoundError: the account has no such budget.
    """
    before = _locked(tx, account_id, budget_id, now)
    budget = replace(before, cap=cap, refused_at=None if cap > before.cap else before.refused_at)
    budget = _told(tx, replace(budget, told_percent=min(before.told_percent, _reached(budget))), now)
    values = {"cap": cap} if cap <= before.cap else {"cap": cap, "refused_at": None}
    tx.execute(update(_table).where(_table.c.id == budget_id).values(**values))
    _tell_of_pause(tx, before, budget, now)
    _write(tx, budget)
    return budget


def remove(tx: Connection, account_id: str, budget_id: int, *, now: datetime) -> None:
    """End a budget, and what is held on it.

    Raises:
        RowNotFoundError: the account has no such budget.
    """
    budget = _locked(tx, account_id, budget_id, now)
    if budget.is_exhausted:
        budget_alerts.resumed(tx, account_id, budget.as_json(), now=now)
    tx.execute(delete(_hold).where(_hold.c.budget_id == budget_id))
    tx.execute(update(_table).where(_table.c.id == budget_id).values(removed_at=now, held=0))


def list_budgets(tx: Connection, account_ids: Collection[str] | None, *, now: datetime) -> Sequence[Budget]:
    """The budgets of these accounts, or of all, as they stand now."""
    return [_from_row(row).at(now) for row in tx.execute(_live(account_ids))]


def list_covering(tx: Connection, whom: Dimensions, *, now: datetime) -> Sequence[Budget]:
    """The budgets that count what these are charged, as they stand now."""
    return [_from_row(row).at(now) for row in tx.execute(_live(None).where(_covers_any([whom])))]


def has_any(tx: Connection, account_id: str) -> bool:
    """Whether the account has a budget at all."""
    return bool(tx.execute(select(_live([account_id]).exists())).scalar_one())


def lock(
    tx: Connection, whom: Collection[Dimensions], *, now: datetime, ended: Mapping[int, str] | None = None
) -> Sequence[Budget]:
    """Lock all budgets of these accounts until the transaction ends, so that no two wait for each other.

    Args:
        ended: accounts of operations, by their ids.

    Returns:
        Those that count what these are charged, or hold something for these operations, as they stand now: few,
        however many others their accounts have.
    """
    ended = ended or {}
    account_ids = {one.account_id for one in whom} | set(ended.values())
    if not _lock_all(tx, account_ids):
        return []
    wanted = _covers_any(whom)
    if ended:
        wanted = or_(wanted, _table.c.id.in_(select(_hold.c.budget_id).where(_hold.c.operation_id.in_(list(ended)))))
    concerned = _live(account_ids).where(wanted).with_for_update()  # one that was just added has an id above all others
    return [_begun(tx, _from_row(row), now) for row in tx.execute(concerned).all()]


def begin_periods(database: Database) -> None:
    """Tell of pauses that a new period has ended, where nothing has been charged or accepted since."""
    with database.read() as tx:
        now = database.now(tx)
        over = {one.account_id for one in _spent(tx) if not one.at(now).is_exhausted}
    if over:
        with database.begin() as tx:
            _lock_all(tx, over)
            now = database.now(tx)
            for row in tx.execute(_live(over).where(_WAS_EXHAUSTED).with_for_update()).all():
                _begun(tx, _from_row(row), now)


# ------------------------------------------------------------------------------------------------- spent and held


def book(
    tx: Connection,
    charged: Iterable[tuple[Dimensions, int]],
    *,
    now: datetime,
    ended: Mapping[int, str] | None = None,
) -> Sequence[Budget]:
    """Count entries that were just appended to the ledger, and release the holds of operations that have ended.

    Called after the entries were written: whoever adds a budget meanwhile waits for them.

    Args:
        charged: whom each entry is for, and its amount.
        ended: accounts of operations, by their ids.

    Returns:
        Those of the budgets which that concerns that pause what they cover once this is committed.
    """
    entries, ended = list(charged), ended or {}
    budgets = lock(tx, {whom for whom, _ in entries}, now=now, ended=ended)
    if not budgets:
        return []
    released = _release(tx, list(ended))
    spent = []
    for budget in budgets:
        after = budget
        counted = [units for whom, units in entries if now >= budget.period_start and budget.covers(whom)]
        if counted or budget.id in released:
            held = budget.held - released.get(budget.id, 0)
            after = _told(tx, replace(budget, spent=budget.spent + sum(counted), held=held), now)
            _tell_of_pause(tx, budget, after, now)
            _write(tx, after)
            if sum(counted) < 0:  # there is more room than when something was refused
                tx.execute(update(_table).where(_table.c.id == budget.id).values(refused_at=None))
        if after.is_exhausted:
            spent.append(after)
    return spent


def hold(tx: Connection, budgets: Sequence[Budget], operation_id: int, units: int) -> None:
    """Hold this much on each of these budgets, which are locked, until the operation ends."""
    rows = [{"operation_id": operation_id, "budget_id": budget.id, "amount": units} for budget in budgets]
    tx.execute(insert(_hold), rows)
    for budget in budgets:
        _write(tx, replace(budget, held=budget.held + units))


def note_refused(tx: Connection, budget: Budget, units: int, *, now: datetime) -> None:
    """There was no room for so much: while that goes on the budget says so, and it is told of once."""
    row = tx.execute(_live([budget.account_id]).where(_table.c.id == budget.id).with_for_update()).one_or_none()
    if row is None:
        return
    before = _from_row(row)
    current = before.at(now)
    if current.has_room_for(units) or before.was_refused(now, NOTED_AGAIN_S):
        return  # there is room by now, or it says so already
    tx.execute(update(_table).where(_table.c.id == budget.id).values(refused_at=now))
    if not current.is_exhausted and not before.was_refused(now, TOLD_AGAIN_S):
        budget_alerts.refusing(tx, budget.account_id, current.as_json(), now=now)


def exhausted(tx: Connection, *, now: datetime, among: Collection[Dimensions]) -> Sequence[Budget]:
    """Budgets that pause what they cover, and cover one of these."""
    return [budget for one in _spent(tx, _covers_any(among)) if (budget := one.at(now)).is_exhausted]


def exhausted_caps(tx: Connection, *, now: datetime) -> Sequence[Cap]:
    """All caps that pause what they cover: there may be thousands."""
    columns = [_table.c[name] for name in Cap.__dataclass_fields__]
    return [Cap(*row) for row in tx.execute(select(*columns).where(*exhausted_now(now)))]


def is_any_exhausted(tx: Connection) -> bool:
    """Whether there may be such a budget at all: most often there is none, and that is quickly told."""
    return bool(tx.execute(select(_live(None).where(_WAS_EXHAUSTED).exists())).scalar_one())


def exhausted_scopes(tx: Connection, *, now: datetime) -> Collection[str]:
    """Scopes of which there is such a cap."""
    return set(tx.execute(select(_table.c.scope).where(*exhausted_now(now)).distinct()).scalars())


def exhausted_now(now: datetime) -> Sequence[Any]:
    """Conditions on rows of budgets: they pause what they cover."""
    begun = {period: _table.c.period_start >= start_of_period(period, now) for period in Period}
    current = or_(*(and_(_table.c.period == period, is_current) for period, is_current in begun.items()))
    return _table.c.removed_at.is_(None), _WAS_EXHAUSTED, current


def _lock_all(tx: Connection, account_ids: Collection[str]) -> bool:
    """Lock all budgets of these accounts; whether there are any."""
    return tx.execute(_live(account_ids).with_only_columns(_table.c.id).with_for_update()).first() is not None


def _spent(tx: Connection, *wanted: ColumnElement[bool]) -> Sequence[Budget]:
    """Budgets that were exhausted when they were last written."""
    return [_from_row(row) for row in tx.execute(_live(None).where(_WAS_EXHAUSTED, *wanted))]


def _covers_any(of: Collection[Dimensions]) -> ColumnElement[bool]:
    """The condition that a budget covers one of these, or something of the same name that is another account's."""
    named: dict[Scope, set[str]] = {scope: set() for scope in Scope}
    for whom in of:
        for scope, column in ENTRY_COLUMN.items():
            if (value := getattr(whom, column)) is not None:
                named[scope].add(str(value))
    within = [and_(_table.c.scope == scope, _table.c.scope_id.in_(sorted(ids))) for scope, ids in named.items() if ids]
    return and_(_table.c.account_id.in_(sorted(named[Scope.ACCOUNT])), or_(false(), *within))


def _release(tx: Connection, operation_ids: Sequence[int]) -> Mapping[int, int]:
    """Delete the holds of these operations; returns what was held, by budget."""
    held: dict[int, int] = {}
    if operation_ids:
        gone = delete(_hold).where(_hold.c.operation_id.in_(operation_ids)).returning(_hold.c.budget_id, _hold.c.amount)
        for budget_id, units in tx.execute(gone):
            held[budget_id] = held.get(budget_id, 0) + units
    return held


def _write(tx: Connection, budget: Budget) -> None:
    names = ("period_start", "told_percent")
    values = {name: getattr(budget, name) for name in names}
    values |= {"spent": clamped(budget.spent), "held": clamped(budget.held)}
    tx.execute(update(_table).where(_table.c.id == budget.id).values(**values))


def _begun(tx: Connection, budget: Budget, now: datetime) -> Budget:
    """A locked budget as it stands now; if a new period has ended its pause, that is told."""
    current = budget.at(now)
    if budget.is_exhausted and not current.is_exhausted:
        _tell_of_pause(tx, budget, current, now)
        _write(tx, current)
    return current


def _tell_of_pause(tx: Connection, before: Budget, after: Budget, now: datetime) -> None:
    if before.is_exhausted != after.is_exhausted:
        tell = budget_alerts.paused if after.is_exhausted else budget_alerts.resumed
        tell(tx, after.account_id, after.as_json(), now=now)


def _told(tx: Connection, budget: Budget, now: datetime) -> Budget:
    """Tell of the highest threshold that is reached and was not told of in this period."""
    reached = _reached(budget)
    if reached <= budget.told_percent:
        return budget
    budget_alerts.threshold_reached(tx, budget.account_id, budget.as_json(), reached, now=now)
    return replace(budget, told_percent=reached)


def _reached(budget: Budget) -> int:
    """The highest threshold that is reached, in per cent."""
    percent = _percent(budget)
    return max((one for one in budget.thresholds if one <= percent), default=0)


def clamped(units: int) -> int:
    """As near as a row can say it: beyond `money.UNITS_MAX` a budget is exhausted, whatever its cap."""
    return max(-money.UNITS_MAX, min(money.UNITS_MAX, units))


def _percent(budget: Budget) -> int:
    """How much of the cap is spent, in whole per cent."""
    if budget.spent <= 0 and budget.cap > 0:
        return 0
    return 100 * budget.spent // budget.cap if budget.cap > 0 else 100


def _spent_since(tx: Connection, account_id: str, scope: Scope, scope_id: str, start: datetime) -> int:
    if scope is Scope.ACCOUNT and start == ALWAYS:
        return owed.units(tx, account_id)
    column = _entry.c[ENTRY_COLUMN[scope]]
    value: str | int = int(scope_id) if scope is Scope.KEY else scope_id
    whose = rows.without_index(_entry.c.account_id) if scope is Scope.RUN else _entry.c.account_id
    query = select(*money.sum_columns(_entry.c.amount)).where(whose == account_id, column == value)
    high, low = tx.execute(query.where(_entry.c.created_at >= start)).one()
    return money.sum_of(high, low)


def _locked(tx: Connection, account_id: str, budget_id: int, now: datetime) -> Budget:
    row = tx.execute(_live([account_id]).where(_table.c.id == budget_id).with_for_update()).one_or_none()
    if row is None:
        raise RowNotFoundError("budget", str(budget_id))
    return _begun(tx, _from_row(row), now)


def _live(account_ids: Collection[str] | None) -> Any:
    columns = [_table.c[name] for name in Budget.__dataclass_fields__]
    query = select(*columns).where(_table.c.removed_at.is_(None)).order_by(_table.c.id)
    return query if account_ids is None else query.where(_table.c.account_id.in_(sorted(account_ids)))


def _from_row(row: Any) -> Budget:
    return Budget(**row._mapping)
