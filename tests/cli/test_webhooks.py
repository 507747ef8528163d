"""Webhooks on the command line, without a running service."""

from __future__ import annotations

import json
from pathlib import Path

from billing import webhooks
from storage.open import open_storage
from storage.settings import StorageSettings
from tests.cli.test_admin import run, run_json
from tests.receiver import is_signed, receiving

ALLOWED = {"PIECEWORK_WEBHOOK_PRIVATE_ADDRESSES": "true"}


def test_a_webhook_is_added_tested_listed_and_removed(tmp_path: Path) -> None:
    with receiving() as receiver:
        # Given
        run_json(tmp_path, "accounts", "create", "ada")
        added = run_json(tmp_path, "webhooks", "add", f"{receiver.url}/ok", "--account", "ada", "--event", "usage")
        number, secret = str(added["webhook"]), added["secret"]
        # When
        tested = run(tmp_path, "webhooks", "test", number, **ALLOWED)
        # Then
        assert tested.exit_code == 0, tested.output
        (message,) = receiver.received
        assert is_signed(message, secret)
        assert json.loads(message.body)["type"] == "test"
        # When: the receiver takes nothing
        receiver.statuses["/ok"] = [500]
        failed = run(tmp_path, "webhooks", "test", number, **ALLOWED)
        refused = run(tmp_path, "webhooks", "test", number)
        # Then
        assert (failed.exit_code, refused.exit_code) == (1, 1)
        assert "HTTP 500" in failed.output
        assert "its address is not public" in refused.output
    (listed,) = run_json(tmp_path, "webhooks", "list")["webhooks"]
    assert (listed["account"], listed["events"]) == ("ada", ["usage"])
    states = [one["state"] for one in run_json(tmp_path, "webhooks", "deliveries", number)["deliveries"]]
    assert states == ["waiting", "waiting", "delivered"]
    # And: the secret was shown once
    shown = "".join(run(tmp_path, "webhooks", *which).output for which in (["list"], ["deliveries"]))
    assert secret.removeprefix("whsec_") not in shown + tested.output + failed.output + refused.output
    # When
    assert run_json(tmp_path, "webhooks", "remove", number) == {"removed": int(number)}
    # Then
    assert run_json(tmp_path, "webhooks", "list")["webhooks"] == []
    assert "given up" in run(tmp_path, "webhooks", "deliveries").output


def test_what_was_never_sent_is_shown_with_no_attempts(tmp_path: Path) -> None:
    # Given
    number = run_json(tmp_path, "webhooks", "add", "https://a.test/")["webhook"]
    storage = open_storage(StorageSettings(data_dir=tmp_path))
    with storage.database.begin() as tx:
        now = storage.database.now(tx)
        webhooks.announce_to(tx, number, "event", "{}", "application/json", now=now)
    storage.close()
    # When
    shown = run(tmp_path, "webhooks", "deliveries").stdout
    # Then
    assert shown.splitlines()[-1].split()[:5] == ["1", str(number), "event", "waiting", "0"]


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    for arguments, says in (
        (["add", "ftp://host/"], "the URL must be https://host/path"),
        (["add", "https://host/", "--account", "eve"], "eve"),
        (["remove", "7"], "there is no webhook 7"),
        (["test", "7"], "there is no webhook 7"),
    ):
        refused = run(tmp_path, "webhooks", *arguments)
        assert refused.exit_code == 1
        assert says in refused.output
        assert refused.output.count("\n") == 1
