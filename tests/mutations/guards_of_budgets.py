"""Guards of budgets and of what they tell, and of whoever else is told what happens to the bill."""

from __future__ import annotations

from tests.mutations.guard import Change, Guard

_BILL_TABLES = "storage/migrations/versions/0004_the_bill.py"
_BUDGETS = "tests/contracts/test_budgets.py"
_PAUSES = "tests/contracts/test_pauses.py"
_ALERTS = "tests/contracts/test_budget_alerts.py"
_WEBHOOKS = "tests/contracts/test_webhooks.py"
_EVENTS = "tests/contracts/test_cloud_events.py"
_EXPORTS = "tests/contracts/test_exports.py"
_HELD = f"{_BUDGETS}::test_holds_are_placed_until_a_cap_has_no_room_and_released_when_the_operation_ends"
_CONCERNED = f"{_BUDGETS}::test_of_all_budgets_only_those_that_are_concerned_are_read"
_SIGNED = f"{_WEBHOOKS}::test_an_event_is_delivered_once_signed_so_that_anyone_can_verify_it"
_HARMLESS = f"{_WEBHOOKS}::test_slow_dead_and_redirecting_receivers_harm_no_other"
_FEEDER = "tests/worker/test_sample_feeder.py"
_CLAIMED = f"{_FEEDER}::test_what_is_claimed_when_a_cap_is_spent_waits_for_room_and_holds_up_nobody_else"
_COVERED = f"{_PAUSES}::test_a_spent_cap_pauses_the_runs_and_samples_of_its_scope_and_no_others"

