"""Every guard there is, in the order of an operation's life, and the tests that miss it; budgets and processes have
their own files.

The text to be replaced is chosen short and stable. A guard with others behind it is taken away together with them, or
no test could tell; where that is so, it says which.
"""

from __future__ import annotations

from tests.mutations.guard import Change, Guard
from tests.mutations.guards_of_budgets import BUDGETS, EXPORTS, REFUSALS, WEBHOOKS
from tests.mutations.guards_of_processes import FORKS

_FIRST_TABLES = "storage/migrations/versions/0001_first_tables.py"
_BILL_TABLES = "storage/migrations/versions/0004_the_bill.py"
_LEASES = "tests/contracts/test_leases.py"
_JOURNAL = "tests/contracts/test_journal.py"
_OBJECTS = "tests/contracts/test_objects_of_rows.py"
_COMMIT = "tests/worker/test_commit.py"
_DEATHS = "tests/contracts/test_deaths.py"
_METERING = "tests/contracts/test_storage_metering.py"
_LOOP = "tests/worker/test_loop.py"
_RECONCILIATION = "tests/contracts/test_reconciliation.py"
_SWEEPER = "tests/jobs/test_sweeper.py"
_BILL = "tests/properties/test_journal_machine.py::test_no_history_moves_the_bill_by_a_unit_of_the_last_digit"

ACCEPTING = (
    Guard(
        "the dedupe key",
        "a repeated submission would be executed twice",
        (
            Change("storage/rows.py", ".on_conflict_do_nothing()", ""),
            Change(_FIRST_TABLES, 'sa.UniqueConstraint("request_id", name=op.f("uq_operation_request_id")),', ""),
            Change(_FIRST_TABLES, 'sa.UniqueConstraint("run_id", "seq", name=op.f("uq_operation_run_id_seq")),', ""),
        ),
        (f"{_JOURNAL}::test_the_same_seq_again_gives_the_first_request_id_and_changes_nothing",),
    ),
    Guard(
        "the upload row",
        "what a writer put before it died would lie in the object store for ever",
        (
            Change("storage/payloads.py", "uploads.announce(tx, key, now=now, expires_at=expires_at)", "pass"),
            Change(
                "storage/uploads.py",
                "        .values(state=REFERENCED, size_bytes=size_bytes, sha256=sha256, expires_at=None)\n    )",
                "        .values(state=REFERENCED, size_bytes=size_bytes, sha256=sha256, expires_at=None)\n    )\n"
                "    if changed.rowcount != 1:\n"
                "        known = {'key': key, 'state': REFERENCED, 'size_bytes': size_bytes}\n"
                "        changed = tx.execute(insert(row).values(**known, created_at=datetime.fromtimestamp(0, UTC)))",
            ),
            Change("storage/uploads.py", "from datetime import datetime", "from datetime import UTC, datetime"),
        ),
        ("tests/storage/test_sweeper.py::test_an_upload_that_was_never_named_is_deleted_after_its_expiry",),
    ),
    Guard(
        "the announcement before the put",
        "a writer that is killed between the two would leave an object that nobody knows of",
        (
            Change(
                "storage/payloads.py",
                "        begun = time.monotonic()\n",
                "        begun = time.monotonic()\n        yield\n",
            ),
            Change("storage/payloads.py", "UPLOAD_ANNOUNCED)\n        yield\n", "UPLOAD_ANNOUNCED)\n"),
        ),
        ("tests/storage/test_payloads.py::test_an_object_is_announced_before_it_is_put",),
    ),
    Guard(
        "the removal of what was put too late",
        "what a writer put after a long pause would lie in the object store for ever",
        (Change("storage/payloads.py", "if not awaited:", "if False:"),),
        (
            "tests/storage/test_sweeper.py"
            "::test_an_object_that_is_put_after_its_announcement_was_swept_away_is_removed_again",
        ),
    ),
    Guard(
        "the refusal of a late name",
        "a row would name an object that the sweeper has deleted",
        (Change("storage/uploads.py", "raise UploadGoneError(key)", "return"),),
        (
            "tests/storage/test_payloads.py::test_an_object_named_in_time_stays_and_a_late_name_is_refused",
            f"{_OBJECTS}::test_a_snapshot_whose_object_was_swept_away_is_not_named",
        ),
    ),
)

