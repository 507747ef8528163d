"""Accounts, keys, cost, status and doctor without a running service."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from api.cli import doctor, process_table
from api.cli.commands import COMMANDS, piecework
from api.cli.dead_worker import release
from api.cli.errors import CliError
from api.cli.values import parse_moment
from storage import accounts, leases, runs, workers
from storage.deaths import Cause, Freed
from storage.migrate import migrate
from storage.open import open_storage
from storage.settings import StorageSettings
from storage.workers import Work


def run(data_dir: Path, *arguments: str, **environment: str) -> Result:
    """Run a command in this process."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("PIECEWORK_")}
    return CliRunner().invoke(piecework, [*arguments, "--data-dir", str(data_dir)], env={**clean, **environment})


def run_json(data_dir: Path, *arguments: str) -> Any:
    """What a command that must succeed prints for programs."""
    done = run(data_dir, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(piecework, [command, "--help"])
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) > 5


def test_key_is_shown_once_and_stored_as_a_hash(tmp_path: Path) -> None:
    # given
    run_json(tmp_path, "accounts", "create", "ada")

    # when
    key = run_json(tmp_path, "keys", "create", "--account", "ada")["api_key"]

    # then it is one that the SDK takes, and nothing in the data directory holds it
    assert key.startswith("tml-")
    assert key not in run(tmp_path, "keys", "list").output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_revoked_key_is_found_no_more(tmp_path: Path) -> None:
    # given
    run_json(tmp_path, "accounts", "create", "ada")
    key = run_json(tmp_path, "keys", "create", "--account", "ada")["api_key"]
    (row,) = run_json(tmp_path, "keys", "list")["keys"]

    # when
    assert run_json(tmp_path, "keys", "revoke", str(row["id"])) == {"revoked": row["id"]}

    # then
    storage = open_storage(StorageSettings(data_dir=tmp_path))
    with storage.database.read() as tx:
        assert accounts.find_key(tx, key) is None
    storage.close()
    assert run_json(tmp_path, "keys", "list")["keys"][0]["revoked_at"]


def test_unknown_and_repeated_names_are_refused_in_one_line(tmp_path: Path) -> None:
    run_json(tmp_path, "accounts", "create", "ada")
    for arguments, says in (
        (["accounts", "create", "ada"], "there is an account 'ada' already"),
        (
            ["keys", "create", "--account", "eve"],
            "there is no account 'eve' (accounts: ada); add one: piecework accounts create eve\n",
        ),
        (["keys", "revoke", "99"], "there is no key 99"),
        (["cost", "--account", "eve"], "there is no account 'eve' (accounts: ada); add one: "),
        (["runs", "--account", "eve"], "there is no account 'eve' (accounts: ada); add one: "),
        (["cost", "--since", "yesterday"], "--since 'yesterday' is no time"),
        (["ops", "no-such-run"], "no-such-run"),
    ):
        refused = run(tmp_path, *arguments)
        assert refused.exit_code == 1, arguments
        assert says in refused.output
        assert refused.output.count("\n") == 1


def test_cost_of_nothing_is_nothing(tmp_path: Path) -> None:
    # given
    run_json(tmp_path, "accounts", "create", "ada")
    # when
    report = run_json(tmp_path, "cost", "--since", "24h")
    # then
    no_tokens = {f"tokens_{kind}": 0 for kind in ("trained", "prefilled", "cached", "sampled")}
    assert report == {
        "currency": "USD",
        "rows": [],
        "total": {"operations": 0, "device_seconds": "0", **no_tokens, "byte_seconds": 0, "cost": "0"},
    }
    # and: whether what was asked for is there at all
    for arguments, says in (
        ([], "nothing has been used yet\n"),
        (["--project", "p"], "nothing has been used yet: no session was of project 'p'\n"),
        (["--batch", "b"], "nothing has been used yet: no session had the tag 'batch:b'\n"),
    ):
        assert run(tmp_path, "cost", *arguments).output == says
    for arguments, says in ((["--key", "7"], "there is no key 7"), (["--session", "s"], "there is no session 's'")):
        refused = run(tmp_path, "cost", *arguments)
        assert (refused.exit_code, says in refused.output) == (1, True), refused.output


