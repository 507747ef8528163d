"""`python -m tests.settings_table` writes docs/settings.md from the settings classes; a test compares the two."""

from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from api.settings import ApiSettings, SupervisorSettings
from billing.settings import BillingSettings
from jobs.settings import JobsSettings
from storage.settings import StorageSettings
from worker.settings import WorkerSettings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
CLASSES: tuple[type[BaseSettings], ...] = (
    StorageSettings,
    JobsSettings,
    ApiSettings,
    SupervisorSettings,
    WorkerSettings,
    BillingSettings,
)
HEAD = """# Settings

Every process reads its settings once, when it starts, from environment variables. A setting that stands in several
tables is one variable that several processes read. `piecework serve`, `api`, `worker` and `scheduler` take the common
ones as options too (`--help`).
"""
LOGS = """
## Logs

| variable | default | meaning |
| --- | --- | --- |
| `PIECEWORK_LOG_LEVEL` | `INFO` | least level of the lines on standard error: DEBUG, INFO, WARNING, ERROR |
"""


def render() -> str:
    """The page."""
    return HEAD + "".join(_table(settings) for settings in CLASSES) + LOGS


def _table(settings: type[BaseSettings]) -> str:
    package = settings.__module__.partition(".")[0]
    purpose = str(settings.__doc__).splitlines()[0]
    lines = [f"\n## `{package}/`\n\n{purpose}\n\n| variable | default | meaning |\n| --- | --- | --- |\n"]
    lines += [_row(name, field) for name, field in settings.model_fields.items()]
    return "".join(lines)


def _row(name: str, field: FieldInfo) -> str:
    default = "" if field.default in ("", None) else f"`{field.default}`"
    return f"| `PIECEWORK_{name.upper()}` | {default} | {str(field.description).replace('|', '&#124;')} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
