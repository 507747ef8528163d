"""The `piecework` command: starts processes and administers accounts, keys, base models; imports no process."""

from __future__ import annotations


def main() -> None:
    """Entry point of the console command."""
    from api.cli.commands import piecework

    piecework(prog_name="piecework")
