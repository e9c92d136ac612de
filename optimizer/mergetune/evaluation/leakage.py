"""Leakage: items that experts were trained on, that stand in both splits or twice, or that are public.

What counts as the same question: see `near_copies`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import ITEM_KEYS
from mergetune.evaluation.near_copies import MOST_HOLDERS, Finder, Question, words_of
from mergetune.files.yaml_io import read_text

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from mergetune.evaluation.evaluate import Evaluator

_SHOWN_ITEMS = 3
_SHOWN_LETTERS = 70


@dataclass(frozen=True)
class PlacedItem:
    """An item of the suite, as the frame of `Evaluator.items()` names it; `text` is for people."""

    score_name: str
    task: str
    item: str
    split: str
    text: str


@dataclass(frozen=True)
class Leaks:
    """What leaks.

    `trained` has each expert's items that stand in its training data. `across_splits` has pairs of one
    question in both splits, the search split's item first; `repeated` pairs within one split, the
    earlier item first. `n_items` counts the items of every objective and guard.
    """

    trained: Mapping[str, tuple[PlacedItem, ...]]
    across_splits: tuple[tuple[PlacedItem, PlacedItem], ...]
    repeated: tuple[tuple[PlacedItem, PlacedItem], ...]
    n_items: Mapping[str, int]

    def warnings(self) -> tuple[str, ...]:
        """Say what leaks, why that matters and what to do, a sentence or more for each score."""
        said = []
        for expert, items in self.trained.items():
            for score, found in _by_score((item, item) for item in items).items():
                said.append(
                    f"Items of `{score}` that stand in the training data of `{expert}`: "
                    f"{len(found)} of {self.n_items[score]}. The score shows what it remembers as well as "
                    "what it can do. Take them out of the suite, or train without them. "
                    f"{_examples(item for item, _ in found)}"
                )
        for score, pairs in _by_score(self.across_splits).items():
            said.append(
                f"Items of `{score}` in the holdout split that the search split has, too, the same or "
                f"nearly: {len(pairs)} of {self.n_items[score]}. They confirm nothing that "
                f"the search has not seen. Keep one of each. {_examples(item for _, item in pairs)}"
            )
        for score, pairs in _by_score(self.repeated).items():
            others = sorted({first.score_name for first, _ in pairs} - {score})
            where = f", of `{'`, `'.join(others)}` as well" if others else ""
            said.append(
                f"Items of `{score}` that repeat an earlier one of the same split{where}, the same or "
                f"nearly: {len(pairs)} of {self.n_items[score]}. They count twice, and standard errors are "
                f"too small. Keep one of each. {_examples(item for _, item in pairs)}"
            )
        return tuple(said)


def find_leaks(items: pd.DataFrame, training: Mapping[str, Sequence[str]]) -> Leaks:
    """Find the items of a suite in experts' training texts, and in one another.

    An item is its prompt together with its target: multiple-choice items may have one prompt, or none,
    and differ in their choices alone. Of two items of the suite, the same prompt is another question with
    another target, under another system message or later in another conversation. In training texts the
    target is looked for only where the prompt does not say which item it is, because answers may be worded
    otherwise there; what the user said before must stand in the same text.

    Args:
        items: `Evaluator.items()`.
        training: the texts that each expert was trained on; see `read_training_texts`.
    """
    items = items.reset_index(drop=True)
    rows = [PlacedItem(*fields) for fields in _plain_rows(items)]
    questions = _questions(items)
    holders: dict[Question, list[PlacedItem]] = {}
    for row, question in zip(rows, questions, strict=True):
        holders.setdefault(question, []).append(row)
    unique = list(holders)
    finder = Finder(unique)
    trained: dict[str, tuple[PlacedItem, ...]] = {}
    for expert, texts in training.items():
        found = finder.find(texts)
        if found:
            trained[expert] = tuple(item for index in sorted(found) for item in holders[unique[index]])
    across, repeated = [], []
    for group in finder.groups():
        first: dict[str, PlacedItem] = {}
        members = [item for index in group for item in holders[unique[index]]]
        for item in members:
            if item.split in first:
                repeated.append((first[item.split], item))
            first.setdefault(item.split, item)
        if "search" in first:
            across += [(first["search"], item) for item in members if item.split == "holdout"]
    n_items = Counter(row.score_name for row in rows)
    return Leaks(trained, tuple(across), tuple(repeated), n_items)


def read_training_texts(path: Path) -> list[str]:
    """Read what an expert was trained on, a text per training example.

    Of JSON lines and JSON lists all strings of an example count, however nested (keys do not), a line
    each. Other files are plain text: an example is a paragraph, or a line where there are no empty lines.

    Raises:
        MergetuneError: the file is missing, is no text, or a line is not JSON; the message names it.
    """
    content = read_text(path)
    if path.suffix not in {".json", ".jsonl", ".ndjson"}:
        paragraphs = re.split(r"\n\s*\n", content.strip())
        return paragraphs if len(paragraphs) > 1 else content.splitlines()
    if path.suffix == ".json":
        try:
            data = json.loads(content)
            return ["\n".join(_strings(example)) for example in (data if isinstance(data, list) else [data])]
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else JSON lines by another name
                raise MergetuneError(f"{path}, line {error.lineno}: is not JSON: {error.msg}.") from error
        except (ValueError, RecursionError) as error:
            raise MergetuneError(f"{path}: is not JSON: {error}.") from error
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):  # strings may hold other line ends
        if line.strip():
            try:
                texts.append("\n".join(_strings(json.loads(line))))
            except (ValueError, RecursionError) as error:
                raise MergetuneError(f"{path}, line {number}: is not JSON: {error}.") from error
    return texts


def leakage_warnings(evaluator: Evaluator, training: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Say what leaks into a suite from experts' training texts, within it, and from public benchmarks."""
    leaks = find_leaks(evaluator.items(), training)
    return (*leaks.warnings(), *benchmark_warnings(evaluator))


