"""References to models in mergekit's configurations: a directory or a hub id, also with an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.importing.notes import Notes, Place
from mergetune.results.config import TAKEN
from mergetune.weights.models import check_reference, short_name


@dataclass(frozen=True)
class Reference:
    """A model, or a model with a LoRA adapter merged in, as a configuration names it."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"


def read_reference(notes: Notes, place: Place) -> Reference:
    """Read the reference at a place, as text or as a mapping; refuse what is none."""
    given = notes.at(place)
    if isinstance(given, dict):
        if given.get("override_architecture"):
            notes.remark(
                (*place, "override_architecture"), "left out: the architecture is what the model's files say."
            )
        given = "+".join(_path(given[key]) for key in ("model", "lora") if given.get(key) is not None)
    parts = str(given).split("+")
    if not isinstance(given, str) or not all(parts) or len(parts) > 2 or any(x.count("@") > 1 for x in parts):
        notes.refuse(place, "must be a directory or a hub id, also as `model+adapter` or with `@revision`.")
        return Reference("?")
    return Reference(*parts)


def _path(given: Any) -> str:
    if not isinstance(given, dict):
        return str(given)
    revision = given.get("revision")
    return f"{given.get('path', '')}@{revision}" if revision else str(given.get("path", ""))


class Places:
    """Where the models of a configuration are, as a recipe names them.

    Args:
        notes: are told which model is not here.
        handles: by the name of a merge in the same file the directory that its model is to be in.
    """

    def __init__(self, notes: Notes, handles: Mapping[str, str]) -> None:
        self._notes = notes
        self.handles = handles
        self.used: set[str] = set()  # of the handles

    def path(self, reference: str, place: Place) -> str:
        """Return the path or hub id of a model.

        mergekit takes relative paths from the folder that it runs in: from this one, or else from the file's.
        """
        if reference in self.handles:
            self.used.add(reference)
            return self.handles[reference]
        folders = (Path(), self._notes.file.parent)
        path = next((folder / reference for folder in folders if (folder / reference).is_dir()), None)
        if path is not None:
            return str(path.resolve())
        try:
            check_reference(reference, Path())
        except MergetuneError:
            self._notes.remark(place, "there is no such directory here: put its place into the file written.")
        return reference


def expert_names(references: Iterable[Reference]) -> dict[Reference, str]:
    """Return names that experts of a study may have: short, plain and distinct."""
    names: dict[Reference, str] = {}
    for reference in references:
        short = short_name(reference.lora or reference.model).rpartition("/")[2].partition("@")[0]
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", short).strip("-") or "expert"
        stem, number = f"{plain}-expert" if plain in TAKEN else plain, 1
        while (name := stem if number == 1 else f"{stem}-{number}") in names.values():
            number += 1
        names[reference] = name
    return names


def source_paths(
    notes: Notes, places: Places, base: Reference, found: Mapping[Reference, Place], base_place: Place
) -> tuple[str, dict[Reference, str]]:
    """Return where the base is, and each expert; refuse adapters that are none of the base.

    Args:
        notes: are told what is refused.
        places: of models.
        base: the base.
        found: the experts and where they stand in the file.
        base_place: where the base stands.
    """
    remedy = "Merge it first (`mergetune merge`, or peft's `merge_and_unload`) and name the directory."
    if base.lora is not None:
        notes.refuse(base_place, f"the base must be a model without an adapter. {remedy}")
    paths = {}
    for expert, place in found.items():
        if expert.lora is not None and expert.model != base.model:
            notes.refuse(place, f"an adapter must be one of the base, `{base}`. {remedy}")
        paths[expert] = places.path(expert.lora or expert.model, place)
    return places.path(base.model, base_place), paths