def test_doctor_makes_no_database_that_other_commands_would_take_for_the_services(tmp_path: Path) -> None:
    run(tmp_path, "doctor")
    assert not list(tmp_path.glob("*.db"))
    assert run(tmp_path, "runs").exit_code == 1


@pytest.mark.parametrize("what", ["accounts", "models"])
def test_what_is_set_up_first_can_be_listed_before_there_is_anything(tmp_path: Path, what: str) -> None:
    (listed,) = run_json(tmp_path / "new", what, "list").values()
    assert listed == []


@pytest.mark.parametrize("command", [["cost"], ["runs"], ["status"], ["budgets", "list"], ["billing", "verify"]])
def test_a_directory_without_a_service_is_told_of_and_left_alone(tmp_path: Path, command: list[str]) -> None:
    # when
    refused = run(tmp_path / "wrong", *command)
    # then
    assert (refused.exit_code, "there is no database in" in refused.output) == (1, True)
    assert "--data-dir or PIECEWORK_DATA_DIR" in refused.output
    assert list(tmp_path.iterdir()) == []


def test_times_are_read_as_days_moments_and_ages() -> None:
    now = datetime(2026, 5, 2, 12, tzinfo=UTC)
    assert parse_moment("90m", "--since", now=now) == now - timedelta(minutes=90)
    assert parse_moment("2026-05-01", "--since", now=now) == datetime(2026, 5, 1, tzinfo=UTC)
    assert parse_moment("2026-05-01T10:00:00+02:00", "--since", now=now) == datetime(2026, 5, 1, 8, tzinfo=UTC)
    with pytest.raises(CliError, match="--until 'soon' is no time"):
        parse_moment("soon", "--until", now=now)


@pytest.mark.parametrize(
    "text", ["99999999999d", "9999999d", "9" * 400 + "s", "0001-01-01T00:00:00+14:00", "9999-12-31T23:30:00"]
)
def test_a_time_that_cannot_be_reckoned_with_is_refused_by_its_option(text: str) -> None:
    with pytest.raises(CliError, match=r"^--at .* is too far away"):
        parse_moment(text, "--at", now=datetime(2026, 5, 2, 12, tzinfo=UTC))


def test_status_shows_only_processes_that_still_run(tmp_path: Path) -> None:
    # given a table with a process that runs, and one whose number now belongs to another program
    ours = process_table.entry("supervisor", os.getpid())
    assert ours is not None
    stale = process_table.ProcessEntry("worker", os.getppid(), created_at=1.0)
    process_table.write(tmp_path, "http://x", [ours, stale])
    run_json(tmp_path, "accounts", "create", "ada")

    # then
    assert run_json(tmp_path, "status")["processes"] == [{"role": "supervisor", "pid": os.getpid()}]


def test_status_and_doctor_tell_what_replays_have_shown(tmp_path: Path) -> None:
    # given a worker that found nothing wrong
    storage = open_storage(StorageSettings(data_dir=tmp_path))
    database = storage.database
    migrate(database)
    with database.begin() as tx:
        workers.register(tx, worker_id="w", host="h", pid=1, device="cpu", now=database.now(tx))
        workers.add_work(tx, "w", Work(num_replayed=7), number=1, under_way_ns=0, tail_p95_ns=1_500_000_000)
    shown = run(tmp_path, "status").output
    assert "worker w on cpu: replay tail p95 1.5 s, replayed 7" in shown
    assert "ALARM" not in shown

    # when it found a damaged snapshot, and a replay that gave another result
    with database.begin() as tx:
        workers.add_work(
            tx, "w", Work(num_damaged_snapshots=1, num_replay_mismatches=2), number=2, under_way_ns=0, tail_p95_ns=0
        )

    # then that is seen
    told = run_json(tmp_path, "status")
    assert told["alarms"] == {"replay_mismatches": 2, "damaged_snapshots": 1}
    (worker,) = told["workers"]
    assert (worker["num_replayed"], worker["num_replay_mismatches"]) == (7, 2)
    shown = run(tmp_path, "status").output
    assert "ALARM: 2 replayed operations differ" in shown
    assert "ALARM: 1 snapshots were damaged" in shown
    findings = {
        finding["what"]: finding for finding in json.loads(run(tmp_path, "doctor", "--json").stdout)["findings"]
    }
    assert findings["state of runs"]["state"] == "note"
    assert "1 snapshots were damaged, 2 operations computed again" in findings["state of runs"]["detail"]
    storage.close()