def benchmark_warnings(evaluator: Evaluator) -> tuple[str, ...]:
    """Warn of objectives that are a public benchmark's own evaluation items."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, bound in evaluator.tasks.items():
        if bound.score_name in evaluator.suite.config.objectives and (source := public_source(bound.task)):
            found.setdefault((bound.score_name, source), []).append(f"`{name}`")
    return tuple(
        f"The objective `{objective}` is optimized on {source} ({', '.join(names)}), a public benchmark: "
        "a score that was optimized on cannot be compared with published ones any more, and models may "
        "have been trained on these items. Optimize on items of your own, and keep the benchmark as a guard."
        for (objective, source), names in found.items()
    )


def public_source(task: Task) -> str | None:
    """Name the split and the hub's data set that a task's evaluated items come from; None if local.

    A training split counts only where the data set has no other, as benchmarks such as BLiMP.
    """
    config = task.config
    if callable(config.custom_dataset):
        return None
    path = str(config.dataset_path or task.DATASET_PATH or "")
    if "/" not in path:  # a loader of files, such as `json`
        files = re.search(r"(?:hf|https?)://[^\s'\"]+", str(config.dataset_kwargs or ""))
        path = files.group() if files else ""
    if not path or Path(path).exists():
        return None
    split = str((config.test_split if task.has_test_docs() else config.validation_split) or "test")
    if split.startswith("train") and len(task.dataset or ()) > 1:
        return None
    return f"the {split} split of {path}"


def _questions(items: pd.DataFrame) -> list[Question]:
    questions: dict[Any, Question] = {}
    for _, rows in items.groupby("task", sort=False):
        prompts, targets = rows["prompt"].tolist(), rows["target"].tolist()
        said = list(zip(rows["system"], map(json.loads, rows["earlier"]), strict=True))
        own = [words_of(text) for text in _without_frame(prompts)]
        folded = [" ".join(target.casefold().split()) for target in targets]
        n_targets = Counter(words for words, _ in set(zip(own, folded, strict=True)))
        for index, prompt, words, target, (system, earlier) in zip(
            rows.index, prompts, own, folded, said, strict=True
        ):
            answer, history = words_of(target), tuple(map(words_of, earlier))
            before = (system, *earlier)
            if words and n_targets[words] == 1:
                questions[index] = Question(words, words_of(prompt), history, (target, *before))
            elif words and len(n_targets) > 1 and n_targets[words] <= MOST_HOLDERS:
                questions[index] = Question(words, words_of(prompt), (*history, answer), (target, *before))
            else:  # the prompt says nothing about which item it is
                questions[index] = Question(answer, answer, history, ("" if answer else target, *before))
    return [questions[index] for index in items.index]


def _without_frame(prompts: Sequence[str]) -> list[str]:
    """Cut off what all prompts of a task begin and end with: `Question: …` and a last line `Answer:`."""
    if len(set(prompts)) < 2:
        return list(prompts)
    head = os.path.commonprefix(prompts)  # noqa: RUF071 (characters are meant)
    tail = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]  # noqa: RUF071
    start = max(head.rfind(":"), head.rfind("\n")) + 1
    n_last = len(tail) - tail.find("\n") if "\n" in tail else 0
    return [prompt[start : len(prompt) - n_last] for prompt in prompts]


def _plain_rows(items: pd.DataFrame) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield score_name, task, item and split of each row, and what people know it by."""
    columns = [*ITEM_KEYS, "split", "prompt", "target"]
    for *place, prompt, target in items[columns].itertuples(index=False):
        text = " ".join((prompt if prompt.strip() else target).split())
        yield (*place, text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 1] + "…")


def _by_score(
    pairs: Iterable[tuple[PlacedItem, PlacedItem]],
) -> dict[str, list[tuple[PlacedItem, PlacedItem]]]:
    """Group pairs by the score of their second item."""
    groups: dict[str, list[tuple[PlacedItem, PlacedItem]]] = {}
    for pair in pairs:
        groups.setdefault(pair[1].score_name, []).append(pair)
    return groups


def _examples(items: Iterable[PlacedItem]) -> str:
    """Show the first items, by their ids and texts."""
    listed = list(items)
    shown = "; ".join(f"{item.item} “{item.text}”" for item in listed[:_SHOWN_ITEMS])
    more = len(listed) - _SHOWN_ITEMS
    return f"Items: {shown}" + (f"; and {more} more." if more > 0 else ".")


def _strings(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, (dict, list)):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _strings(value)
