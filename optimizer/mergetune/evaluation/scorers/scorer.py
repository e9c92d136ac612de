"""What a scorer of JSONL items is, and what scorers share.

A scorer stands in a file of its own: a frozen model with its `kind`, by which suites name it, its options,
and what is said of it in the docs. `Scorer`, in `__init__.py`, is the union of them all.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

from mergetune.evaluation.call_formats import message_text
from mergetune.evaluation.items import Item, Message, Number
from mergetune.files.yaml_io import Strict


class BaseScorer(Strict):
    """How the items of one task are scored, and what they need.

    An answer has one text, that of the reply which is wanted: replies are compared with it, and examples,
    slopes and reports show it. Space around replies and answers does not count; a number, true or false is
    its JSON text.

    Attributes:
        needs: what an item needs, for the docs.
        scores: what an item scores, for the docs.
        asks: what a model is asked for: a reply, the number of its tokens, the seconds that it takes, or the
            log-likelihoods of the item's choices, of which the target text is then one.
        higher_is_better: which direction a score has unless the suite says it.
        modules: modules beside the scorer's own whose code makes its scores, for the digest of rules.
        answers_are_replies: whether an item's answer is a reply, or else says how to score one; examples then
            show the reply that the data have, and slopes take it.
        runs_code: whether it runs code that a model wrote, which a suite has to allow.
        reads_metadata: whether a score may depend on an item's metadata, which then belong to its id.
        metric: what the score is called in lm-eval's terms.
        files: what is read and is no part of mergetune; their content is part of the rules.
    """

    needs: ClassVar[str]
    scores: ClassVar[str]
    asks: ClassVar[Literal["reply", "tokens", "seconds", "likelihoods"]] = "reply"
    higher_is_better: ClassVar[bool] = True
    modules: ClassVar[tuple[ModuleType, ...]] = ()
    answers_are_replies: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    reads_metadata: ClassVar[bool] = False

    kind: str

    @property
    def metric(self) -> str:
        """See the class."""
        return "score"

    def with_files(self, folder: Path, items: Sequence[Item]) -> Self:  # noqa: ARG002
        """Return the scorer with what its files hold, whose paths are relative to the suite's `folder`.

        It is called before any item is checked.

        Args:
            folder: the suite's.
            items: all items of the task, with the system messages that they get.

        Raises:
            MergetuneError: a file cannot be read, or does not fit the items.
        """
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """See the class."""
        return ()

    @abstractmethod
    def score(self, items: Sequence[Item], replies: Sequence[Any]) -> list[float]:
        """Return the score of each item, in [0, 1] unless it is a cost, by what a model replied to it.

        It is NaN where a judge gave no verdict.

        Args:
            items: items that `check_item` takes.
            replies: what the scorer asks for of each of them: a text, a number of tokens, seconds, or
                (n_choices,) log-likelihoods, in nats.

        Raises:
            MergetuneError: an item cannot be scored.
        """

    @abstractmethod
    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:
        """Say why an item cannot be scored, or cannot serve as a few-shot example; None where it can.

        An answer that no reply can have is a reason, and so is one that every reply has.

        Args:
            item: the item.
            stop: strings where every reply to it ends.
            is_example: whether it is shown, and not asked.
        """

    def lacking(self, item: Item, *, is_example: bool) -> str | None:
        """Say that an item has no answer, or as an example no reply, and needs it; None where it has it.

        Patterns belong to another scorer.
        """
        if item.patterns:
            return f"`patterns` belongs to the scorer `regex`, but this task's is `{self.kind}`."
        if item.answer is None:
            return self.missing_answer(is_example)
        if is_example and not self.answers_are_replies and not self.answer_text(item):
            return (
                f"an item of the scorer `{self.kind}` has no reply to show, and cannot be a few-shot example."
            )
        return None

    def missing_answer(self, is_example: bool) -> str:
        """Say that an item has no answer, which it needs."""
        what = "a few-shot example" if is_example else f"the scorer `{self.kind}`"
        return f"{what} needs `answer`, but it is missing or null."

    def answer_text(self, item: Item) -> str:
        """Return the item's answer as few-shot examples show it; of several that are right, the first."""
        if not self.answers_are_replies:
            return message_text(item.target) if item.target else ""
        return "" if item.answer is None else text_of(item.answer)

    def target_text(self, item: Item) -> str:
        """Return what the item asks for in words, for reports."""
        return self.answer_text(item)

    def wanted_reply(self, item: Item) -> Message | None:
        """Return the reply that an item's answer is, which slopes may make likelier; None: it is none."""
        if item.answer is None or not self.answers_are_replies:
            return None
        return Message(role="assistant", content=self.answer_text(item))

    def reply_text(self, reply: Message) -> str:
        """Return a reply as one text that the scorer reads, where no chat template writes it."""
        return message_text(reply)


def text_of(value: Any) -> str:
    """Return an answer's text: itself, or its JSON."""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def each_text(answer: Any) -> list[str]:
    """Return the texts of an answer that may be a list of answers."""
    return [text_of(each) for each in (answer if isinstance(answer, list) else [answer])]


def folded(text: str, ignore_case: bool) -> str:
    """Return a text without what does not count when it is compared."""
    stripped = text.strip()
    return stripped.casefold() if ignore_case else stripped


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as errors show it, cut off after so many characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def plain_problem(answer: Any, which: str) -> str | None:
    """Say why an answer cannot be compared as text, part by part; `which` says of which parts of a list."""
    parts = answer if isinstance(answer, list) else [answer]
    for part in parts:
        if part is None or isinstance(part, (dict, list)):
            return (
                f"`answer` must be text, a number, true or false, or a list of these, {which}, "
                f"but holds {shown(part)}. The scorer for JSON is `json`."
            )
        if isinstance(part, Number) and not part.is_certain:
            return (
                f"`answer` is compared as text, and the number {part.written} can be written in other ways. "
                f'Put the text of the reply in quotes, such as "{part.written}".'
            )
    return None if parts else "`answer` must not be empty, but is []."


def stop_problem(texts: Sequence[str], stop: Sequence[str], ignore_case: bool = False) -> str | None:
    """Say which stop string cuts off every reply that has one of an answer's texts; None where none does."""
    for end in stop:
        if ignore_case and end.lower() != end.upper():
            continue  # the reply may be in the other case
        if held := next((text for text in texts if end in text), None):
            return (
                f"`answer` holds the stop string {end!r}, where every reply ends, so that no reply can be "
                f"right: it is {shown(held)}. Change the task's `stop`, or the answer."
            )
    return None