ORDER = (
    Guard(
        "the order of a run's operations",
        "an operation would take effect before one that was numbered before it",
        (Change("storage/journal.py", " if op.seq == place]", "]"),),
        (f"{_JOURNAL}::test_the_next_in_order_end_before_the_first_gap",),
    ),
    Guard(
        "the closing of gaps",
        "operations behind a `seq` that never arrives would wait for ever",
        (Change("jobs/sweeper.py", "if journal.close_gap(", "if False and journal.close_gap("),),
        (f"{_SWEEPER}::test_a_seq_that_never_arrives_is_closed_after_the_timeout_and_its_waiter_is_told",),
    ),
    Guard(
        "the numbers of failures",
        "a step submitted before a failure was known would step on half of its gradients",
        (
            Change(
                "storage/journal.py",
                "values(num_failures=run.c.num_failures + 1)",
                "values(num_failures=run.c.num_failures)",
            ),
        ),
        (
            f"{_JOURNAL}::test_failures_of_gradients_are_numbered_and_later_operations_know_how_many_there_were",
            f"{_LOOP}::test_a_step_submitted_before_a_failure_of_an_earlier_turn_fails",
        ),
    ),
    Guard(
        "the order of gradients",
        "sums of merged operations would differ in their last bits from those of a replay",
        (
            Change(
                "worker/engine/trainer.py",
                "in zip(requests, operations, strict=True):\n            gradients:",
                "in reversed(list(zip(requests, operations, strict=True))):\n            gradients:",
            ),
        ),
        ("tests/numerics/test_company.py::test_operations_of_one_run_merged_in_one_call_equal_separate_calls",),
    ),
)

FENCES = (
    Guard(
        "the epoch check of commits",
        "a worker that lost its lease would advance the run beside its successor",
        (
            Change(
                "storage/leases.py",
                "    held = update(_run).where(",
                "    held = update(_run).where(_run.c.id == lease.run_id)\n    _ = update(_run).where(",
            ),
            Change(
                "storage/leases.py",
                "if (row.lease_epoch, row.lease_worker) != (lease.epoch, lease.worker_id):",
                "if False:",
            ),
        ),
        (
            f"{_COMMIT}::test_a_run_whose_lease_was_lost_is_left_out_whole_and_the_others_are_committed",
            f"{_LEASES}::test_only_the_current_epoch_advances_the_run",
        ),
    ),
    Guard(
        "the epoch check of snapshots",
        "a worker that lost its lease would name a state that the journal does not lead to",
        (Change("storage/snapshots.py", "if not leases.is_held(tx, lease):", "if False:"),),
        (
            "tests/worker/test_writeback.py::test_a_snapshot_of_a_lost_lease_is_never_named",
            f"{_OBJECTS}::test_a_snapshot_of_a_lost_lease_is_not_named",
        ),
    ),
    Guard(
        "the epoch check of renewals",
        "a worker that lost its lease would keep its successor's alive, and go on in vain",
        (
            Change(
                "storage/leases.py",
                "        mine = update(_run).where(",
                "        mine = update(_run).where(_run.c.id == lease.run_id)\n        _ = update(_run).where(",
            ),
        ),
        (f"{_LEASES}::test_a_renewed_lease_lasts_longer_and_a_lost_one_is_told",),
    ),
    Guard(
        "the claim check",
        "two workers would complete one sample, or one that was cancelled",
        (
            Change(
                "storage/claims.py",
                "values(claim_expires_at=None)).rowcount != 1:",
                "values(claim_expires_at=None)) is None:",
            ),
        ),
        (
            f"{_COMMIT}::test_a_sample_whose_claim_was_lost_is_discarded_with_its_usage",
            f"{_COMMIT}::test_a_cancelled_sample_is_discarded_with_its_usage",
            f"{_JOURNAL}::test_an_expired_claim_goes_to_another_attempt_and_the_first_is_lost",
        ),
    ),
)

