"""What the scripts need beside the SDK: is the service there, and what did a run cost?"""

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, NoReturn

import tinker
from rich.box import SIMPLE_HEAD
from rich.table import Table

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # a tokenizer needs no torch, so no advice to install it

REACH_TIMEOUT_S = 5.0
COST_TIMEOUT_S = 30.0


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
    """What the service has metered for a training run so far; amounts are decimal strings."""
    headers = {"X-API-Key": os.environ["TINKER_API_KEY"]}
    query = urllib.parse.urlencode({"run": run})
    request = urllib.request.Request(f"{url}/api/v1/cost?{query}", headers=headers)
    with urllib.request.urlopen(request, timeout=COST_TIMEOUT_S) as response:
        cost: dict[str, Any] = json.load(response)
    return cost


def cost_table(cost: dict[str, Any]) -> Table:
    """The metered cost of a run as a table: a row per kind of operation and device, and the total."""
    rows, total = cost["rows"], cost["total"]
    seconds = "GPU-seconds" if any(row["device"].startswith("cuda") for row in rows) else "device-seconds"
    tokens = [sum(row[f"tokens_{what}"] for what in ("trained", "prefilled", "sampled")) for row in rows]
    table = Table(title="What it cost", title_justify="left", show_footer=True, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("operation", footer="total", no_wrap=True)
    table.add_column("number", footer=str(total["operations"]), justify="right")
    table.add_column("device")
    table.add_column(seconds, footer=f"{float(total['device_seconds']):.3f}", justify="right")
    table.add_column("tokens", footer=f"{sum(tokens):,}", justify="right")
    table.add_column(cost["currency"], footer=total["cost"], justify="right")
    for row, num_tokens in zip(rows, tokens, strict=True):
        duration = f"{float(row['device_seconds']):.3f}"
        table.add_row(row["kind"], str(row["operations"]), row["device"], duration, f"{num_tokens:,}", row["cost"])
    return table


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; what the service refuses is a sentence, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except tinker.TinkerError as error:
        sys.exit(f"The service refused: {error}")
    sys.exit(0)
