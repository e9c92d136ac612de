"""The rooms are as drawn: imports between them point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optimizer" / "mergetune"
# From the ground up: a room knows those before it, and none after it.
ROOMS = (
    *("errors", "theme", "machine", "files", "space", "weights", "merging", "engines", "evaluation"),
    *(
        "stats",
        "results",
        "importing",
        "measuring",
        "slopes",
        "analysis",
        "gate",
        "report",
        "study",
        "api",
        "cli",
    ),
)


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Return the rooms that a module imports from, wherever in it that is done."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mergetune":
            names += [f"mergetune.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mergetune.")}
    return found - {"__version__"}


def test_every_module_is_in_a_room() -> None:
    entries = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    assert entries - {"__init__", "__pycache__", "py.typed"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_those_below_it(room: str) -> None:
    below = set(ROOMS[: ROOMS.index(room)]) | {room}
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else (PACKAGE / room).rglob("*.py")
    upwards = {str(file.relative_to(PACKAGE)): imported(file) - below for file in files}
    assert not {name: rooms for name, rooms in upwards.items() if rooms}
