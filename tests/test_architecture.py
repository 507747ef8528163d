"""ARCHITECTURE.md and the READMEs name only what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")


def names_in(path: Path) -> set[str]:
    """Functions, methods and classes that a module defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("name", re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "ARCHITECTURE.md").read_text()))
def test_what_the_architecture_names_is_there(name: tuple[str, str]) -> None:
    # given a file, and maybe something in it, that a step names
    path, defined = name
    places = [ROOT / path, *(ROOT / folder / path for folder in ("api", "jobs", "worker", "storage", "billing"))]

    # then both exist
    found = [place for place in places if place.exists()]
    assert found, path
    assert not defined or defined in names_in(found[0]), f"{path} has no {defined}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    # given the relative links of a document
    text = (ROOT / document).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]

    # then each leads to a file
    missing = [link for link in links if link and not ((ROOT / document).parent / link).exists()]
    assert not missing
