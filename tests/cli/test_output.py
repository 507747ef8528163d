"""Tables for people: in any terminal no number, id or time is broken; pipes have a line per row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone

import pytest

from api.cli.output import moment, print_groups, print_table

HEADINGS = ("run", "what for", "amount")
RUN = "0b1c5a1e-0000-4000-8000-000000000001:train:0"
ROWS = [(RUN, "ten words that may be broken over as many lines", "0.000000000012"), ("b", "short", "12")]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def shown(
    capsys: pytest.CaptureFixture[str], rows: Sequence[Sequence[object]] = ROWS, *, folds: Sequence[int] = (1,)
) -> list[str]:
    print_table(HEADINGS, rows, numbers=[2], folds=folds, empty="nothing")
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", range(82, 130, 3))
def test_what_may_not_be_broken_stays_whole_and_in_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys)
    assert max(map(len, lines)) <= columns
    assert lines[0].split() == ["run", "what", "for", "amount"]
    assert lines[1].startswith(f"{RUN}  ten words")
    assert lines[1].endswith("  0.000000000012")
    # and: what is folded is all there, numbers stand to the right
    assert " ".join(line[len(RUN) + 2 :].split("  ")[0].strip() for line in lines[1:-1]) == ROWS[0][1]
    assert len(lines[-1]) == len(lines[0]) == len(lines[1])


@pytest.mark.parametrize("columns", [20, 79, 81])
def test_a_row_becomes_lines_where_not_even_the_narrowest_columns_fit(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert shown(capsys) == [
        f"run       {RUN}",
        f"what for  {ROWS[0][1]}",
        "amount    0.000000000012",
        "",
        "run       b",
        "what for  short",
        "amount    12",
    ]


def test_what_is_no_terminal_has_a_line_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(RUN, "x " * 500, "1"), *ROWS]
    lines = shown(capsys, rows)
    assert len(lines) == 1 + len(rows)
    assert all(row[1].strip() in line for row, line in zip(rows, lines[1:], strict=True))


def test_a_cell_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, [("a\tb", "first line\nsecond line", "1")])
    assert lines[1:] == ["a b  first line second line       1"]


def test_wide_letters_take_their_room(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, [("模型", "a", "1"), ("mode", "b", "2")])
    assert lines[1:] == ["模型  a              1", "mode  b              2"]


def test_nothing_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, []) == ["nothing"]


GROUPS = [(("ada", "run-1"), [("optim_step", 3), ("sample", 20)]), (("eve", ""), [("sample", 1)])]


def test_groups_have_titles_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_groups(("account", "run"), ("kind", "number"), GROUPS, numbers=[1], empty="nothing")
    assert capsys.readouterr().out.splitlines() == [
        "kind        number",
        "ada  run-1",
        "optim_step       3",
        "sample          20",
        "eve",
        "sample           1",
    ]


def test_groups_have_columns_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_groups(("account", "run"), ("kind", "number"), GROUPS, numbers=[1], empty="nothing")
    assert capsys.readouterr().out.splitlines() == [
        "account  run    kind        number",
        "ada      run-1  optim_step       3",
        "ada      run-1  sample          20",
        "eve             sample           1",
    ]


def test_times_are_utc_to_the_second_and_options_take_them() -> None:
    at = datetime(2026, 11, 28, 13, 4, 5, 678901, timezone(timedelta(hours=2)))
    assert moment(at) == moment(at.isoformat()) == "2026-11-28T11:04:05Z"
    assert datetime.fromisoformat(moment(at)) == datetime(2026, 11, 28, 11, 4, 5, tzinfo=UTC)
    assert moment(None) == ""
