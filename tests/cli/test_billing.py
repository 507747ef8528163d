"""Payments, credits and balances on the command line, without a running service; and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.cli.options import REFERENCE_CHARS_MAX
from tests.cli.test_admin import run, run_json

TOO_LARGE = str(2**63)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory with two accounts."""
    for name in ("ada", "eve"):
        run_json(tmp_path, "accounts", "create", name)
    return tmp_path


def balance(data_dir: Path, account: str, *arguments: str) -> str:
    """What an account has."""
    return str(run_json(data_dir, "billing", "balance", "--account", account, *arguments)["balance"])


@pytest.mark.parametrize("command", ["topup", "credit"])
def test_what_is_booked_is_in_the_accounts_favour_and_shown(data_dir: Path, command: str) -> None:
    # when
    told = run_json(data_dir, "billing", command, "12.50", "--account", "ada")
    shown = run(data_dir, "billing", command, "0.25", "--account", "ada")
    # then: without a reference every one is another
    assert told == {"account": "ada", "new": True, "balance": "12.5", "currency": "USD"}
    assert (shown.exit_code, shown.output) == (0, "booked; ada has 12.75 USD\n")
    assert (balance(data_dir, "ada"), balance(data_dir, "eve")) == ("12.75", "0")
    assert run(data_dir, "billing", "balance", "--account", "ada").output == "ada: 12.75 USD\n"


@pytest.mark.parametrize("command", ["topup", "credit"])
def test_the_same_reference_is_booked_once_for_an_account(data_dir: Path, command: str) -> None:
    # given
    booking = ("billing", command, "25", "--reference", "wire-7")
    run_json(data_dir, *booking, "--account", "ada")
    # when it comes again, and for another account
    again = run_json(data_dir, *booking, "--account", "ada")
    shown = run(data_dir, *booking, "--account", "ada").output
    other = run_json(data_dir, *booking, "--account", "eve")
    # then
    assert (again["new"], again["balance"], other["new"]) == (False, "25", True)
    assert shown == "was booked already; ada has 25 USD\n"


@pytest.mark.parametrize("changed", [["26"], ["25", "--project", "p"]])
def test_a_reference_of_another_booking_is_refused(data_dir: Path, changed: list[str]) -> None:
    # given
    run_json(data_dir, "billing", "topup", "25", "--account", "ada", "--reference", "wire-7")
    # when
    refused = run(data_dir, "billing", "topup", *changed, "--account", "ada", "--reference", "wire-7")
    # then
    assert (refused.exit_code, refused.output) == (
        1,
        "Error: reference 'wire-7' is that of another booking, of 25: choose another one\n",
    )
    assert balance(data_dir, "ada") == "25"


def test_a_top_up_and_a_credit_may_have_the_same_reference(data_dir: Path) -> None:
    for command in ("topup", "credit"):
        assert run_json(data_dir, "billing", command, "1", "--account", "ada", "--reference", "a")["new"]
    assert balance(data_dir, "ada") == "2"


def test_a_balance_is_that_of_a_project_or_of_then(data_dir: Path) -> None:
    # given
    run_json(data_dir, "billing", "topup", "2", "--account", "ada", "--project", "p")
    run_json(data_dir, "billing", "topup", "3", "--account", "ada")
    # then
    assert (balance(data_dir, "ada"), balance(data_dir, "ada", "--project", "p")) == ("5", "2")
    assert (balance(data_dir, "ada", "--at", "1h"), balance(data_dir, "ada", "--project", "q")) == ("0", "0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["topup", "ten", "--account", "ada"], "AMOUNT 'ten' is no amount of money: write e.g. 25 or 12.50"),
        (["topup", "10000000000", "--account", "ada"], "10000000000 is too large: an amount may be at most 9223372.03"),
        (["credit", "1e99", "--account", "ada"], "1E+99 is too large"),
        (["topup", "nan", "--account", "ada"], "NaN is no amount of money"),
        (["topup", "0.0000000000001", "--account", "ada"], "must be more than 0"),
        (
            ["topup", "1", "--account", "adam"],
            "no account 'adam' (accounts: ada, eve); add one: piecework accounts",
        ),
        (["entries", "--account", "ada", "--run", "nope"], "there is no training run 'nope'"),
        (["topup", "-5", "--account", "ada"], "AMOUNT '-5' must be more than 0"),
        (["topup", "-5", "--account", "ada", "--project", "p"], "AMOUNT '-5' must be more than 0"),
        (["credit", "--account", "ada", "-.5"], "AMOUNT '-.5' must be more than 0"),
        (["credit", "--account", "ada", "-5USD"], "AMOUNT '-5USD' is no amount of money"),
        (["balance", "--account", "ada", "--at", "soon"], "--at 'soon' is no time"),
        (["balance", "--account", "ada", "--at", "99999999999d"], "is too far away"),
        (["export", "--from", "9999-12-31", "--format", "csv"], "--from '9999-12-31' is too far away"),
        (["adjust", "1", "--reason", "x", "--amount", "1e99"], "1E+99 is too large"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(data_dir: Path, arguments: list[str], says: str) -> None:
    # when
    refused = run(data_dir, "billing", *arguments)
    # then
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1), refused.output
    assert says in refused.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["cost", "--key", TOO_LARGE],
        ["invoices", "show", TOO_LARGE],
        ["invoices", "show", "1", "--trace", TOO_LARGE],
        ["invoices", "credit", TOO_LARGE, "--reason", "x"],
        ["billing", "adjust", TOO_LARGE, "--amount", "1", "--reason", "x"],
        ["billing", "cards", "show", TOO_LARGE],
        ["budgets", "set", TOO_LARGE, "1", "--account", "ada"],
        ["budgets", "remove", TOO_LARGE, "--account", "ada"],
        ["keys", "revoke", TOO_LARGE],
        ["webhooks", "remove", TOO_LARGE],
        ["runs", "--after", TOO_LARGE],
        ["ops", "a-run", "--after", TOO_LARGE],
    ],
)
def test_a_number_that_no_row_has_is_refused(data_dir: Path, arguments: list[str]) -> None:
    # when
    refused = run(data_dir, *arguments)
    # then
    assert (refused.exit_code, f"{TOO_LARGE} is too large." in refused.output) == (2, True), refused.output


