"""Suites: what is to be kept and what is to be gained, made of lm-eval tasks and JSONL items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mergetune.engines.conversations import unwritten_tool
from mergetune.errors import MergetuneError
from mergetune.evaluation.fields import MISSING, FieldMap, at_path
from mergetune.evaluation.item_files import ItemFile, ItemSource, read_items
from mergetune.evaluation.items import Item, Turns
from mergetune.evaluation.scorers import Scorer
from mergetune.evaluation.scorers.cost import CostScorer
from mergetune.files.library import placed
from mergetune.files.yaml_io import KindAlone, Strict, nearest, read_text, read_yaml

Split = Literal["search", "holdout"]
Direction = Literal["maximize", "minimize"]
CODE_RUNS = (
    "run code that a model wrote, which a suite must allow: say `allow_code_execution: true` at its top, on "
    "a machine where that may be done"
)


class SamplingConfig(Strict):
    """How replies are drawn at random: each item's `repeats` times, with seeds of its own.

    The seeds depend on the item alone, so that models are compared on the same draws. `count` says what an
    item scores: the mean over the repeats, or the worst of them, which is pass^k where each is 0 or 1 (Yao et
    al. 2024, tau-bench). With `temperature: 0` replies are greedy and all alike, which only times are not.
    """

    temperature: float = Field(ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, gt=0)
    min_p: float | None = Field(None, gt=0, le=1)
    repeats: int = Field(1, gt=0)
    count: Literal["mean", "worst"] = "mean"

    @property
    def settings(self) -> dict[str, float]:
        """What a reply is drawn by, in lm-eval's terms."""
        return self.model_dump(include={"temperature", "top_p", "top_k", "min_p"}, exclude_none=True)


class TaskConfig(Strict):
    """One task: either `items`, a file of items with a `scorer`, or `lm_eval`, the name of a task.

    `metric` and `filter` choose among what an lm-eval task measures (default: its first). `limit` takes the
    first n items. Few-shot examples of items come from `fewshot_items`, which are read as `items` are:
    `fields`, `answers`, `split` and `config_name` are those of `ItemSource`, and so is `skip`, for `items`
    alone. `score_turns: all` asks for every turn of the model in a conversation, each with what truly went
    before it, and scores their mean; `text` and `calls` ask only for those that call no tool in the data, or
    do. Without `sampling` replies are greedy.
    """

    items: str | None = None
    fields: FieldMap = FieldMap()
    answers: str | None = None
    split: str | None = None
    config_name: str | None = None
    skip: tuple[int, ...] = ()
    scorer: Annotated[Scorer | None, KindAlone] = None
    system: str = ""
    max_new_tokens: int = Field(64, gt=0)
    stop: tuple[str, ...] = ()
    fewshot_items: str | None = None
    score_turns: Turns = "last"
    sampling: SamplingConfig | None = None
    lm_eval: str | None = None
    metric: str | None = None
    filter: str | None = None
    limit: int | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _is_one_kind(self) -> TaskConfig:
        if (self.items is None) == (self.lm_eval is None):
            raise ValueError("a task must have either `items` (a file) or `lm_eval` (a task's name)")
        if (self.items is None) != (self.scorer is None):
            raise ValueError("`scorer` belongs to `items`: give both or none")
        if self.items is not None and bool(self.num_fewshot) != bool(self.fewshot_items):
            raise ValueError("`num_fewshot` of items needs `fewshot_items`, and the reverse")
        items_only = {"system", "max_new_tokens", "stop", "fewshot_items", "score_turns", "sampling"}
        items_only |= {"fields", "answers", "split", "config_name", "skip"}
        lm_eval_only = {"metric", "filter"}
        foreign = items_only if self.lm_eval else lm_eval_only
        fields = type(self).model_fields
        if wrong := {name for name in foreign if getattr(self, name) != fields[name].default}:
            kind = "lm_eval" if self.lm_eval else "items"
            raise ValueError(f"`{'`, `'.join(sorted(wrong))}` does not go with `{kind}`")
        if self.sampling is not None and self.sampling.temperature == 0 and not self._is_timed:
            raise ValueError(
                "`sampling.temperature` must be > 0, for greedy replies to one request are all alike: leave "
                "`sampling` out. Only `latency` takes 0, to time a reply several times"
            )
        draws_none = self.scorer is not None and self.scorer.asks == "likelihoods"
        if draws_none and (self.sampling is not None or self.score_turns != "last"):
            raise ValueError(
                "`sampling` and `score_turns` are for replies, but this scorer compares likelihoods: leave "
                "them out"
            )
        return self

    @property
    def _is_timed(self) -> bool:
        return self.scorer is not None and self.scorer.asks == "seconds"

    @property
    def repeats(self) -> int:
        """How often each reply is drawn."""
        return self.sampling.repeats if self.sampling else 1

    @property
    def source(self) -> ItemSource | None:
        """Where the items come from; None: from lm-eval."""
        return None if self.items is None else self._source_of(self.items, self.skip)

    @property
    def fewshot_source(self) -> ItemSource | None:
        """Where the few-shot examples of items come from."""
        return None if self.fewshot_items is None else self._source_of(self.fewshot_items)

    def _source_of(self, file: str, skip: tuple[int, ...] = ()) -> ItemSource:
        return ItemSource(file, self.fields, self.answers, self.split, self.config_name, skip)


