"""Where things are: the YAML files that ship with mergetune, found by name, and the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from optimizer.errors import MergetuneError
from optimizer.yaml_io import nearest

Kind = Literal["search_spaces", "evals", "examples", "reports"]

_PACKAGE = Path(__file__).parent


def shared_folder(kind: Kind) -> Path:
    """Return the folder of a kind of content: in the wheel, or beside the package in a checkout."""
    shipped = _PACKAGE / "_share" / kind
    return shipped if shipped.is_dir() else _PACKAGE.parent / kind


def presets(kind: Kind) -> dict[str, Path]:
    """List the presets of a kind by name."""
    return {path.stem: path for path in sorted(shared_folder(kind).glob("*.yaml"))}


def find(kind: Kind, name: str, folder: Path) -> Path:
    """Return the file of a preset's name, or of a path relative to `folder`.

    Raises:
        MergetuneError: it is neither.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = (folder / name).expanduser().resolve()
        if not path.is_file():
            raise MergetuneError(f"{path}: there is no such file. Give a path relative to {folder}.")
        return path
    found = presets(kind)
    if name not in found:
        raise MergetuneError(
            f"`{name}` is no preset of {kind}.{nearest(name, found)} "
            f"To name a file instead, give its path with `.yaml`."
        )
    return found[name]


def cache_folder() -> Path:
    """Return where things made once per machine are kept; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mergetune"
