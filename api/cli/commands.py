"""Every command by name, imported only when it is called: `piecework --help` must not wait for SQLAlchemy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import MutableMapping
from typing import Any

import click
import structlog

from api.cli.errors import one_line

COMMANDS = {
    "serve": ("api.cli.serve:serve", "Run the whole service on this machine."),
    "api": ("api.cli.parts:api", "Run one api process alone."),
    "worker": ("api.cli.parts:worker", "Run one worker process alone."),
    "scheduler": ("api.cli.parts:scheduler", "Run the scheduler alone."),
    "models": ("api.cli.models:models", "Add, list and remove base models."),
    "accounts": ("api.cli.accounts:accounts", "Create and list accounts."),
    "keys": ("api.cli.keys:keys", "Create, list and revoke API keys."),
    "runs": ("api.cli.runs:runs", "Show training runs."),
    "ops": ("api.cli.runs:ops", "Show the operations of a training run."),
    "status": ("api.cli.status:status", "Show processes, queue and base models."),
    "cost": ("api.cli.cost:cost", "Show usage and what it costs."),
    "quote": ("api.cli.quote:quote", "Say what training would use and cost, before it is run."),
    "billing": ("api.cli.billing:billing", "Book top-ups and credits, show balances, check charges."),
    "invoices": ("api.cli.invoices:invoices", "Close periods, show and correct invoices."),
    "budgets": ("api.cli.budgets:budgets", "Add, change, list and remove caps."),
    "webhooks": ("api.cli.webhooks:webhooks", "Tell other programs of budgets and usage."),
    "doctor": ("api.cli.doctor:doctor", "Check what is reachable, and say what to change."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use, and whose errors are one line that says what to change."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """In the order a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Names and short helps, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what the user can mend is said in one line."""
        with one_line():
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="piecework")
def piecework() -> None:
    """Self-hosted training service with the Tinker programming model.

    Start with `piecework serve`: it prints an address and an API key for the tinker SDK. Every command takes the data
    directory from --data-dir or PIECEWORK_DATA_DIR, and works while the service runs and while it does not.
    """
    _log_to_stderr()


def _log_to_stderr() -> None:
    """Standard output is for the answer alone, which a command says itself; processes say later how they log."""
    if not structlog.is_configured():
        structlog.configure(
            processors=[structlog.processors.format_exc_info, _as_a_sentence],
            logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        )


def _as_a_sentence(_logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    """What a process would log, as a command tells a person; an answer needs no more."""
    if method in ("debug", "info"):
        raise structlog.DropEvent
    name, exception = str(event.pop("event")).replace("_", " "), event.pop("exception", "")
    fields = ", ".join(f"{key} {value}" for key, value in event.items())
    return "\n".join(filter(None, (f"{method}: {name}: {fields}", exception)))