def test_everything_of_a_dead_worker_is_freed(tmp_path: Path) -> None:
    # given a run whose lease a worker holds
    storage = open_storage(StorageSettings(data_dir=tmp_path))
    database = storage.database
    migrate(database)
    with database.begin() as tx:
        now = database.now(tx)
        account = accounts.create_account(tx, "ada", now=now)
        session = runs.create_session(
            tx,
            account_id=account.id,
            project_id=None,
            api_key_id=None,
            idempotency_key=None,
            tags=[],
            user_metadata={},
            display_name=None,
            sdk_version="0.38.0",
            now=now,
        )
        run_ = runs.create_run(
            tx,
            account_id=account.id,
            session_id=session.id,
            model_seq_id=0,
            base_model="m",
            lora={},
            optimizer="adamw",
            user_metadata={},
            now=now,
        )
        lease = leases.acquire(tx, run_.id, worker_id="dead", now=now, expires_at=now + timedelta(hours=1))

    # when
    freed = release(database, "dead", Cause.FAULT)

    # then another worker may have it, and the dead one's epoch counts no more
    assert freed == Freed([run_.id], 0)
    with database.begin() as tx:
        assert leases.find_holder(tx, run_.id, now=now) is None
        assert not leases.is_held(tx, lease)
    storage.close()


def test_doctor_names_what_cannot_be_reached_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given servers that do not exist
    environment = {
        "PIECEWORK_DATABASE_URL": "postgresql+psycopg://bob:hunter2@127.0.0.1:1/x",
        "PIECEWORK_BROKER_URL": "redis://:hunter2@127.0.0.1:1/0",
        "PIECEWORK_OBJECT_STORE_URL": "s3://bob:hunter2@127.0.0.1:1/bucket?secure=false&retries=0",
    }

    monkeypatch.setattr(doctor, "_device", lambda: doctor.Finding("device", "ok", "not asked"))

    # when
    told = run(tmp_path, "doctor", "--json", **environment)

    # then
    assert told.exit_code == 1
    states = {finding["what"]: finding["state"] for finding in json.loads(told.stdout)["findings"]}
    assert {what for what, state in states.items() if state == "fail"} >= {"database", "broker", "object store"}
    assert "hunter2" not in told.output


def test_doctor_makes_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    told = run(tmp_path / "typed" / "wrong", "doctor")
    assert told.exit_code == 0, told.output
    assert list(tmp_path.iterdir()) == []
    for what in ("object store", "database"):
        assert re.search(rf"note {what} +none in .*wrong yet", told.output)


def test_doctor_says_where_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = run(tmp_path / "file" / "data", "doctor")
    assert told.exit_code == 1, told.output
    assert re.search(r"FAIL disk .*data cannot be written in: .*file is no directory", told.output)


def test_doctor_finds_nothing_wrong_with_a_fresh_directory(tmp_path: Path) -> None:
    told = run(tmp_path, "doctor")
    assert told.exit_code == 0, told.output
    assert "FAIL" not in told.output


@pytest.mark.parametrize("url", ["postgres://bob:hunter2@h/d", "mysql://bob:hunter2@h/d", "hunter2"])
def test_a_url_of_no_database_says_what_to_write_without_its_password(tmp_path: Path, url: str) -> None:
    refused = run(tmp_path, "cost", PIECEWORK_DATABASE_URL=url)
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1), refused.output
    assert "postgresql+psycopg://user:password@host/database" in refused.output
    assert "hunter2" not in refused.output


@pytest.mark.parametrize("command", ["serve", "api"])
@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_there_is_not_is_refused(tmp_path: Path, command: str, port: str) -> None:
    refused = run(tmp_path, command, "--port", port)
    assert (refused.exit_code, f"{port} is not in the range 0<=x<=65535" in refused.output) == (2, True)


def test_wrong_setting_is_named(tmp_path: Path) -> None:
    refused = run(tmp_path, "status", PIECEWORK_INLINE_BYTES_MAX="many")
    assert refused.exit_code == 1
    assert "PIECEWORK_INLINE_BYTES_MAX" in refused.output
