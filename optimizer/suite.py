"""Suites: what is to be kept and what is to be gained, made of lm-eval tasks and JSONL items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from optimizer.errors import MergetuneError
from optimizer.scorers import Scorer
from optimizer.yaml_io import KindAlone, Regex, Strict, read_yaml, validate

Split = Literal["search", "holdout"]
Direction = Literal["maximize", "minimize"]


class TaskConfig(Strict):
    """One task: either `items`, a JSONL file with a `scorer`, or `lm_eval`, the name of a task.

    `metric` and `filter` choose among what an lm-eval task measures (default: its first). `limit`
    takes the first n items. Few-shot examples of JSONL tasks come from `fewshot_items`.
    """

    items: str | None = None
    scorer: Annotated[Scorer | None, KindAlone] = None
    system: str = ""
    max_new_tokens: int = Field(64, gt=0)
    stop: tuple[str, ...] = ()
    fewshot_items: str | None = None
    lm_eval: str | None = None
    metric: str | None = None
    filter: str | None = None
    limit: int | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _is_one_kind(self) -> TaskConfig:
        if (self.items is None) == (self.lm_eval is None):
            raise ValueError("a task must have either `items` (a JSONL file) or `lm_eval` (a task's name)")
        if (self.items is None) != (self.scorer is None):
            raise ValueError("`scorer` belongs to `items`: give both or none")
        if self.items is not None and bool(self.num_fewshot) != bool(self.fewshot_items):
            raise ValueError("`num_fewshot` of a JSONL task needs `fewshot_items`, and the reverse")
        jsonl_only = {"system", "max_new_tokens", "stop", "fewshot_items"}
        lm_eval_only = {"metric", "filter"}
        foreign = jsonl_only if self.lm_eval else lm_eval_only
        fields = type(self).model_fields
        if wrong := {name for name in foreign if getattr(self, name) != fields[name].default}:
            kind = "lm_eval" if self.lm_eval else "items"
            raise ValueError(f"`{'`, `'.join(sorted(wrong))}` does not go with `{kind}`")
        return self


class ScoreConfig(Strict):
    """What objectives and guards share: the tasks whose mean score it is, and the better direction.

    Every task counts alike in the mean, however many items it has; so do the tasks of an lm-eval group.
    `direction` is the task's own unless given, and `maximize` for JSONL items. One that contradicts an
    lm-eval task is an error, unless `against_task` says that it is meant, as where a skill is unlearned.
    """

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    direction: Direction | None = None
    against_task: bool = False

    @property
    def better(self) -> Direction:
        """Return the direction, settled."""
        return self.direction or "maximize"

    @property
    def sign(self) -> int:
        """Return +1 where a higher score is better, else -1."""
        return 1 if self.better == "maximize" else -1


class ObjectiveConfig(ScoreConfig):
    """A score to optimize.

    `weight` counts when one candidate of the front is recommended; `margin` is how much worse than
    the baseline a model may be that `mergetune check` passes.
    """

    weight: float = Field(1.0, gt=0)
    margin: float = Field(0.05, ge=0)


class GuardConfig(ScoreConfig):
    """A score that may not get worse than `reference` (`base` or an expert's name) by over `margin`.

    `mergetune check` takes its baseline for the reference.
    """

    margin: float = Field(ge=0)
    reference: str = "base"


class SuiteConfig(Strict):
    """The file of a suite. `holdout` is the share of the items that the search never sees.

    `system: merge_into_user` writes system messages before the first user message, for models whose chat
    template takes none. `truncate` says what becomes of a prompt that is too long: `refuse` ends with an
    error before any work, `left` cuts off its beginning.
    """

    description: str
    chat_template: bool
    system: Literal["message", "merge_into_user"] = "message"
    truncate: Literal["refuse", "left"] = "refuse"
    holdout: float = Field(0.5, ge=0, lt=1)
    include_path: str | None = None
    objectives: dict[str, ObjectiveConfig] = Field(min_length=1)
    guards: dict[str, GuardConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_differ(self) -> SuiteConfig:
        if both := self.objectives.keys() & self.guards.keys():
            raise ValueError(f"`{'`, `'.join(both)}` cannot be both an objective and a guard")
        return self

    @property
    def scores(self) -> dict[str, ObjectiveConfig | GuardConfig]:
        """Objectives, then guards, by name."""
        return {**self.objectives, **self.guards}


class Item(Strict):
    """One line of a JSONL file; further keys are allowed and kept out of the prompt."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str = Field(min_length=1)
    answer: Any = None
    choices: tuple[str, ...] = ()
    patterns: tuple[Regex, ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class Suite:
    """A suite with its JSONL items read: `items[file]`, in the file's order."""

    name: str
    path: Path
    config: SuiteConfig
    items: Mapping[str, tuple[Item, ...]]

    @property
    def digest(self) -> str:
        """SHA-256 of the suite's rules and items."""
        data: list[Any] = [self.config.model_dump(mode="json")]
        data += [[item.model_dump(mode="json") for item in items] for items in self.items.values()]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_suite(path: Path) -> Suite:
    """Read a suite and its JSONL files, whose paths are relative to the suite's folder.

    Raises:
        MergetuneError: a key is wrong, a file is missing or empty, or a line is broken; the message
            names file and line.
    """
    config = read_yaml(path, SuiteConfig)
    items: dict[str, tuple[Item, ...]] = {}
    for name, score in {**config.objectives, **config.guards}.items():
        for task in score.tasks:
            if task.items is not None and task.scorer is not None:
                items[task.items] = _read_items(path.parent / task.items, task.scorer, name)
            if task.fewshot_items is not None and task.scorer is not None:
                items[task.fewshot_items] = _read_items(path.parent / task.fewshot_items, task.scorer, name)
    return Suite(path.stem, path, config, items)


def split_of(content: str, holdout: float) -> Split:
    """Assign an item to a split by a hash of its content: stable when items are added or reordered."""
    number = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
    return "holdout" if number / 2**64 < holdout else "search"


def _read_items(path: Path, scorer: Scorer, score: str) -> tuple[Item, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other separators may stand within a text
    except (OSError, UnicodeDecodeError) as error:
        raise MergetuneError(f"{path}: cannot be read ({error}); `{score}` needs it.") from error
    items = [
        _read_item(line, f"{path}, line {number}", scorer)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not items:
        raise MergetuneError(f"{path}: holds no items, but `{score}` needs at least one.")
    return tuple(items)


def _read_item(line: str, place: str, scorer: Scorer) -> Item:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise MergetuneError(f"{place}: is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise MergetuneError(
            f'{place}: must be one JSON object, such as {{"prompt": "…", "answer": "…"}}, but is {line:.80}.'
        )
    if "prompt" not in data:
        turns = " Conversations are not read: an item is one turn." if "messages" in data else ""
        keys = f"has `{'`, `'.join(data)}`" if data else "is empty"
        raise MergetuneError(f"{place}: `prompt` is missing; the line {keys}.{turns}")
    item = validate(data, Item, place)
    if scorer.kind == "choice":
        if len(item.choices) < 2 or item.answer not in range(len(item.choices)):
            raise MergetuneError(
                f"{place}: the scorer `choice` needs two `choices` or more and `answer`, the index of the "
                f"right one, but got {len(item.choices)} choices and answer={item.answer!r}."
            )
    elif scorer.kind == "regex":
        if not scorer.patterns and not item.patterns:
            raise MergetuneError(f"{place}: the scorer `regex` needs `patterns`, here or in the suite.")
    elif item.answer is None:
        raise MergetuneError(f"{place}: the scorer `{scorer.kind}` needs `answer`.")
    elif scorer.kind == "contains" and item.answer in ("", [], [""]):
        raise MergetuneError(
            f"{place}: `answer` must not be empty, for every reply contains that, but is {item.answer!r}."
        )
    return item
