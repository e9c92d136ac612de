"""The README is true: its YAML is valid, its commands and files exist, its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from mergetune.cli import app
from mergetune.evaluation.suite import SuiteConfig, read_suite
from mergetune.files.library import presets
from mergetune.files.yaml_io import Strict, validate
from mergetune.results.config import StudyConfig
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.search_space_config import SearchSpaceConfig, read_search_space

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_yaml_block_is_valid() -> None:
    by_key: dict[str, type[Strict]] = {
        "objectives": SuiteConfig,
        "method": SearchSpaceConfig,
        "experts": StudyConfig,
    }
    for text in blocks("yaml"):
        data = yaml.safe_load(text)
        schema = next(schema for key, schema in by_key.items() if key in data)
        validate(data, schema, "README.md")
    assert len(blocks("yaml")) >= 3


@pytest.mark.parametrize(
    ("scorer", "line"),
    zip(["exact", "contains", "regex", "json", "choice"], blocks("jsonl")[0].splitlines(), strict=True),
)
def test_every_line_of_items_suits_its_scorer(scorer: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(line)
    task = {"items": "items.jsonl", "scorer": scorer}
    suite = {"description": "", "chat_template": False, "objectives": {"skill": {"tasks": [task]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert read_suite(tmp_path / "suite.yaml").items["items.jsonl"]


def test_every_command_exists_and_is_listed() -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"mergetune ([a-z]+)", README)) - {"finds"} <= verbs
    assert set(re.findall(r"\| `mergetune ([a-z]+)", README)) == verbs


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("path", presets("search_spaces").values(), ids=lambda path: path.stem)
def test_every_search_space_is_in_the_table(path: Path) -> None:
    assert f"| `{path.stem}` | {read_search_space(path).description} |" in README


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_table(name: MethodName) -> None:
    method = METHODS[name]
    options = ", ".join(f"`{option.name}`" for option in method.options) or "–"
    summary = method.summary.replace("|", "\\|")
    assert f"| `{name}` | {summary} | {method.coefficients} | {options} |" in README


def test_every_option_is_explained_with_its_choices() -> None:
    for option in {option for method in METHODS.values() for option in method.options}:
        assert f"`{option.name}` ({', '.join(f'`{choice}`' for choice in option.choices)})" in README


def test_the_tree_names_every_module() -> None:
    tree = next(block for block in blocks("text") if "cli.py" in block)
    named = set(re.findall(r"(\w+\.py)\b", tree))
    present = {path for path in (ROOT / "optimizer").rglob("*.py") if path.parent.name != "report"}
    assert named == {path.name for path in present} - {"__init__.py"}


def test_pictures_and_pages_that_it_shows_are_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
