"""Write the parts of the docs that are drawn from the code.

    python docs/generate.py

A page marks such a part by `<!-- generated: NAME -->` and `<!-- end -->`. `tests/test_docs.py` fails where a
page differs from what this writes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from typer.main import get_command

from mergetune.cli import app
from mergetune.evaluation.formats import form_rows
from mergetune.evaluation.scorers import scorer_rows
from mergetune.evaluation.suite import SuiteConfig
from mergetune.files.library import presets
from mergetune.files.yaml_io import read_yaml
from mergetune.space.method_table import METHODS, Parameter, SearchInterval
from mergetune.space.search_space_config import read_search_space

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "optimizer" / "mergetune"
_WIDTH = 100  # of the help, in characters
_PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    header = tuple(header)
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (header, *rows)]
    lines.insert(1, " | ".join("---" for _ in header))
    return "".join(f"| {line} |\n" for line in lines)


def search_spaces() -> str:
    """List the presets of search spaces."""
    found = presets("search_spaces").items()
    rows = [(f"`{name}`", read_search_space(path).description) for name, path in found]
    return table(("preset", "what it is for"), rows)


def suites() -> str:
    """List the presets of suites."""
    rows = [
        (f"`{name}`", read_yaml(path, SuiteConfig).description) for name, path in presets("evals").items()
    ]
    return table(("preset", "what it measures"), rows)


def scorers() -> str:
    """List the scorers of JSONL items."""
    rows = [(f"`{kind}`", needs, scores) for kind, needs, scores in scorer_rows()]
    return table(("scorer", "an item needs", "the score of an item"), rows)


def forms() -> str:
    """List the forms that items are read in."""
    return table(("form", "keys", "what becomes of them"), form_rows())


def methods() -> str:
    """List the merge methods with their coefficients and options."""
    rows = [
        (f"`{name}`", method.summary, method.coefficients, _names(o.name for o in method.options))
        for name, method in METHODS.items()
    ]
    return table(("method", "merged weights", "coefficients", "options"), rows)


def options() -> str:
    """List the options of the methods with their choices."""
    found = dict.fromkeys(option for method in METHODS.values() for option in method.options)
    return "".join(f"- `{o.name}` ({_names(o.choices)}): {o.meaning}.\n" for o in found)


def coefficients() -> str:
    """List the coefficients with what a search space takes where it says nothing."""
    takers: dict[Parameter, list[str]] = {}
    for name, method in METHODS.items():
        for parameter in method.parameters:
            takers.setdefault(parameter, []).append(name)
    rows = [
        (f"`{p.name}`", p.meaning, str(p.valid), _default(p.default), _names(names))
        for p, names in takers.items()
    ]
    return table(("coefficient", "meaning", "valid", "by default", "methods"), rows)


def modules() -> str:
    """List the modules of each room by the first lines of their docstrings."""
    rooms = sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    alone = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    parts = [f"### `{PACKAGE.name}/`\n\n{_rows(PACKAGE, alone)}"]
    for room in rooms:
        inside = sorted(path for path in room.rglob("*.py") if path.name != "__init__.py")
        parts.append(f"### `{room.name}/`\n\n{_first_line(room / '__init__.py')}\n\n{_rows(room, inside)}")
    return "\n" + "\n".join(parts)


def commands() -> str:
    """Return the help of every command, as `--help` prints it where there is no colour."""
    root: Any = get_command(app)
    rows = [(f"`mergetune {name}`", each.help.partition("\n")[0]) for name, each in root.commands.items()]
    named = {"mergetune": root, **{f"mergetune {name}": each for name, each in root.commands.items()}}
    sections = [f"## {name}\n\n```text\n{_help(each, name)}\n```\n" for name, each in named.items()]
    return "\n".join([table(("command", "what it does"), rows), *sections])


PARTS: dict[str, Callable[[], str]] = {
    "search spaces": search_spaces,
    "suites": suites,
    "scorers": scorers,
    "forms": forms,
    "methods": methods,
    "options": options,
    "coefficients": coefficients,
    "modules": modules,
    "commands": commands,
}


def filled(page: str) -> str:
    """Return a page with its generated parts as they should be now."""
    return _PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]().strip()}\n\n{part[3]}", page)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def _default(default: SearchInterval | float) -> str:
    if isinstance(default, float):
        return f"held at {default:g}"
    grid = "" if default.step is None else f" on a grid of {default.step:g}"
    return f"searched in [{default.low:g}, {default.high:g}]{grid}"


def _rows(folder: Path, files: Iterable[Path]) -> str:
    rows = [(f"`{file.relative_to(folder).as_posix()}`", _first_line(file)) for file in files]
    return table(("module", "what it does"), rows)


def _first_line(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _help(command: Any, name: str) -> str:
    command.rich_markup_mode = None  # no boxes, which would be as wide as the terminal
    context = command.context_class(command, info_name=name, terminal_width=_WIDTH)
    return str(command.get_help(context)).strip()


def main() -> None:
    """Rewrite every page whose generated parts have changed."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(DOCS.parent)}: written")


if __name__ == "__main__":
    main()