BILLING = (
    Guard(
        "the unique usage constraint",
        "nothing in the database would refuse a second bill",
        (
            Change(
                _FIRST_TABLES,
                'sa.UniqueConstraint("operation_id", name=op.f("uq_usage_record_operation_id")),',
                "",
            ),
        ),
        ("tests/contracts/test_database.py::test_an_operation_has_one_usage_record",),
    ),
    Guard(
        "the unique usage constraint and all that stands before it",
        "a commit whose answer was lost would bill twice",
        (
            Change(
                _FIRST_TABLES,
                'sa.UniqueConstraint("operation_id", name=op.f("uq_usage_record_operation_id")),',
                "",
            ),
            Change(_BILL_TABLES, 'sa.UniqueConstraint("operation_id", name=op.f("uq_ledger_entry_operation_id")),', ""),
            Change(_BILL_TABLES, 'sa.UniqueConstraint("source", name=op.f("uq_ledger_entry_source")),', ""),
            Change("worker/commit.py", "if leases.committed_seq(tx, commit.lease) >= commit.state_seq:", "if False:"),
            Change(
                "storage/journal.py",
                "return update(table).where(table.c.id == operation_id, table.c.status.in_(OPEN))",
                "return update(table).where(table.c.id == operation_id)",
            ),
        ),
        (f"{_COMMIT}::test_a_commit_of_unknown_outcome_bills_once",),
    ),
    Guard(
        "the read back of a commit of unknown outcome",
        "a worker would execute again what it has committed",
        (Change("worker/commit.py", "if leases.committed_seq(tx, commit.lease) >= commit.state_seq:", "if False:"),),
        (f"{_COMMIT}::test_a_commit_of_unknown_outcome_bills_once",),
    ),
    Guard(
        "the read back of a sample's commit",
        "a sample that was committed and billed would be counted as discarded",
        (Change("worker/commit.py", "if decided and", "if False and"),),
        (f"{_COMMIT}::test_a_samples_commit_of_unknown_outcome_bills_once",),
    ),
    Guard(
        "the remainder of a step's time",
        "nanoseconds of a step would be nobody's",
        (Change("billing/metering.py", "[:left]:", "[:0]:"),),
        ("tests/billing/test_metering.py::test_shares_are_whole_and_add_up_exactly",),
    ),
    Guard(
        "the charge of every operation",
        "an operation of a turn would be free",
        (
            Change(
                "billing/charging.py",
                "[entry_for(row, cards[row.account_id]) for row in self._rows]",
                "[entry_for(row, cards[row.account_id]) for row in self._rows[1:]]",
            ),
        ),
        (_BILL,),
    ),
    Guard(
        "the fence before the bill",
        "what a worker has computed in vain, or again, would be billed",
        (
            Change(
                "worker/commit.py",
                "        if leases.committed_seq(tx, commit.lease) >= commit.state_seq:",
                "        whom = {'session_id': commit.run.session_id, 'run_id': commit.run.id}\n"
                "        for done in commit.done:\n"
                "            bill.add(done.usage, done.operation, **whom)\n"
                "        if leases.committed_seq(tx, commit.lease) >= commit.state_seq:",
            ),
            Change("worker/commit.py", "            elif done.usage is not None:\n", "            elif False:\n"),
        ),
        (f"{_COMMIT}::test_a_run_whose_lease_was_lost_is_left_out_whole_and_the_others_are_committed",),
    ),
    Guard(
        "amounts that are integers",
        "large amounts would lose their last digits",
        (
            Change(
                "billing/money.py",
                "units = int(round_charge(amount).scaleb(SCALE_DIGITS, context=_EXACT))",
                "units = float(round_charge(amount).scaleb(SCALE_DIGITS, context=_EXACT))",
            ),
        ),
        ("tests/billing/test_money.py::test_a_rounded_amount_is_stored_without_loss",),
    ),
    Guard(
        "the entry of a rounding",
        "what rounding to cents gives or takes would be in no sum",
        (Change("billing/issuing.py", "ledger.append(tx, [_rounding(", "(lambda *_, **__: None)(tx, [_rounding("),),
        (_BILL,),
    ),
    Guard(
        "the end of a checkpoint's span",
        "a checkpoint would be charged for ever after it was deleted",
        (Change("storage/checkpoints.py", "storage_spans.end(tx, row.id, at=now)", "pass"),),
        (
            "tests/contracts/test_storage_spans.py::"
            "test_a_span_begins_with_its_checkpoint_and_ends_when_that_is_deleted",
            f"{_METERING}::test_what_is_deleted_within_an_hour_is_charged_until_then",
        ),
    ),
    Guard(
        "one row per run and hour of storage",
        "an hour that two workers meter would be charged twice",
        (
            Change("billing/storage_metering.py", ".on_conflict_do_nothing()", ""),
            Change(
                _BILL_TABLES,
                'sa.UniqueConstraint("hour", "run_id", "kind", name=op.f("uq_storage_usage_hour_run_id_kind")),',
                "",
            ),
        ),
        (f"{_METERING}::test_metering_twice_is_metering_once",),
    ),
    Guard(
        "the card of the hour",
        "storage that is metered late would be charged at prices that came after it",
        (
            Change(
                "billing/storage_metering.py",
                "rate_cards.in_force(tx, account_id, at=hour)",
                "rate_cards.in_force(tx, account_id, at=now)",
            ),
        ),
        (f"{_METERING}::test_an_hour_is_priced_by_the_card_in_force_when_it_began",),
    ),
)