BUDGETS = (
    Guard(
        "what was spent before a budget",
        "a budget that is added late would let a scope spend its cap once more",
        (
            Change(
                "billing/budgets.py",
                'values["spent"] = clamped(_spent_since(tx, account_id, scope, scope_id, start))',
                'values["spent"] = 0',
            ),
        ),
        (f"{_BUDGETS}::test_a_budget_that_is_added_late_counts_what_was_spent_before",),
    ),
    Guard(
        "the scope of a budget",
        "what one scope spends would count on the budgets of others",
        (
            Change(
                "billing/budgets.py",
                "return whom.account_id == self.account_id and value is not None and str(value) == self.scope_id",
                "return whom.account_id == self.account_id",
            ),
        ),
        (f"{_BUDGETS}::test_what_a_scope_spends_counts_on_its_budgets_and_on_no_others", _COVERED),
    ),
    Guard(
        "names that other accounts use, too",
        "what is held for one account's batch would be held on another's budget",
        (
            Change(
                "billing/budgets.py",
                "return and_(_table.c.account_id.in_(sorted(named[Scope.ACCOUNT])), or_(false(), *within))",
                "return or_(false(), *within)",
            ),
        ),
        (_CONCERNED,),
    ),
    Guard(
        "what is held for operations that end",
        "an operation that fails would hold what it might have cost for ever",
        (Change("billing/budgets.py", "    if ended:\n        wanted = or_", "    if False:\n        wanted = or_"),),
        (_CONCERNED,),
    ),
    Guard(
        "the period of a budget",
        "what was spent in one period would pause all later ones",
        (Change("billing/budgets.py", "start = start_of_period(self.period, now)", "start = self.period_start"),),
        (f"{_BUDGETS}::test_a_period_begins_anew_by_itself",),
    ),
    Guard(
        "the period of a charge",
        "a charge that comes late would count on a period that it is not of",
        (Change("billing/budgets.py", "if now >= budget.period_start and ", "if "),),
        (f"{_BUDGETS}::test_a_charge_of_the_period_before_that_comes_late_does_not_count",),
    ),
    Guard(
        "what is held",
        "much more would be accepted than a cap has room for",
        (Change("billing/budgets.py", "self.spent + self.held + units <=", "self.spent + units <="),),
        (
            _HELD,
            "tests/jobs/test_caps.py::test_what_is_accepted_is_held_once_and_again_gives_the_same_id_over_the_cap",
        ),
    ),
    Guard(
        "the end of a spent cap's room",
        "what costs nothing would be accepted where all else waits",
        (Change("billing/budgets.py", "(self.spent < self.cap and self.spent", "(self.spent"),),
        (f"{_BUDGETS}::test_once_a_cap_is_spent_not_even_what_costs_nothing_is_accepted",),
    ),
    Guard(
        "the release of a hold",
        "what has ended would take room from its caps for ever",
        (Change("billing/budgets.py", "released = _release(tx, list(ended))", "released = dict[int, int]()"),),
        (_HELD,),
    ),
    Guard(
        "the release of what failed",
        "an operation that fails would take room from its caps for ever",
        (Change("billing/charging.py", "self._ended[operation.id] = operation.account_id", "pass"),),
        (_HELD,),
    ),
    Guard(
        "the release of holds that are left over",
        "a hold that nothing has released would take room from its caps for ever",
        (Change("billing/budget_checks.py", "budgets.book(tx, [], now=database.now(tx), ended=ended)", "return 1"),),
        (
            "tests/contracts/test_budget_checks.py::test_what_is_held_for_an_operation_that_has_ended_is_found_and_released",
        ),
    ),
    Guard(
        "the pause of what was accepted",
        "a run would go on over its cap with all that was accepted before",
        (
            Change(
                "worker/train_turn.py",
                "paused = pauses.paused_runs(tx, costly, now=now) if costly else {}",
                "paused: Mapping[str, Budget] = {}",
            ),
        ),
        ("tests/worker/test_loop.py::test_what_a_cap_has_no_more_room_for_is_not_begun_and_goes_on_when_there_is",),
    ),
    Guard(
        "the pause of takeovers",
        "workers would fetch the states of runs that may not go on",
        (Change("worker/intake.py", " or bool(pauses.waiting_runs(tx, [run_id], now=now))", ""),),
        ("tests/worker/test_intake.py::test_a_run_that_a_cap_pauses_is_left_alone_until_there_is_room",),
    ),
    Guard(
        "the pause of samples",
        "samples would be drawn over a cap that is spent",
        (
            Change(
                "billing/pauses.py",
                "    if not scopes:\n        return None",
                "    if scopes or not scopes:\n        return None",
            ),
        ),
        (
            "tests/worker/test_sample_feeder.py::test_samples_that_a_cap_pauses_are_not_claimed_until_there_is_room",
            _COVERED,
        ),
    ),
    Guard(
        "the pause of claimed samples",
        "a worker would draw hundreds of samples over a cap that is spent after it has claimed them",
        (
            Change(
                "worker/sample_turn.py", "if self.caps.pause(claimed.payer) and self._is_waiting(claimed)]", "if False]"
            ),
        ),
        (_CLAIMED, f"{_FEEDER}::test_a_worker_without_room_sees_that_others_have_spent_a_cap"),
    ),
    Guard(
        "the samples that are being drawn when a cap is spent",
        "what they have used would be lost, and drawn again",
        (
            Change(
                "worker/sample_turn.py",
                "return claimed in self._suspects or work.model.sampler.is_waiting(request_id)",
                "return True",
            ),
        ),
        (_CLAIMED, f"{_FEEDER}::test_a_worker_without_room_sees_that_others_have_spent_a_cap"),
    ),
    Guard(
        "what a commit tells of spent caps",
        "all that a worker has claimed could begin until it reads the caps again",
        (Change("worker/commit.py", "            self.on_spent(spent)", "            pass"),),
        (_CLAIMED, "tests/worker/test_commit.py::test_a_commit_tells_which_caps_of_its_accounts_are_spent"),
    ),
    Guard(
        "the look at caps without room for more",
        "a worker that has claimed all it may would not see what others spend",
        (
            Change(
                "worker/sample_feeder.py",
                "if room <= 0 and time.monotonic() < self._looked_at + POLL_S:",
                "if room <= 0:",
            ),
        ),
        (f"{_FEEDER}::test_a_worker_without_room_sees_that_others_have_spent_a_cap",),
    ),
    Guard(
        "what a commit tells while caps are read",
        "a cap would be taken for open by what was read before it was spent",
        (Change("worker/spent_caps.py", "self._by_id() if self._num_told != since else {}", "{}"),),
        ("tests/worker/test_spent_caps.py::test_what_a_commit_tells_while_others_are_read_is_not_forgotten",),
    ),
    Guard(
        "the claim of what is given back",
        "a worker could put back what is being drawn under a later claim",
        (Change("storage/claims.py", "tuple_(table.id, table.attempts).in_(claimed)", "table.id.in_(dict(claimed))"),),
        ("tests/contracts/test_journal.py::test_a_claim_that_does_not_stand_any_more_is_not_given_back",),
    ),
    Guard(
        "the claims that cannot be given back",
        "they would expire while the database is away, as if a worker had died with them",
        (
            Change(
                "worker/sample_turn.py",
                "{operation.id: operation for operation in [*self._withheld, *held]}",
                "{operation.id: operation for operation in held}",
            ),
        ),
        (f"{_FEEDER}::test_claims_that_cannot_be_given_back_are_kept_until_they_can",),
    ),
    Guard(
        "the places of paused accounts",
        "an account that waits for money would take others' places in every claim",
        (
            Change(
                "storage/claims.py", ".where(_any(among)).limit(1).correlate(account)", ".limit(1).correlate(account)"
            ),
        ),
        ("tests/contracts/test_pauses.py::test_a_paused_account_takes_no_place_from_others",),
    ),
    Guard(
        "the end of asking again",
        "a place that its client has given up under a cap would block its run for ever",
        (
            Change(
                "storage/runs.py",
                'if refused_before(tx, run_id, seq, now=now) is None:\n        values = {"budget_refused_seq": seq,',
                'if True:\n        values = {"budget_refused_seq": refused_before(tx, run_id, seq, now=now) or seq,',
            ),
        ),
        ("tests/jobs/test_caps.py::test_what_a_client_has_given_up_keeps_nothing_behind_it_waiting",),
    ),
    Guard(
        "the hold of what failed at once",
        "a hold that nothing releases would shrink its cap for good",
        (Change("jobs/caps.py", "    if operation.status in FINAL:", "    if False:"),),
        ("tests/jobs/test_caps.py::test_nothing_is_held_for_what_follows_in_a_run_that_was_never_made",),
    ),
    Guard(
        "the look before the put",
        "every refusal of a large payload would leave it in the object store for a day",
        (Change("jobs/submit.py", "            if _stillborn(creation) is None:\n", "            if body is None:\n"),),
        ("tests/jobs/test_caps.py::test_refusals_of_a_large_payload_leave_no_object",),
    ),
    Guard(
        "the failures before a pause",
        "a paused run with a failure at its head would be taken over again and again",
        (
            Change(
                "worker/train_turn.py",
                "                plan.cut_what_is_begun()\n",
                "                plan.taken.clear()\n",
            ),
        ),
        ("tests/worker/test_loop.py::test_a_paused_run_gets_past_what_has_failed_and_is_left_alone_then",),
    ),
    Guard(
        "the silence about what is paused",
        "runs that may not go on would be announced over and over",
        (Change("jobs/sweeper.py", "if run.id not in paused", "if run.id"),),
        ("tests/jobs/test_caps.py::test_a_paused_run_is_not_announced_until_there_is_room",),
    ),
    Guard(
        "the way out of a pause",
        "a run over its cap could not even save its weights",
        (Change("billing/pauses.py", "operation.kind.in_(COSTLY), ", ""),),
        (f"{_PAUSES}::test_a_paused_run_may_save_its_weights",),
    ),
)

