"""README and docs are true: their YAML is valid, commands and files exist, generated parts are up to date."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from build_site import build
from generate import PARTS, filled
from mergetune.cli import app
from mergetune.evaluation.item_files import ItemSource, read_items
from mergetune.evaluation.scorers import SCORERS
from mergetune.evaluation.suite import SuiteConfig, TaskConfig, read_suite
from mergetune.files.library import presets
from mergetune.files.yaml_io import Strict, validate
from mergetune.results.config import StudyConfig
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space_config import SearchSpaceConfig, read_search_space
from mergetune.space.stack import Stack
from test_layout import ROOMS

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GROUP: Any = get_command(app)
OPTIONS: dict[str, dict[str, Any]] = {  # that a scorer must be given
    "json_schema": {"schema_file": "call.schema.json"},
    "judge": {"model": "m", "url": "http://localhost", "pairwise": {"reference": "answer"}},
    "python": {"function": "scoring.py:brevity"},
}


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(PAGES[page]) if found == language]


def commands(page: str) -> list[str]:
    """Return what a page tells to type: lines of shell blocks and of indented ones, and code in its text."""
    text = BLOCK.sub("", PAGES[page])
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^    .*$", text, re.MULTILINE)]
    lines += re.findall(r"`((?:mergetune|make|python|pip) [^`]+)`", text)
    return [command for line in lines for command in line.partition(" #")[0].split(" && ") if command.strip()]


ALL_COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
ALL_YAML = [(page, text) for page in PAGES for text in blocks(page, "yaml")]


def starting(word: str) -> list[Any]:
    found = [(page, line) for page, line in ALL_COMMANDS if line.split()[0] == word]
    assert found
    return [pytest.param(line, id=f"{page}: {line}") for page, line in found]


@pytest.mark.parametrize(("page", "text"), ALL_YAML)
def test_every_yaml_block_is_valid(page: str, text: str) -> None:
    by_key: dict[str, type[Strict]] = {
        "objectives": SuiteConfig,
        "method": SearchSpaceConfig,
        "experts": StudyConfig,
        "items": TaskConfig,
        "stack": Stack,
    }
    data = yaml.safe_load(text)
    schema = next(schema for key, schema in by_key.items() if key in data)
    validate(data, schema, page)


def test_every_file_of_yaml_is_shown() -> None:
    assert len(ALL_YAML) >= 7
    shown = {key for _, text in ALL_YAML for key in yaml.safe_load(text)}
    assert shown >= StudyConfig.model_fields.keys() - {"cache", "allow_flat_objectives"}


@pytest.mark.parametrize(
    ("scorer", "line"),
    zip(SCORERS, blocks("suites.md", "jsonl")[0].splitlines(), strict=True),
)
def test_every_line_of_items_suits_its_scorer(scorer: str, line: str, tmp_path: Path) -> None:
    assert f"\n| `{scorer}` |" in PAGES["suites.md"]
    (tmp_path / "items.jsonl").write_text(line)
    (tmp_path / "call.schema.json").write_text(blocks("suites.md", "json")[0])
    (tmp_path / "scoring.py").write_text(blocks("suites.md", "python")[0])
    task = {"items": "items.jsonl", "scorer": {"kind": scorer, **OPTIONS.get(scorer, {})}}
    suite = {"description": "", "chat_template": True, "objectives": {"skill": {"tasks": [task]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**suite, "allow_code_execution": True}))
    assert read_suite(tmp_path / "suite.yaml").items["items.jsonl"]


@pytest.mark.parametrize("scorer", OPTIONS)
def test_what_a_scorer_must_be_given_is_shown(scorer: str) -> None:
    page = PAGES["suites.md"]
    assert f"kind: {scorer}" in page
    assert all(f"{key}: " in page for key in OPTIONS[scorer])


@pytest.mark.parametrize(
    ("name", "section"), re.findall(r"^### (.+)\n((?:(?!^#).*\n)+)", PAGES["items.md"], re.MULTILINE)
)
def test_every_example_of_a_form_is_read_as_that_form(name: str, section: str, tmp_path: Path) -> None:
    rows, *answers = [text for language, text in BLOCK.findall(section) if language == "jsonl"]
    (tmp_path / "items.jsonl").write_text(rows)
    (tmp_path / "answers.jsonl").write_text("".join(answers))
    source = ItemSource("items.jsonl", answers="answers.jsonl" if answers else None)
    found = read_items(source, tmp_path)
    assert found.form.startswith(name)
    assert len(found.items) == len(rows.splitlines())
    assert all(item.answer is not None for item in found.items)


@pytest.mark.parametrize("line", starting("mergetune"))
def test_every_command_is_one_that_mergetune_takes(line: str) -> None:
    _, *words = shlex.split(line)
    if words and not words[0].startswith("-"):
        verb, *rest = words
        command = GROUP.commands[verb]
        is_whole = bool(rest) or not any(each.required for each in command.params)
        command.make_context(verb, rest, resilient_parsing=not is_whole)


def test_every_command_is_listed() -> None:
    listed = re.findall(r"\| `mergetune ([a-z]+)", PAGES["commands.md"])
    assert set(listed) == set(GROUP.commands)


@pytest.mark.parametrize("line", starting("make"))
def test_every_make_target_exists(line: str) -> None:
    assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("line", starting("python"))
def test_every_script_exists_and_takes_its_options(line: str) -> None:
    script, *arguments = shlex.split(line)[1:]
    if script == "-m":
        return
    text = (ROOT / script).read_text(encoding="utf-8")
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in text


@pytest.mark.parametrize("line", starting("pip"))
def test_every_extra_exists(line: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[([\w-]+)\]", line)) <= extras.keys()


@pytest.mark.parametrize("path", presets("search_spaces").values(), ids=lambda path: path.stem)
def test_every_search_space_is_in_the_table(path: Path) -> None:
    assert f"| `{path.stem}` | {read_search_space(path).description} |" in PAGES["search-spaces.md"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_table(name: MethodName) -> None:
    method = METHODS[name]
    options = ", ".join(f"`{option.name}`" for option in method.options) or "–"
    summary = method.summary.replace("|", "\\|")
    row = f"| `{name}` | {summary} | {method.coefficients} | {options} |"
    assert row in PAGES["search-spaces.md"]


def test_every_option_is_explained_with_its_choices() -> None:
    for option in {option for method in METHODS.values() for option in method.options}:
        choices = ", ".join(f"`{choice}`" for choice in option.choices)
        assert f"`{option.name}` ({choices})" in PAGES["search-spaces.md"]


def test_the_list_names_every_module() -> None:
    named = re.findall(r"^\| `([\w/]+\.py)` \|", PAGES["architecture.md"], re.MULTILINE)
    present = [path.name for path in (ROOT / "optimizer").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(Path(name).name for name in named) == sorted(present)


def test_the_rooms_are_listed_from_the_ground_up() -> None:
    section = PAGES["architecture.md"].partition("## Rooms")[2].partition("## Modules")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(ROOMS)


@pytest.mark.parametrize("page", PAGES)
def test_generated_parts_are_as_they_would_be_written_now(page: str) -> None:
    assert filled(PAGES[page]) == PAGES[page], "run: python docs/generate.py"


def test_every_generated_part_has_its_place() -> None:
    found = re.findall(r"<!-- generated: ([\w ]+) -->", "".join(PAGES.values()))
    assert sorted(found) == sorted(PARTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.name))
def test_pictures_and_pages_that_it_shows_are_there(file: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)[)#]", PAGES[file.name]):
        assert (file.parent / link).exists(), link


def test_the_readme_is_a_door_to_every_page() -> None:
    assert set(re.findall(r"\]\(docs/([\w-]+\.md)\)", PAGES["README.md"])) == {
        path.name for path in (ROOT / "docs").glob("*.md")
    }
    assert len(PAGES["README.md"].splitlines()) <= 130


def test_the_site_is_built_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    assert build(tmp_path) == 0
    pages = list((tmp_path / "site").glob("**/index.html"))
    assert len(pages) > len(FILES)
    for page in pages:
        html = re.sub(
            r"(<script[^>]*>).*?</script>", r"\1", page.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        for link in re.findall(r'<(?:a|img|link|script)\b[^>]*? (?:href|src)="([^":#?]+)["#?]', html):
            assert (page.parent / link).exists(), f"{page}: {link}"
        assert not re.search(r'<(?:img|link|script)\b[^>]*? (?:href|src)="(?:https?:)?//', html)


def test_the_report_of_the_demo_names_no_folder_of_the_machine_that_made_it() -> None:
    """Its recipes can be merged in a clone: they name the experts relative to their own file."""
    example = ROOT / "reports" / "example"
    recipes = sorted((example / "recipes").glob("*.yaml"))
    assert recipes
    for file in recipes:
        recipe = MergeRecipe.read(file)
        for name, source in recipe.experts.items():
            given = yaml.safe_load(file.read_text(encoding="utf-8"))["experts"][name]["path"]
            assert not Path(given).is_absolute(), file
            assert (file.parent / given).is_dir(), file
            assert source.digest
    page = (example / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r"<code>([^<]*)</code>", page)
    assert shown
    assert [text for text in shown if re.search(r"(^|\s)/\w", text)] == []
