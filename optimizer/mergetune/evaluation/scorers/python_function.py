"""The scorer `python`: a function in a file beside the suite gives the scores."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from numbers import Real
from pathlib import Path
from types import CodeType, ModuleType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer
from mergetune.files.library import placed

Function = Callable[[list[Item], list[str]], Sequence[Any]]


class PythonScorer(BaseScorer):
    """The scores of `function`, which is given the items and their replies, and returns a number for each.

    `function` is `FILE.py:NAME`, relative to the suite's folder. The file may import modules beside it at its
    top, not inside functions. Their content belongs to the rules, as the file's does.
    """

    needs = "what the function needs; `answer` as an example"
    scores = "what the function `FILE.py:NAME` returns for it: a number in [0, 1]"
    reads_metadata = True

    kind: Literal["python"] = "python"
    function: Annotated[str, Field(pattern=r"^.+\.py:[^\W\d]\w*$")]

    _file: Path = PrivateAttr(default=Path())
    _files: tuple[Path, ...] = PrivateAttr(default=())
    _function: Any = PrivateAttr(default=None)

    @property
    def files(self) -> tuple[Path, ...]:
        """See `BaseScorer.files`."""
        return self._files

    def with_files(self, folder: Path, items: Sequence[Item]) -> Self:  # noqa: ARG002
        """See `BaseScorer.with_files`."""
        given, _, name = self.function.rpartition(":")
        file = placed(folder, given).resolve()
        if not file.is_file():
            raise MergetuneError(f"{file}: there is no such file. `function` names one relative to {folder}.")
        loaded, found = _loaded(file), self.model_copy()
        found._file, found._files = file, loaded.files
        found._function = getattr(loaded.module, name, None)
        if not callable(found._function):
            raise MergetuneError(f"{file}: must have the function `{name}(items, replies)`.")
        return found

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        if not items:
            return []
        try:
            returned = self._function(list(items), list(replies))
        except Exception as error:  # whatever a user's code raises
            raise MergetuneError(self._problem(items, replies, error)) from error
        return self._checked(items, returned)

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`; what an item needs, the function alone knows."""
        return self.missing_answer(is_example) if is_example and item.answer is None else None

    def wanted_reply(self, item: Item) -> None:
        """See `BaseScorer.wanted_reply`: the answer may be anything."""

    def _problem(self, items: Sequence[Item], replies: Sequence[str], error: Exception) -> str:
        """Say where an exception was raised, and at which item, where one alone raises one."""
        culprit = ""
        for item, reply in zip(items, replies, strict=True):
            try:
                self._function([item], [reply])
            except Exception as own:  # as above
                culprit, error = f" at {_named(item)}", own
                break
        return f"`{self.function}` raised an exception{culprit}: {_place(error, self._file.parent)}"

    def _checked(self, items: Sequence[Item], returned: Any) -> list[float]:
        """Return the scores as numbers, or raise what is wrong with them."""
        try:
            scores = list(returned)
        except TypeError:
            scores = []
        if len(scores) != len(items):
            raise MergetuneError(
                f"`{self.function}` must return a list of one number for each of {len(items)} items, but "
                f"returned {returned!r:.80}."
            )
        for item, score in zip(items, scores, strict=True):
            if not isinstance(score, Real) or not 0 <= float(score) <= 1:  # nor is NaN within
                raise MergetuneError(
                    f"`{self.function}` must return numbers in [0, 1], but returned {score!r:.80} for "
                    f"{_named(item)}."
                )
        return [float(score) for score in scores]


def _named(item: Item) -> str:
    own = item.metadata.get("id") if isinstance(item.metadata, dict) else None
    return f"the item {'' if own is None else f'`{own}` '}{item.prompt[:80]!r}"


@dataclass(frozen=True)
class _Loaded:
    """A file as a module, with the files beside it that it imported, and what these held."""

    module: ModuleType
    files: tuple[Path, ...]
    digest: str


_LOADED: dict[Path, _Loaded] = {}


def _loaded(file: Path) -> _Loaded:
    """Load a file as a module, anew only where its content or that of a module beside it has changed.

    Raises:
        MergetuneError: it cannot be loaded.
    """
    known = _LOADED.get(file)
    if known is None or known.digest != _digest(known.files):
        known = _LOADED[file] = _load(file)
    return known


class _FromSource(SourceFileLoader):
    """Compiles what a file holds now: Python's own cache is stale after a change within the same second."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _load(file: Path) -> _Loaded:
    name = f"mergetune_scoring_{file.stem}"
    loader = _FromSource(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None  # it has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with _importing_from(file.parent) as imported:
            loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise MergetuneError(f"{file}: cannot be loaded: {_place(error, file.parent)}") from error
    files = (file, *sorted(imported))
    return _Loaded(module, files, _digest(files))


@contextmanager
def _importing_from(folder: Path) -> Iterator[set[Path]]:
    """Find modules in a folder first; yields a set that then holds the files of those imported.

    They are forgotten at the end, for another folder may have modules of these names.
    """
    imported: set[Path] = set()
    find = FileFinder.path_hook((ExtensionFileLoader, EXTENSION_SUFFIXES), (_FromSource, SOURCE_SUFFIXES))

    def find_within(path: str) -> Any:
        if folder not in (Path(path), *Path(path).parents):
            raise ImportError
        return find(path)

    sys.path.insert(0, str(folder))
    sys.path_hooks.insert(0, find_within)
    sys.path_importer_cache.clear()
    before = set(sys.modules)
    try:
        yield imported
    finally:
        sys.path.remove(str(folder))
        sys.path_hooks.remove(find_within)
        sys.path_importer_cache.clear()
        for name in sys.modules.keys() - before:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/")
            if folder in file.parents:
                imported.add(file)
                del sys.modules[name]


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files if file.exists())).hexdigest()


def _place(error: BaseException, folder: Path) -> str:
    """Return an exception in words, with the last line of the user's own that it came through."""
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if folder in Path(frame.filename).parents]
    if not own:  # as with a syntax error, which names the place itself
        return f"{said}."
    return f"{said} ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})."
