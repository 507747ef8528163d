"""Log lines are JSON, one a line, and each names its process, whatever thread or library wrote it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def _lines(script: str, **environment: str) -> list[dict[str, Any]]:
    """What a process that sets logging up and runs `script` writes to standard error."""
    program = (
        "import logging, threading, structlog\n"
        "from storage.telemetry import set_up_logging\n"
        "log = structlog.get_logger()\n"
        "set_up_logging('worker', worker='w-1')\n" + textwrap.dedent(script)
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=180,
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_lines_of_every_thread_and_library_name_the_process() -> None:
    # When
    lines = _lines(
        """
        log.info("from_main", run="r")
        thread = threading.Thread(target=lambda: log.warning("from_thread"))
        thread.start()
        thread.join()
        library = threading.Thread(target=lambda: logging.getLogger("library").warning("said %s", "this"))
        library.start()
        library.join()
        """
    )
    # Then
    assert [line["event"] for line in lines] == ["from_main", "from_thread", "said this"]
    assert all((line["process"], line["worker"]) == ("worker", "w-1") for line in lines)
    assert [line["level"] for line in lines] == ["info", "warning", "warning"]
    assert all("timestamp" in line for line in lines)
    assert lines[0]["run"] == "r"


def test_a_field_of_the_line_itself_wins() -> None:
    (line,) = _lines("log.info('handed_over', worker='w-2')")
    assert line["worker"] == "w-2"


def test_the_level_is_a_setting_and_noisy_libraries_are_kept_quiet() -> None:
    # Given
    script = """
        log.debug("detail")
        logging.getLogger("celery").info("noise")
        logging.getLogger("celery").warning("trouble")
        """
    # Then
    assert [line["event"] for line in _lines(script)] == ["trouble"]
    assert [line["event"] for line in _lines(script, PIECEWORK_LOG_LEVEL="debug")] == ["detail", "trouble"]
    assert [line["event"] for line in _lines(script, PIECEWORK_LOG_LEVEL="nonsense")] == ["trouble"]


def test_an_exception_stands_on_one_line() -> None:
    # When
    (line,) = _lines(
        """
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception("failed")
        """
    )
    # Then
    assert "ZeroDivisionError: division by zero" in line["exception"]
