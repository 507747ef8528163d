"""What a campaign found, as tables for people and as JSON for programs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from storage.failpoints import Point
from tests.chaos.campaign import Outcome
from tests.chaos.schedule import AT_POINT

SHOWN_MAX = 5


def faults_by_kind(outcome: Outcome) -> Mapping[tuple[str, str], int]:
    """How often each act hit each role."""
    return Counter((str(struck.fault.act), struck.role) for struck in outcome.struck if struck.happened)


def hits_by_point(outcome: Outcome) -> Mapping[str, int]:
    """How often something happened at each named point; 0 for those that were never reached."""
    at_points = (struck for struck in outcome.struck if struck.fault.act in AT_POINT and struck.happened)
    hits = Counter(struck.fault.target for struck in at_points)
    return {str(point): hits[str(point)] for point in Point}


def as_json(outcome: Outcome, logs: Path) -> Mapping[str, Any]:
    """Everything there is to tell."""
    return {
        "setup": outcome.plan.setup,
        "broker": outcome.plan.broker if outcome.plan.setup == "deployed" else "valkey",
        "seed": outcome.plan.seed,
        "kills": outcome.num_kills,
        "passed": outcome.passed,
        "stopped_by": outcome.stopped_by,
        "faults": [
            {"act": act, "role": role, "number": number, "slowest_s": round(_slowest_s(outcome, act, role), 2)}
            for (act, role), number in faults_by_kind(outcome).items()
        ],
        "points": hits_by_point(outcome),
        "checks": {sentence: list(found) for sentence, found in outcome.violations.items()},
        "rounds": outcome.num_rounds,
        "results": outcome.num_results,
        "wall_s": round(outcome.wall_s, 1),
        "longest_pause_s": round(outcome.longest_pause_s, 2),
        "undisturbed_pause_s": round(outcome.undisturbed_pause_s, 2),
        "device_time": _device_time(outcome),
        "logs": str(logs),
    }


def show(outcome: Outcome, logs: Path, console: Console) -> None:
    """Print what happened, what holds, and how to repeat what does not."""
    console.print(_faults(outcome), _points(outcome), _checks(outcome))
    console.print(
        f"{outcome.num_kills} faults in {outcome.wall_s:.0f} s, {outcome.num_rounds} rounds with {outcome.num_results} "
        f"results; slowest pause of a client {outcome.longest_pause_s:.1f} s "
        f"(undisturbed {outcome.undisturbed_pause_s:.1f} s)"
    )
    if outcome.device_time is not None:
        console.print(
            "device time: busy {busy_s:.3f} s = billed {billed_s:.3f} + in vain {overhead_s:.3f} + under way "
            "{under_way_s:.3f}; off by {off:.4%}, the worst of {workers} workers by {worst:.4%}".format(
                **_device_time(outcome)
            ),
            highlight=False,
        )
    if not outcome.passed:
        plan = outcome.plan
        console.print(f"[red]failed[/red] {escape(outcome.stopped_by)}", highlight=False)
        broker = f" --broker {plan.broker}" if plan.setup == "deployed" else ""
        only = "".join(f" --only {shlex.quote(part)}" for part in plan.only)
        console.print(
            f"the same faults again: python -m tests.chaos --setup {plan.setup} --kills {plan.kills} "
            f"--seed {plan.seed}{broker}{only}\nlogs: {logs}",
            soft_wrap=True,
        )


def _device_time(outcome: Outcome) -> Mapping[str, float]:
    """Seconds, and parts of the busy time."""
    found = outcome.device_time
    if found is None:
        return {}
    names = ("busy", "billed", "overhead", "under_way")
    seconds = {f"{name}_s": found.total(f"{name}_ns") / 1e9 for name in names}
    off = abs(found.total("drift_ns")) / max(found.total("busy_ns"), 1)
    return {**seconds, "off": off, "worst": found.drift_ppm / 1e6, "workers": len(found.balances)}


def _faults(outcome: Outcome) -> Table:
    table = Table("fault", "of", "times", "slowest next result", title="faults")
    for (act, role), number in sorted(faults_by_kind(outcome).items()):
        table.add_row(act, role, str(number), f"{_slowest_s(outcome, act, role):.1f} s")
    return table


def _slowest_s(outcome: Outcome, act: str, role: str) -> float:
    return max(one.result_after_s for one in outcome.struck if (str(one.fault.act), one.role) == (act, role))


def _points(outcome: Outcome) -> Table:
    table = Table("point", "hits", title="named points")
    for point, number in hits_by_point(outcome).items():
        table.add_row(point, str(number) if number else "-")
    return table


def _checks(outcome: Outcome) -> Table:
    table = Table("check", "", title="checks", show_lines=any(outcome.violations.values()))
    for sentence, found in outcome.violations.items():
        table.add_row(sentence, f"[red]no[/red] ({len(found)})" if found else "[green]holds[/green]")
        for line in found[:SHOWN_MAX]:
            table.add_row(escape(f"  {line}"), "")
    return table
