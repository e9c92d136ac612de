"""Reading a configuration from elsewhere, and writing what mergetune makes of it."""

from __future__ import annotations

import graphlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mergetune.errors import MergetuneError
from mergetune.files.atomic_files import write_text
from mergetune.files.library import writable
from mergetune.files.yaml_io import Document, parse_documents, read_text, to_yaml
from mergetune.importing.evolve import study_of
from mergetune.importing.notes import Notes, Remark
from mergetune.importing.recipes import recipe_of
from mergetune.importing.references import Places

_KINDS = "a merge of mergekit (`merge_method`) or a search of mergekit-evolve (`genome`)"
_RECIPE = "recipe"  # the name of a merge that has none


@dataclass(frozen=True)
class Imported:
    """What an import wrote, and what it has to say.

    Attributes:
        files: the files, in the order in which they are used.
        remarks: what became of settings that have no counterpart, by line.
        commands: what to type next.
    """

    files: tuple[Path, ...]
    remarks: tuple[Remark, ...]
    commands: tuple[str, ...]


@dataclass
class _Written:
    """Texts by the names of their files, before any is written."""

    texts: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def add(self, name: str, content: str, notes: Notes) -> None:
        """Add a file, with the remarks at its top."""
        lines = [f"Imported from {notes.file.name}.", *map(str, notes.remarks)]
        self.texts[name] = "".join(f"# {line}\n" for line in lines) + content


def import_file(
    file: Path, out: Path, layers: int | None = None, include_path: Path | None = None
) -> Imported:
    """Write what a configuration of mergekit or mergekit-evolve is in mergetune: all of it, or nothing.

    Args:
        file: the configuration.
        out: a new folder or, for a single recipe, a new file that ends in .yaml.
        layers: the number of the models' layers, where their files are not at hand.
        include_path: where lm-eval finds tasks of one's own.

    Raises:
        MergetuneError: something has no counterpart, or the place is taken or cannot be written.
    """
    documents = parse_documents(read_text(file), str(file))
    if not documents:
        raise MergetuneError(f"{file}: must be {_KINDS}, but is empty.")
    for document in documents:
        _check_kind(file, document, len(documents))
    is_search = "genome" in documents[0].data
    is_file = out.suffix in (".yaml", ".yml")
    if out.exists() or (is_file and (is_search or len(documents) > 1)):
        what = "there is one already" if out.exists() else "this import writes several files"
        raise MergetuneError(
            f"{out}: must be a new {'file' if is_file else 'folder'}, but {what}. Name another."
        )
    written = _Written()
    if is_search:
        _add_study(written, Notes(file, documents[0]), layers, include_path)
    else:
        _add_recipes(written, file, documents, layers)
    folder = out.parent if is_file else out
    writable(folder, "--out")
    paths = [out if is_file else folder / name for name in written.texts]
    for path, text in zip(paths, written.texts.values(), strict=True):
        write_text(path, text)
    return Imported(tuple(paths), tuple(written.remarks), _commands(paths, is_search))


def _check_kind(file: Path, document: Document, n_documents: int) -> None:
    data = document.data if isinstance(document.data, dict) else {}
    if "gate_mode" in data or ("experts" in data and "base_model" in data and "merge_method" not in data):
        raise MergetuneError(
            f"{file}: is of mergekit-moe, which builds a mixture of experts: another architecture, whose "
            "routers no merge of weights can make. Build it with mergekit, and give its model to mergetune."
        )
    if "merge_method" not in data and ("genome" not in data or n_documents > 1):
        found = ", ".join(map(str, list(data)[:5])) or "no key"
        raise MergetuneError(f"{file}: line {document.line(())}: must be {_KINDS}, but has {found}.")


def _add_recipes(written: _Written, file: Path, documents: Sequence[Document], layers: int | None) -> None:
    """Add a recipe for every merge, those first that others build on."""
    names = [_name(document, file, len(documents)) for document in documents]
    if twice := {name for name in names if names.count(name) > 1}:
        raise MergetuneError(f"{file}: merges must have distinct names (`name`), but two are {twice.pop()}.")
    handles = [_handles(document, name) for document, name in zip(documents, names, strict=True)]
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    recipes: dict[str, tuple[str, Notes]] = {}
    for document, name in zip(documents, names, strict=True):
        notes = Notes(file, document)
        places = Places(notes, {key: value for each in handles for key, value in each.items()})
        recipes[name] = to_yaml(recipe_of(notes, places, layers)), notes
        order.add(name, *(Path(places.handles[used]).name for used in places.used))
        written.remarks += notes.remarks
    try:
        for name in order.static_order():
            written.add(f"{name}.yaml", *recipes[name])
    except graphlib.CycleError as error:
        raise MergetuneError(f"{file}: merges must not build on each other in a circle: {error}.") from error


def _name(document: Document, file: Path, n_documents: int) -> str:
    given = document.data.get("name") or document.data.get("out_path")
    if n_documents == 1:
        return _RECIPE
    return Path(str(given)).name if given else file.stem


def _handles(document: Document, name: str) -> Mapping[str, str]:
    """Return what other merges of the file call this one's model, and where it is to be."""
    given = (document.data.get(key) for key in ("name", "out_path"))
    return {str(each): name for each in given if each}


def _add_study(written: _Written, notes: Notes, layers: int | None, include_path: Path | None) -> None:
    tasks = str(include_path.resolve()) if include_path else None
    found = study_of(notes, Places(notes, {}), layers, tasks)
    written.add("study.yaml", _yaml(found.study), notes)
    written.texts |= {"search_space.yaml": _yaml(found.search_space), "suite.yaml": _yaml(found.suite)}
    written.remarks += notes.remarks


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=100)


def _commands(paths: Sequence[Path], is_search: bool) -> tuple[str, ...]:
    if is_search:
        return (shlex.join(["mergetune", "run", str(paths[0]), "--dry-run"]),)
    models = ["OUT"] if len(paths) == 1 else [str(path.with_suffix("")) for path in paths]
    return tuple(
        shlex.join(["mergetune", "merge", str(path), model])
        for path, model in zip(paths, models, strict=True)
    )
