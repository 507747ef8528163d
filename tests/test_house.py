"""Rules of the house that are worth keeping."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import settings_table
from tests.settings_table import CLASSES, PAGE

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "jobs", "worker", "storage", "billing")
HEAVY = ("torch", "transformers", "peft")
WALL_CLOCK = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow)\(|\bclock\.now\(")
KEEPS_TIME = {
    "storage/clock.py": "is the clock",
    "storage/database.py": "judges time on SQLite, where all processes have one clock",
    "storage/atomic_file.py": "holds it against the times of files on the same machine",
    "api/cli/broker.py": "names a directory",
}
# Directories of one machine: a home directory, a work place. What an image or a test makes by itself is none.
PATHS_OF_A_MACHINE = re.compile(rb"(?<![\w.])/(?:" + rb"|".join((b"work", b"home/[a-z]+", b"Users", b"root")) + rb")/")


def _files() -> list[Path]:
    """What the repository holds, and what is about to be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("modules", ["api.__main__, api.app, api.cli", "jobs.scheduler, billing.cost, storage.open"])
def test_only_a_worker_loads_torch(modules: str) -> None:
    # When
    script = f"import {modules}, sys; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    # Then
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["worker", "--help"]])
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    # When
    script = (
        "import sys\n"
        "from api.cli import main\n"
        f"sys.argv = ['piecework', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print(sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    # Then
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_clock_but_the_databases_decides_anything() -> None:
    """Processes of one service may disagree about the time of day."""
    # When
    code = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in code if WALL_CLOCK.search(path.read_text())}
    # Then
    assert found == KEEPS_TIME.keys()


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_every_setting_says_what_it_means(settings: type) -> None:
    undescribed = [name for name, field in settings.model_fields.items() if not field.description]  # type: ignore[attr-defined]
    assert undescribed == []


def test_the_page_of_settings_is_that_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == settings_table.render(), "run: python -m tests.settings_table"


def test_a_variable_that_several_processes_read_means_the_same_to_all() -> None:
    # Given
    defaults: dict[str, set[str]] = {}
    for settings in CLASSES:
        for name, field in settings.model_fields.items():
            defaults.setdefault(name, set()).add(f"{field.annotation} = {field.default!r}")
    # Then
    assert {name: meanings for name, meanings in defaults.items() if len(meanings) > 1} == {}


def test_every_settings_class_stands_on_the_page() -> None:
    # When
    found = {
        f"{path.parent.name}.settings"
        for path in ROOT.glob("*/settings.py")
        if path.parent.name in PACKAGES and "BaseSettings" in path.read_text()
    }
    # Then
    assert found == {settings.__module__ for settings in CLASSES}


def test_no_file_names_a_path_of_one_machine() -> None:
    # When
    found = [str(path.relative_to(ROOT)) for path in _files() if PATHS_OF_A_MACHINE.search(path.read_bytes())]
    # Then
    assert found == [], "write paths relative to the repository, or take them from a setting"


def test_nothing_is_ever_unpickled() -> None:
    # Given
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    # When
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in PACKAGES
        for name in _imported(path)
        if name.partition(".")[0] in forbidden
    ]
    # Then
    assert found == []


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return names


def test_every_test_file_has_a_name_that_is_its_own_in_its_folder() -> None:
    """A test that is named like another one in its file would replace it unseen."""
    for path in _files():
        if path.suffix == ".py" and path.name.startswith("test_"):
            names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert len(names) == len(set(names)), path
