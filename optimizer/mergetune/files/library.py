"""Where things are: the YAML files that ship with mergetune, found by name, and the cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mergetune.errors import MergetuneError
from mergetune.files.scratch import scratch_folder
from mergetune.files.yaml_io import nearest

Kind = Literal["search_spaces", "evals", "examples", "reports"]

_PACKAGE = Path(__file__).parents[1]
_CACHE = "MERGETUNE_CACHE"  # set by `use_cache`
# What vLLM and Triton would write into this user's home.
_CACHES_OF_OTHERS = {"VLLM_CACHE_ROOT": "vllm", "VLLM_CONFIG_ROOT": "vllm", "TRITON_CACHE_DIR": "triton"}


def shared_folder(kind: Kind) -> Path:
    """Return the folder of a kind of content: in the wheel, or at the root of a checkout."""
    shipped = _PACKAGE / "_share" / kind
    return shipped if shipped.is_dir() else _PACKAGE.parents[1] / kind


def presets(kind: Kind) -> dict[str, Path]:
    """List the presets of a kind by name."""
    return {path.stem: path for path in sorted(shared_folder(kind).glob("*.yaml"))}


def placed(folder: Path, given: str) -> Path:
    """Return the place of a path that is absolute, begins with `~`, or is relative to `folder`."""
    return folder / Path(given).expanduser()


def find(kind: Kind, name: str, folder: Path) -> Path:
    """Return the file of a preset's name, or of a path relative to `folder`.

    Raises:
        MergetuneError: it is neither.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = placed(folder, name).resolve()
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


def use_cache(given: Path | None, say: Callable[[str], object]) -> None:
    """Settle before any work where things made once per machine are kept, in processes started here, too.

    Where this user's cache cannot be written, a temporary folder takes its place, and `say` is told so.

    Raises:
        MergetuneError: `given` cannot be written, or no temporary folder can be made.
    """
    own = cache_folder()
    folder = own if given is None else given.expanduser().resolve()
    try:
        folder = writable(folder, "--cache")
    except MergetuneError as error:
        if given is not None:
            raise
        folder = _temporary_folder(error)
        say(
            f"warning: {own} cannot be written: what is kept there for the next time goes into a temporary "
            "folder, and is lost at the end. Name another folder with --cache DIR."
        )
    if folder != own:
        os.environ[_CACHE] = str(folder)
        for variable, name in _CACHES_OF_OTHERS.items():
            os.environ.setdefault(variable, str(folder / name))


def cache_folder() -> Path:
    """Return where things made once per machine are kept; it may not exist yet."""
    chosen = os.environ.get(_CACHE)
    return Path(chosen) if chosen else _own_cache()


def in_cache(name: str) -> Path:
    """Return the place of a thing in the cache: where it is, though that be read-only, or is to be made."""
    folders = (cache_folder(), _own_cache())
    return next((folder / name for folder in folders if (folder / name).exists()), folders[0] / name)


def writable(folder: Path, option: str) -> Path:
    """Return a folder, made if need be; raises `MergetuneError` naming the option where it is read-only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise MergetuneError(
            f"{folder}: must be a folder that can be written ({error.strerror}). "
            f"Name another with {option} DIR."
        ) from error


def _own_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mergetune"


def _temporary_folder(reason: MergetuneError) -> Path:
    try:
        return scratch_folder()
    except OSError as error:
        raise MergetuneError(f"{reason} There is no temporary folder either: {error}") from error