@pytest.mark.parametrize("command", [["add", "-1"], ["set", "1", "-12.50"]])
def test_a_negative_cap_must_be_more_than_0(data_dir: Path, command: list[str]) -> None:
    # when
    refused = run(data_dir, "budgets", *command, "--account", "ada")
    # then
    assert (refused.exit_code, refused.output) == (1, f"Error: CAP '{command[-1]}' must be more than 0\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["budgets", "set", "-1", "5", "--account", "ada"], "-1 is not in the range x>=1"),
        (["budgets", "add", "5", "--acount", "ada"], "Did you mean"),
        (["budgets", "add", "5", "-x", "--account", "ada"], "No such option '-x'"),
        (["billing", "adjust", "-1", "--amount", "-1", "--reason", "x"], "-1 is not in the range x>=1"),
        (["invoices", "show", "x"], "'x' is not a valid whole number"),
        (["invoices", "show", "-1"], "-1 is not in the range x>=1"),
        (["keys", "revoke", "-1"], "-1 is not in the range x>=1"),
    ],
)
def test_what_is_no_number_and_what_is_no_option_are_told_apart(
    data_dir: Path, arguments: list[str], says: str
) -> None:
    # when
    refused = run(data_dir, *arguments)
    # then
    assert (refused.exit_code, says in refused.output) == (2, True), refused.output


def test_a_reference_fits_into_the_ledger_or_is_refused(data_dir: Path) -> None:
    longest = "r" * REFERENCE_CHARS_MAX
    for number, booking in enumerate((["topup", "1", "--account", "ada"], ["credit", "1", "--account", "ada"])):
        # when
        refused = run(data_dir, "billing", *booking, "--reference", f"{longest}r")
        # then
        assert (refused.exit_code, "101 characters are too long: use at most 100" in refused.output) == (2, True)
        assert balance(data_dir, "ada") == str(number)
        assert run_json(data_dir, "billing", *booking, "--reference", longest)["new"]
    adjusting = ("billing", "adjust", "1", "--amount", "0.5", "--reason", "x", "--reference")
    assert run(data_dir, *adjusting, f"{longest}r").exit_code == 2
    assert run_json(data_dir, *adjusting, longest)["new"]
    assert balance(data_dir, "ada") == "1.5"


@pytest.mark.parametrize("arguments", [["topup", "1"], ["credit", "1"], ["balance"], ["entries"]])
def test_a_name_that_no_project_can_have_is_refused(data_dir: Path, arguments: list[str]) -> None:
    # when
    refused = run(data_dir, "billing", *arguments, "--account", "ada", "--project", "p" * 65)

    # then
    assert (refused.exit_code, "65 characters are too long: use at most 64" in refused.output) == (2, True)


def test_a_rate_card_that_is_not_text_is_refused_in_one_line(data_dir: Path) -> None:
    # given
    file = data_dir / "card.toml"
    file.write_bytes('currency = "\u20ac"'.encode("cp1252"))
    # when
    refused = run(data_dir, "billing", "cards", "add", str(file))
    # then
    assert (refused.exit_code, refused.output.count("\n")) == (1, 1)
    assert f"{file} is not UTF-8" in refused.output