WEBHOOKS = (
    Guard(
        "the alert in the transaction that reaches a threshold",
        "a crash would lose it, or one would be told of what was rolled back",
        (Change("billing/budget_alerts.py", "    webhooks.announce(\n", "    (lambda *_, **__: None)(\n"),),
        (
            f"{_ALERTS}::test_a_threshold_is_told_of_once_with_what_a_receiver_needs",
            f"{_ALERTS}::test_what_is_rolled_back_is_not_told_and_told_when_it_is_done_again",
        ),
    ),
    Guard(
        "the memory of thresholds",
        "every charge beyond a threshold would be told of",
        (Change("billing/budgets.py", "if reached <= budget.told_percent:", "if not reached:"),),
        (
            f"{_ALERTS}::test_a_threshold_is_told_of_once_with_what_a_receiver_needs",
            f"{_BUDGETS}::test_each_threshold_is_told_of_once_in_a_period",
        ),
    ),
    Guard(
        "the log after the commit",
        "the log would tell of thresholds that were not reached",
        (Change("billing/budget_alerts.py", "after_commit(tx, lambda: say(event, **fields))", "say(event, **fields)"),),
        (f"{_BUDGETS}::test_a_threshold_is_not_logged_where_what_reached_it_is_rolled_back",),
    ),
    Guard(
        "one delivery of an event",
        "whatever is announced again would be sent again",
        (
            Change("storage/rows.py", ".on_conflict_do_nothing()", ""),
            Change(
                _BILL_TABLES,
                'sa.UniqueConstraint("webhook_id", "event_id", name=op.f("uq_webhook_delivery_webhook_id_event_id")),',
                "",
            ),
        ),
        (_SIGNED,),
    ),
    Guard(
        "the signature of id, time and body",
        "a message could be changed, or sent again by someone else, and pass for ours",
        (
            Change(
                "billing/webhooks.py",
                'signed = f"{message_id}.{timestamp}.{attempt.body}".encode()',
                "signed = attempt.body.encode()",
            ),
        ),
        (
            _SIGNED,
            f"{_WEBHOOKS}::test_the_receiver_of_the_documentation_takes_what_is_ours_and_nothing_else",
        ),
    ),
    Guard(
        "the claim of an attempt",
        "two processes would send the same attempt",
        (Change("billing/webhooks.py", "next_at=now + timedelta(seconds=CLAIM_S)", "next_at=now"),),
        (f"{_WEBHOOKS}::test_what_is_being_sent_is_not_sent_by_another_process_as_well",),
    ),
    Guard(
        "the number of an attempt",
        "what came of one that was taken for dead would be held to be another's",
        (Change("billing/webhooks.py", " _delivery.c.attempts == attempt.number,", ""),),
        (f"{_WEBHOOKS}::test_no_transaction_is_open_while_sending",),
    ),
    Guard(
        "the last attempt",
        "a receiver that is gone would be sent messages for ever",
        (
            Change("billing/webhooks.py", "elif attempt.number >= ATTEMPTS_MAX:", "elif False:"),
            Change("billing/webhooks.py", "if row.attempts < ATTEMPTS_MAX]", "if True]"),
            Change("billing/webhooks.py", "if row.attempts >= ATTEMPTS_MAX]", "if False]"),
        ),
        (f"{_WEBHOOKS}::test_what_fails_is_tried_again_under_the_same_id_ever_later_until_it_is_given_up",),
    ),
    Guard(
        "the last attempt of what ends its process",
        "it would end one after the other for ever",
        (
            Change("billing/webhooks.py", "if row.attempts < ATTEMPTS_MAX]", "if True]"),
            Change("billing/webhooks.py", "if row.attempts >= ATTEMPTS_MAX]", "if False]"),
        ),
        (f"{_WEBHOOKS}::test_a_delivery_whose_every_attempt_ends_its_process_is_given_up_too",),
    ),
    Guard(
        "the end of a removed webhook",
        "what was announced meanwhile would be sent to whom nothing more is to be sent",
        (Change("billing/webhooks.py", "if receiver.removed_at is not None:", "if False:"),),
        (f"{_WEBHOOKS}::test_what_is_announced_while_a_webhook_is_removed_is_given_up_unsent",),
    ),
    Guard(
        "the refusal of private addresses",
        "a webhook would reach what only this machine and its networks may",
        (
            Change(
                "jobs/webhook_sender.py",
                "if not self._allow_private and not all(map(is_public, addresses)):",
                "if False:",
            ),
        ),
        (f"{_WEBHOOKS}::test_private_addresses_are_refused_unless_they_are_allowed",),
    ),
    Guard(
        "the address that was looked at",
        "a name could mean a private address by the time it is connected to",
        (Change("jobs/webhook_sender.py", "url.copy_with(host=address),", "url,"),),
        (f"{_WEBHOOKS}::test_a_message_goes_to_the_address_that_was_looked_at_whatever_the_name_means_next",),
    ),
    Guard(
        "the refusal of redirects",
        "a receiver could send messages on to any address",
        (Change("jobs/webhook_sender.py", "follow_redirects=False", "follow_redirects=True"),),
        (_HARMLESS,),
    ),
    Guard(
        "the time that a receiver has",
        "one that does not answer would hold up all others",
        (Change("jobs/webhook_sender.py", "asyncio.timeout(self._timeout_s):", "asyncio.timeout(None):"),),
        (_HARMLESS,),
    ),
    Guard(
        "the thread of a look-up",
        "a name server that does not answer would hold up all others",
        (
            Change(
                "jobs/webhook_sender.py",
                "addresses = await look_up(url.raw_host, port)",
                "asked = asyncio.to_thread(socket.getaddrinfo, url.raw_host, port, type=socket.SOCK_STREAM)\n"
                "        addresses = [str(each[4][0]) for each in await asked]",
            ),
        ),
        (f"{_WEBHOOKS}::test_a_name_that_is_looked_up_for_ever_costs_its_own_deliveries_a_timeout_and_others_nothing",),
    ),
    Guard(
        "the mark of usage that was told of",
        "usage would be told of again whenever rollups are made anew",
        (Change("billing/rollups.py", "[row.id for row in rows if not row.announced]", "[row.id for row in rows]"),),
        (f"{_EVENTS}::test_each_record_is_told_of_once_whatever_is_late_repeated_or_rebuilt",),
    ),
    Guard(
        "the events of storage",
        "nobody would be told of it",
        (Change("billing/storage_metering.py", "written.append(usage_id)", "pass"),),
        (f"{_EVENTS}::test_storage_is_told_of_by_the_hour_as_it_is_metered_and_once",),
    ),
)

