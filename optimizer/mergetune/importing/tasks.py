"""The tasks of mergekit-evolve as a suite: an objective for each, which are not added up to one score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergetune.importing.notes import Notes, Place

NOT_READ = "left out: mergekit-evolve does not read it either."
_CHOICES = ("metric", "filter")  # what tells objectives of one task apart


def suite_of(notes: Notes, data: Mapping[str, Any], include_path: str | None) -> dict[str, Any]:
    """Return the suite of a configuration: its tasks as objectives, each with its weight.

    Args:
        notes: are told what becomes of tasks, and what is refused.
        data: the configuration.
        include_path: where lm-eval finds tasks of one's own.
    """
    objectives: dict[str, Any] = {}
    for place in notes.entries(("tasks",)) if data.get("tasks") is not None else []:
        given = notes.at(place)
        given = {"name": given} if isinstance(given, str) else notes.mapping(place, ["name"])
        for key in (key for key in given if key not in ("name", "weight", "metric")):
            notes.remark((*place, key), NOT_READ)
        objective = _objective(notes, place, given, data)
        if objective is not None:
            name, task = str(given.get("name")), objective["tasks"][0]
            if any(task == each["tasks"][0] for each in objectives.values()):
                notes.refuse(place, "must be there once only with the same metric.")
            parts = [name, *(task[choice] for choice in _CHOICES if choice in task)]
            objectives["-".join(parts) if name in objectives else name] = objective
    is_chat = data.get("apply_chat_template", True)
    notes.remark(
        ("tasks",),
        "every task is an objective of its own, and its weight counts when one merge of the front is "
        "recommended; mergekit-evolve adds them up. Half of the items are held out, to confirm what the "
        "other half found (`holdout`).",
    )
    suite = {"description": f"The tasks of {notes.file.name}.", "chat_template": bool(is_chat)}
    return suite | ({"include_path": include_path} if include_path else {}) | {"objectives": objectives}


def _objective(
    notes: Notes, place: Place, given: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any] | None:
    metric, _, its_filter = str(given.get("metric", "acc,none")).partition(",")
    task: dict[str, Any] = {"lm_eval": given.get("name"), "metric": metric}
    if its_filter:
        task["filter"] = its_filter
    task |= {key: data[key] for key in ("limit", "num_fewshot") if data.get(key) is not None}
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        notes.refuse((*place, "weight"), "must be a number.")
        return None
    if weight == 0:
        notes.remark(place, "left out: a task of weight 0 changes no score.")
        return None
    objective: dict[str, Any] = {} if weight == 1 else {"weight": abs(weight)}
    if weight < 0:
        objective["direction"] = "minimize"
        text = (
            "is better when low. If the task itself says otherwise, add `against_task: true` in suite.yaml."
        )
        notes.remark((*place, "weight"), text)
    return objective | {"tasks": [task]}
