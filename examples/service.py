"""What the scripts need beside the SDK: counts as options, is the service there, and what did a run cost?"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NoReturn

import tinker
from rich.box import SIMPLE_HEAD
from rich.table import Table

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # a tokenizer needs no torch, so no advice to install it

REACH_TIMEOUT_S = 5.0
COST_TIMEOUT_S = 30.0


def count(text: str) -> int:
    """A whole number of 1 or more, as the type of an option."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return number


def reach(base_url: str | None) -> str:
    """Make sure that a service answers and that there is a key for it.

    Without this look the SDK would try a wrong address again for minutes before it says so.

    Args:
        base_url: address of the service; None takes `TINKER_BASE_URL`.

    Returns:
        The address, without a slash at its end.

    Raises:
        SystemExit: with a message that says what to change.
    """
    url = (base_url or os.environ.get("TINKER_BASE_URL") or "").rstrip("/")
    if not url:
        sys.exit("Which service? Set TINKER_BASE_URL or give --base-url (`piecework serve` prints its address).")
    if not os.environ.get("TINKER_API_KEY"):
        sys.exit(
            "Set TINKER_API_KEY (`piecework serve` prints one at its first start, `piecework keys create` another)."
        )
    try:
        with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=REACH_TIMEOUT_S):
            return url
    except urllib.error.HTTPError as error:
        sys.exit(f"The service at {url} is not ready: it answers {error.code} to /api/v1/healthz.")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        sys.exit(f"No service answers at {url} ({reason}). Start `piecework serve`, or correct the address.")


def choose_base_model(client: tinker.RestClient, wanted: str | None) -> str:
    """The base model to train: the one wanted, else the first that the service offers."""
    capabilities = client.get_server_capabilities().result()
    offered = [model.model_name for model in capabilities.supported_models if model.model_name]
    if wanted is None and not offered:
        sys.exit("The service has no base model yet: `piecework models add ID_OR_DIRECTORY` adds one.")
    if wanted is not None and wanted not in offered:
        sys.exit(f"The service has no base model {wanted!r}; it has: {', '.join(offered) or 'none'}.")
    return wanted or offered[0]


def fetch_cost(url: str, run: str) -> dict[str, Any]:
    """What the service has metered so far for the session that a run belongs to, its samples included."""
    query = urllib.parse.urlencode({"session": run.partition(":train:")[0]})
    headers = {"X-API-Key": os.environ["TINKER_API_KEY"]}
    request = urllib.request.Request(f"{url}/api/v1/cost?{query}", headers=headers)
    with urllib.request.urlopen(request, timeout=COST_TIMEOUT_S) as response:
        cost: dict[str, Any] = json.load(response)
    return cost


def cost_table(cost: dict[str, Any]) -> Table:
    """Metered cost as a table: a line per kind of operation and device, and the total."""
    lines: dict[tuple[str, str], list[Decimal]] = {}
    for row in cost["rows"]:
        tokens = row["tokens_trained"] + row["tokens_prefilled"] + row["tokens_sampled"]
        line = [Decimal(row["operations"]), Decimal(row["device_seconds"]), Decimal(tokens), Decimal(row["cost"])]
        known = lines.setdefault((row["kind"], row["device"]), [Decimal(0)] * len(line))
        known[:] = map(sum, zip(known, line, strict=True))
    seconds = "GPU-seconds" if any(device.startswith("cuda") for _, device in lines) else "device-seconds"
    table = Table(title="What it cost", title_justify="left", show_footer=True, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    totals = _cells([sum(column, Decimal(0)) for column in zip(*lines.values(), strict=True)] or [Decimal(0)] * 4)
    table.add_column("operation", footer="total", no_wrap=True)
    table.add_column("device", no_wrap=True)
    for title, footer in zip(("number", seconds, "tokens", cost["currency"]), totals, strict=True):
        table.add_column(title, footer=footer, justify="right", no_wrap=True)
    for (kind, device), line in lines.items():
        table.add_row(kind, device, *_cells(line))
    return table


def _cells(line: list[Decimal]) -> list[str]:
    number, seconds, tokens, cost = line
    return [f"{number}", f"{seconds:.3f}", f"{tokens:,}", f"{cost:.8f}"]


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; what the service refuses is a sentence, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except tinker.TinkerError as error:
        sys.exit(f"The service refused: {error}")
    sys.exit(0)