REFUSALS = (
    Guard(
        "the state of a budget that refuses",
        "a script would wait for room, and whoever runs the service would not be told why",
        (Change("jobs/submit.py", "budgets.note_refused(tx, error.budget, error.units, now=now)", "pass"),),
        ("tests/jobs/test_caps.py::test_a_budget_says_that_it_refuses_while_something_is_asked_for",),
    ),
    Guard(
        "a refusal that was told of",
        "webhooks would be told every few seconds of what goes on",
        (
            Change(
                "billing/budgets.py",
                "and not before.was_refused(now, TOLD_AGAIN_S):",
                "and not before.was_refused(now, NOTED_AGAIN_S):",
            ),
        ),
        (f"{_ALERTS}::test_a_budget_that_refuses_is_told_of_once_until_there_is_room_or_nobody_asks",),
    ),
    Guard(
        "refusals of a budget that is spent",
        "webhooks would be told that it has room, but too little",
        (Change("billing/budgets.py", "if not current.is_exhausted and not before", "if not before"),),
        (f"{_ALERTS}::test_a_budget_that_is_spent_tells_of_its_pause_alone",),
    ),
    Guard(
        "a look for room before a refusal is told of",
        "webhooks would be told of a refusal after a top-up has ended it",
        (Change("billing/budgets.py", "current.has_room_for(units) or before.was_refused", "before.was_refused"),),
        (f"{_ALERTS}::test_a_refusal_that_comes_after_there_is_room_again_is_not_told",),
    ),
    Guard(
        "a refusal that is written down",
        "every 402 would write, however many a client asks for at once",
        (
            Change(
                "jobs/submit.py",
                "error.budget is not None and not error.budget.was_refused(now, budgets.NOTED_AGAIN_S)",
                "error.budget is not None",
            ),
        ),
        ("tests/jobs/test_caps.py::test_a_refusal_is_written_down_every_ten_seconds_at_most",),
    ),
)

EXPORTS = (
    Guard(
        "the end of an exported period",
        "a line would be in two exports, and be billed on twice",
        (Change("billing/usage_lines.py", "used.at < until, later)", "used.at <= until, later)"),),
        (f"{_EXPORTS}::test_periods_that_follow_each_other_share_no_line_and_leave_none_out",),
    ),
    Guard(
        "lines of the same moment",
        "those that begin a page would be left out of an export",
        (
            Change(
                "billing/usage_lines.py",
                "later = or_(used.at > after, and_(used.at == after, number > last))",
                "later = used.at > after",
            ),
        ),
        (f"{_EXPORTS}::test_pages_of_any_size_hold_the_same_lines",),
    ),
    Guard(
        "the announcement of an export",
        "a day would be exported every hour, and nothing of it deleted",
        (Change("billing/exports.py", "uploads.announce(tx, key, now=now, expires_at=expires_at)", "pass"),),
        ("tests/jobs/test_billing_jobs.py::test_a_day_is_exported_once_when_it_is_over_if_settings_say_so",),
    ),
)