RECONCILING = (
    Guard(
        "the record before",
        "a worker that has run well for long could lose what it does for days before anybody is told",
        (Change("billing/reconciliation.py", "balance.since(before.get(id_, zero)) for id_,", "balance for id_,"),),
        (f"{_RECONCILIATION}::test_a_fault_is_seen_within_the_hour_and_told_once_however_long_all_was_well",),
    ),
    Guard(
        "workers that were hardly busy",
        "what they have lost would be told again every hour",
        (
            Change(
                "billing/reconciliation.py",
                "[*until, *(standing[balance.worker_id] for balance in short)]",
                "until",
            ),
        ),
        (f"{_RECONCILIATION}::test_what_was_done_shortly_is_kept_until_there_is_enough_to_tell",),
    ),
    Guard(
        "workers that run and do little",
        "what one of them loses would be lost among what others do",
        (
            Change(
                "billing/reconciliation.py",
                "for balance in short if balance.worker_id in stopped]",
                "for balance in short]",
            ),
        ),
        (f"{_RECONCILIATION}::test_a_worker_that_does_little_is_not_hidden_by_others_that_do",),
    ),
)

RECOVERY = (
    Guard(
        "the replay",
        "what was committed after the snapshot would be missing from the state",
        (
            Change(
                "worker/loop.py",
                "if replay.is_done:\n            self._admit(replay)\n        else:",
                "self._admit(replay)\n        if False:",
            ),
        ),
        (f"{_LOOP}::test_a_damaged_snapshot_is_passed_over_for_the_one_before_it",),
    ),
    Guard(
        "the checksum",
        "a damaged snapshot would be trained on",
        (Change("storage/snapshots.py", "if running.hexdigest() != snapshot.sha256:", "if False:"),),
        ("tests/worker/test_writeback.py::test_damage_is_found_at_the_latest_when_everything_is_read",),
    ),
    Guard(
        "the checksum of other objects",
        "damaged weights or data would be computed on",
        (Change("storage/payloads.py", "if expected is not None and checksum(data) != expected:", "if False:"),),
        ("tests/storage/test_payloads.py::test_an_object_is_held_against_the_checksum_it_was_named_with",),
    ),
    Guard(
        "the second snapshot",
        "a damaged one would cost the run",
        (Change("storage/snapshots.py", "KEPT = 2", "KEPT = 1"),),
        (f"{_OBJECTS}::test_the_two_newest_snapshots_are_kept_and_older_ones_released",),
    ),
    Guard(
        "the second snapshot's payloads",
        "from the second snapshot nothing could be replayed",
        (Change("storage/journal.py", ".offset(1)", ".offset(0)"),),
        (
            f"{_JOURNAL}::test_outcomes_up_to_the_second_newest_snapshot_are_forgotten_and_the_replay_tail_stays",
            f"{_JOURNAL}::test_a_run_with_one_snapshot_keeps_everything",
        ),
    ),
)