class ScoreConfig(Strict):
    """What objectives and guards share: the tasks whose mean score it is, and the better direction.

    Every task counts alike in the mean, however many items it has; so do the tasks of an lm-eval group.
    `direction` is the task's own unless given; for JSONL items `maximize`, and `minimize` for costs. One that
    contradicts an lm-eval task is an error, unless `against_task` says that it is meant, as where a skill is
    unlearned.
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

    def are_shares(self, scores: Iterable[float]) -> bool:
        """Say whether its scores are shares, which people read in percent; what replies cost is none."""
        costs = any(isinstance(task.scorer, CostScorer) for task in self.tasks)
        return not costs and all(0 <= score <= 1 for score in scores)


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

    `chat_template` says whether prompts are messages of a conversation, written by the model's own chat
    template, or by that of a file beside the suite; once the suite is read, it is the file's text. `system:
    merge_into_user` writes system messages before the first user message, for models whose chat
    template takes none. `template_arguments` are further variables of the template, such as
    `enable_thinking`. `thinking: strip` scores what a model says after its thoughts, which end with
    `thinking_end` or, where that is not given, with the markers of known families. `truncate` says what
    becomes of a prompt that is too long: `refuse` ends with an error before any work, `left` cuts off its
    beginning. `allow_code_execution` lets tasks run code that a model wrote. `slices` are keys of the items'
    metadata, by dotted paths, by which scores are told apart.
    """

    description: str
    chat_template: bool | Annotated[str, Field(min_length=1)]
    system: Literal["message", "merge_into_user"] = "message"
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    thinking: Literal["strip", "keep"] = "strip"
    thinking_end: Annotated[str, Field(min_length=1)] | None = None
    truncate: Literal["refuse", "left"] = "refuse"
    holdout: float = Field(0.5, ge=0, lt=1)
    allow_code_execution: bool = False
    slices: tuple[str, ...] = ()
    include_path: str | None = None
    objectives: dict[str, ObjectiveConfig] = Field(min_length=1)
    guards: dict[str, GuardConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_differ(self) -> SuiteConfig:
        if both := self.objectives.keys() & self.guards.keys():
            raise ValueError(f"`{'`, `'.join(both)}` cannot be both an objective and a guard")
        if self.template_arguments and self.chat_template is False:
            raise ValueError("`template_arguments` belong to a chat template, but `chat_template` is false")
        if self.thinking_end is not None and self.thinking == "keep":
            raise ValueError("`thinking_end` says where thoughts are cut off, but `thinking` is `keep`")
        return self

    @model_validator(mode="after")
    def _allows_what_runs_code(self) -> SuiteConfig:
        scorers = [task.scorer for score in self.scores.values() for task in score.tasks]
        running = next((each.kind for each in scorers if each is not None and each.runs_code), None)
        if running is not None and not self.allow_code_execution:
            raise ValueError(f"the scorer `{running}` would {CODE_RUNS}")
        return self

    @property
    def scores(self) -> dict[str, ObjectiveConfig | GuardConfig]:
        """Objectives, then guards, by name."""
        return {**self.objectives, **self.guards}


@dataclass(frozen=True)
class Suite:
    """A suite with its files of items read.

    Attributes:
        name: the file's name without its ending.
        path: the suite's file.
        config: what stands in it.
        items: in their files' order, by the names of their sources (`ItemSource.name`).
        read_as: what each file of items was taken for, in words, by the same names.
    """

    name: str
    path: Path
    config: SuiteConfig
    items: Mapping[str, tuple[Item, ...]]
    read_as: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 of the suite's rules and items."""
        data: list[Any] = [self.config.model_dump(mode="json")]
        data += [[item.model_dump(mode="json") for item in items] for items in self.items.values()]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_suite(path: Path) -> Suite:
    """Read a suite and its files of items, whose paths are relative to the suite's folder.

    Raises:
        MergetuneError: a key is wrong, a file is missing, empty or of no known form, or a row is broken; the
            message names file and row.
    """
    config = read_yaml(path, SuiteConfig)
    if isinstance(config.chat_template, str):
        text = _read_template(path, config.chat_template)
        config = config.model_copy(update={"chat_template": text})
    files: dict[str, ItemFile] = {}
    for name, score in config.scores.items():
        for task in score.tasks:
            for source in (task.source, task.fewshot_source):
                if source is not None and source.name not in files:
                    files[source.name] = _read_items(source, path.parent, name)
    items = {name: file.items for name, file in files.items()}
    config = _with_files_of_scorers(config, path, items)
    for task in (task for score in config.scores.values() for task in score.tasks):
        for source, are_asked in ((task.source, True), (task.fewshot_source, False)):
            if source is not None:
                _check_items(files[source.name], task, are_asked)
                if config.chat_template is False:
                    _check_plain(files[source.name])
                elif not all(item.prompt for item in files[source.name].items):
                    raise MergetuneError(
                        f"{path}: {source.name} has items without a prompt, whose choices are whole texts: "
                        "compare them with `chat_template: false`."
                    )
    _check_slices(path, config, files)
    return Suite(path.stem, path, config, items, {name: file.summary for name, file in files.items()})


def split_of(content: str, holdout: float) -> Split:
    """Assign an item to a split by a hash of its content: stable when items are added or reordered."""
    number = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")
    return "holdout" if number / 2**64 < holdout else "search"


def _read_template(suite: Path, given: str) -> str:
    try:
        return read_text(placed(suite.parent, given))
    except MergetuneError as error:
        raise MergetuneError(
            f"{suite}: `chat_template` must be true, false or a file relative to the suite's folder. {error}"
        ) from error


def _with_files_of_scorers(
    config: SuiteConfig, path: Path, items: Mapping[str, Sequence[Item]]
) -> SuiteConfig:
    """Return the suite's file with what its scorers' files hold in the place of their names."""

    def read(task: TaskConfig, name: str) -> TaskConfig:
        if task.source is None or task.scorer is None:
            return task
        asked = [
            item if item.system is not None else item.model_copy(update={"system": task.system})
            for item in items[task.source.name]
        ]
        try:
            return task.model_copy(update={"scorer": task.scorer.with_files(path.parent, asked)})
        except MergetuneError as error:
            raise MergetuneError(f"{path}: the scorer of `{name}`: {error}") from error

    def each(scores: Mapping[str, ScoreConfig]) -> dict[str, ScoreConfig]:
        return {
            name: score.model_copy(update={"tasks": tuple(read(task, name) for task in score.tasks)})
            for name, score in scores.items()
        }

    return config.model_copy(update={"objectives": each(config.objectives), "guards": each(config.guards)})


def _read_items(source: ItemSource, folder: Path, score: str) -> ItemFile:
    try:
        return read_items(source, folder)
    except MergetuneError as error:
        raise MergetuneError(f"{error} The items of `{score}` are read from it.") from error


def _check_items(file: ItemFile, task: TaskConfig, are_asked: bool) -> None:
    """Refuse the first item that a task cannot ask, or else take as a few-shot example."""
    assert task.scorer is not None  # TaskConfig
    if task.score_turns != "last" and not file.is_conversation:
        raise MergetuneError(
            f"{file.summary}. `score_turns: {task.score_turns}` needs conversations. Leave it out."
        )
    if are_asked:
        file.check(task.scorer, task.stop, which_turns=task.score_turns)
    else:
        file.check(task.scorer, is_example=True)


def _check_plain(file: ItemFile) -> None:
    """Refuse the first item of which a model would not see all without a chat template."""
    for item, place in zip(file.items, file.places, strict=True):
        left_out = unwritten_tool(item.tools, item.prompt)
        if left_out is not None or len(item.messages) > 1:
            what = f"{len(item.messages)} messages" if left_out is None else f"the tool `{left_out}`"
            raise MergetuneError(
                f"{place}: a suite with `chat_template: false` asks the prompt alone, but the item has "
                f"{what}. Say `chat_template: true`, or name a template's file."
            )


def _check_slices(path: Path, config: SuiteConfig, files: Mapping[str, ItemFile]) -> None:
    """Refuse a slice that no item's metadata have."""
    every = [item.metadata for file in files.values() for item in file.items]
    for key in config.slices:
        if all(at_path(metadata, key) is MISSING for metadata in every):
            known = sorted({str(name) for metadata in every for name in metadata or ()})
            raise MergetuneError(
                f"{path}: `slices`: must be keys of the items' metadata, but no item has `{key}`."
                f"{nearest(key, known)} Every field of a row that is no other part of its item is metadata."
            )
