"""The report of what usage costs: its rows add up to its total."""

from decimal import Decimal

from billing import cost, usage
from billing.rate_cards import RateCard
from storage.database import Database
from tests.factories import NOW, make_operation, make_run, make_usage

CARD = RateCard("USD", {"cpu": Decimal("0.5")}, {"*": {"trained": Decimal(2)}})


def test_a_report_lists_every_kind_and_adds_up(database: Database) -> None:
    # Given
    with database.begin() as tx:
        run = make_run(tx)
        for seq, (kind, used) in enumerate(
            [
                ("forward_backward", make_usage(device_ns=2 * 10**9, tokens_trained=10**6)),
                ("forward_backward", make_usage(device_ns=10**9)),
                ("optim_step", make_usage(device_ns=1)),
            ]
        ):
            operation = make_operation(tx, run, seq, kind)
            usage.record(
                tx,
                used,
                operation_id=operation.id,
                account_id=run.account_id,
                session_id=run.session_id,
                run_id=run.id,
                sampling_session_id=None,
                kind=kind,
                base_model=run.base_model,
                now=NOW,
            )
    # When
    with database.read() as tx:
        report = cost.report(tx, CARD, run_id=run.id)
        nothing = cost.report(tx, CARD, run_id="another")
    # Then
    assert [(row.usage.kind, row.cost) for row in report.rows] == [
        ("forward_backward", Decimal("3.5")),
        ("optim_step", Decimal("5E-10")),
    ]
    assert (report.operations, report.device_ns) == (3, 3 * 10**9 + 1)
    assert report.cost == Decimal("3.5000000005")
    assert report.as_json()["total"] == {"operations": 3, "device_seconds": "3.000000001", "cost": "3.5000000005"}
    assert report.as_json()["rows"][0]["cost"] == "3.5"
    assert (nothing.cost, nothing.operations, list(nothing.rows)) == (0, 0, [])