REMINDERS = (
    Guard(
        "the sweeper of stalled work",
        "a run whose message was lost would wait for ever",
        (Change("jobs/sweeper.py", "stalled_ids = [name for name in due if name != SAMPLES]", "stalled_ids = []"),),
        (
            f"{_SWEEPER}::test_work_that_nobody_took_is_announced_again",
            f"{_SWEEPER}::test_work_of_a_dead_worker_is_announced_at_once_however_long_it_had_waited",
        ),
    ),
    Guard(
        "the sweeper of samples",
        "samples that a dead worker had claimed would wait for ever",
        (Change("jobs/sweeper.py", "released = claims.release_claims(tx, now=now)", "released = 0"),),
        (f"{_SWEEPER}::test_samples_of_a_worker_that_is_gone_are_put_back_and_announced",),
    ),
    Guard(
        "the notification's safety read",
        "a poll whose notification was lost would wait until its client gives up",
        (
            Change(
                "jobs/results.py",
                "self.wake(await asyncio.to_thread(self._find_finished, list(self._events)))",
                "await asyncio.sleep(0)",
            ),
        ),
        ("tests/jobs/test_results.py::test_a_lost_notification_is_covered_by_the_safety_read",),
    ),
)

DEATHS = (
    Guard(
        "the bound on deaths",
        "an operation that ends its worker would end one after the other for ever",
        (Change("storage/suspects.py", "return blame > 0 and sum(", "return False and sum("),),
        (f"{_DEATHS}::test_only_so_many_deaths_alone_condemn_an_operation",),
    ),
    Guard(
        "the innocence of those in company",
        "an operation would fail for deaths that its neighbours caused",
        (Change("storage/suspects.py", "case((table.alone, UNIT[cause]), else_=0)", "UNIT[cause]"),),
        (f"{_DEATHS}::test_deaths_in_company_condemn_nobody",),
    ),
    Guard(
        "the blame of a replay",
        "a run whose replay ends its worker would end one after the other for ever",
        (
            Change(
                "storage/deaths.py",
                "replays.note_end(tx, runs, Cause.STOPPED if num_training else cause)",
                "[]",
            ),
        ),
        (f"{_DEATHS}::test_only_so_many_deaths_condemn_a_replay",),
    ),
    Guard(
        "the write-down of a holder alone",
        "a zombie would be held against operations that another worker executes",
        (Change("storage/journal.py", "table.c.status.in_(OPEN), held)", "table.c.status.in_(OPEN))"),),
        (f"{_DEATHS}::test_a_worker_that_lost_its_lease_does_not_write_itself_down",),
    ),
    Guard(
        "the watchdog",
        "a step that never ends would hold its worker and its runs for ever",
        (
            Change(
                "worker/watchdog.py",
                "left_s = self._deadline_s - self._engine.stuck_s",
                "left_s = self._deadline_s",
            ),
        ),
        ("tests/worker/test_watchdog.py::test_a_step_past_its_deadline_ends_the_worker_which_says_so",),
    ),
    Guard(
        "the end of renewals of a worker that is stuck",
        "a worker that hangs where no watchdog reaches would keep its runs",
        (Change("worker/keeper.py", "if self._engine.stuck_s > self._settings.step_deadline_s:", "if False:"),),
        ("tests/worker/test_keeper.py::test_a_step_past_its_deadline_ends_the_renewals",),
    ),
)

GUARDS = (
    *ACCEPTING,
    *ORDER,
    *FENCES,
    *BILLING,
    *RECONCILING,
    *BUDGETS,
    *REFUSALS,
    *WEBHOOKS,
    *EXPORTS,
    *RECOVERY,
    *REMINDERS,
    *DEATHS,
    *FORKS,
)
