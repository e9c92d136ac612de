"""Importing configurations that are given as text."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import parse_documents
from mergetune.importing.importer import Imported, import_file
from mergetune.importing.notes import Notes
from mergetune.importing.recipes import recipe_of
from mergetune.importing.references import Places
from mergetune.space.recipe import MergeRecipe


def take(text: str, out: Path, **options: Any) -> Imported:
    """Import a configuration."""
    file = out.with_name(f"{out.stem}-config.yml")
    file.write_text(textwrap.dedent(text))
    return import_file(file, out, **options)


def refusal(text: str, out: Path) -> str:
    """Return why a configuration cannot be taken over; nothing may be written."""
    with pytest.raises(MergetuneError) as caught:
        take(text, out)
    assert not out.exists()
    return str(caught.value)


def read_merge(text: str) -> MergeRecipe:
    """Return the recipe of a configuration of mergekit."""
    (document,) = parse_documents(textwrap.dedent(text), "config.yml")
    notes = Notes(Path("config.yml"), document)
    return recipe_of(notes, Places(notes, {}))
