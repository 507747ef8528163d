"""The report of what usage costs: its rows add up to its total."""

from datetime import timedelta
from decimal import Decimal

import sqlalchemy

from billing import cost, rate_cards, rollups
from billing.usage_totals import Scope
from storage.database import Database
from tests.factories import NOW, bill, make_operation, make_run, make_session, make_usage

CARD = """
[device_seconds]
cpu = "0.5"
[million_tokens."*"]
trained = "2"
"""


def test_a_report_lists_every_kind_and_adds_up(database: Database) -> None:
    # Given
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - timedelta(hours=1))
        run = make_run(tx)
        for seq, (kind, used) in enumerate(
            [
                ("forward_backward", make_usage(device_ns=2 * 10**9, tokens_trained=10**6)),
                ("forward_backward", make_usage(device_ns=10**9)),
                ("optim_step", make_usage(device_ns=1)),
            ]
        ):
            bill(tx, run, make_operation(tx, run, seq, kind), used)
    # When
    with database.read() as tx:
        report = cost.report(tx, Scope(run_id=run.id))
        nothing = cost.report(tx, Scope(run_id="another"))
    # Then
    assert [(row.usage.kind, row.cost) for row in report.rows] == [
        ("forward_backward", Decimal("3.5")),
        ("optim_step", Decimal("5E-10")),
    ]
    assert (report.operations, report.device_ns) == (3, 3 * 10**9 + 1)
    assert report.cost == Decimal("3.5000000005")
    assert report.as_json()["total"] == {
        "operations": 3,
        "device_seconds": "3.000000001",
        "tokens_trained": 10**6,
        "tokens_prefilled": 0,
        "tokens_cached": 0,
        "tokens_sampled": 0,
        "byte_seconds": 0,
        "cost": "3.5000000005",
    }
    assert report.as_json()["rows"][0]["cost"] == "3.5"
    assert (nothing.cost, nothing.operations, list(nothing.rows)) == (0, 0, [])


def test_a_page_of_runs_is_added_up_in_one_statement(database: Database) -> None:
    # given runs of which one has cost nothing, some rolled up and some not
    with database.begin() as tx:
        rate_cards.add(tx, CARD, now=NOW - timedelta(hours=1))
        session = make_session(tx)
        runs = [make_run(tx, session=session, model_seq_id=number) for number in range(5)]
        for number, run in enumerate(runs[:4]):
            bill(tx, run, make_operation(tx, run), make_usage(device_ns=2 * number * 10**9))
    rollups.roll_up(database, pass_s=60)
    with database.begin() as tx:
        bill(tx, runs[0], make_operation(tx, runs[0], 1), make_usage(device_ns=0, tokens_trained=10**6))
    statements: list[str] = []
    with database.read() as tx:
        sqlalchemy.event.listen(tx, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        # when
        costs = cost.of_runs(tx, session.account_id, [run.id for run in runs])
        # then
        assert len([text for text in statements if text.startswith("SELECT")]) == 1
        assert [costs[run.id] for run in runs] == [2, 1, 2, 3, 0]
        assert [cost.report(tx, Scope(run_id=run.id)).cost for run in runs] == [2, 1, 2, 3, 0]
