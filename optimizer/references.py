"""References: what a model should say to each item, as tokens after the very prompts of the evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optimizer.bound_task import BoundTask, right_answer
from optimizer.continuation import closing, continued, replied
from optimizer.engines.completions import Scoring
from optimizer.lm_requests import filtered
from optimizer.lm_tasks import item_answer

if TYPE_CHECKING:
    import pandas as pd
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

    from optimizer.evaluate import Evaluator

# A reply is a reference from this share of the best score of its task on: it shows most of the skill.
SUFFICIENT = 0.75


@dataclass(frozen=True)
class Reference:
    """What one item asks for: a reply, or the right ones among choices.

    Attributes:
        score_name: the objective or guard.
        task: the task's name.
        item: the item's id.
        texts: the prompt with the reply, or with each of the choices; the tokens after the prompt count.
        right: the right choices' indices; empty: there is one text, and it is right.
        scales: what a choice's log-likelihood is multiplied by: 1, or where the score counts it per
            character or byte, their mean number over this choice's.
    """

    score_name: str
    task: str
    item: str
    texts: tuple[Scoring, ...]
    right: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def n_tokens(self) -> int:
        """The tokens of the longest text."""
        return max(len(text.tokens) for text in self.texts)


@dataclass(frozen=True)
class References:
    """References of some of a suite's items; `missing` says of a task without any why it has none."""

    items: tuple[Reference, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_score(self) -> dict[str, list[Reference]]:
        """The references of each objective and guard that has some."""
        found: dict[str, list[Reference]] = defaultdict(list)
        for reference in self.items:
            found[reference.score_name].append(reference)
        return dict(found)

    def sample(self, n_items: int) -> References:
        """Return up to this many for each score, spread over its tasks; the same ones every time."""
        chosen = [each for own in self.by_score.values() for each in _alternating(own)[:n_items]]
        return replace(self, items=tuple(chosen))

    def parts(self, n_items: int) -> tuple[References, References]:
        """Return up to this many of each score's references, half of them at most, and the others."""
        first: list[Reference] = []
        rest: list[Reference] = []
        for own in self.by_score.values():
            ordered = _alternating(own)
            size = min(n_items, max(len(own) // 2, 1))
            first += ordered[:size]
            rest += ordered[size:] or ordered  # the only one is in both
        return replace(self, items=tuple(first)), replace(self, items=tuple(rest))

    def cut(self, n_items: int) -> list[References]:
        """Cut them into batches with this many of each score; a score with fewer begins anew."""
        own = list(self.by_score.values())
        return [
            replace(
                self,
                items=tuple(
                    each[i % len(each)] for each in own for i in range(begin, begin + min(n_items, len(each)))
                ),
            )
            for begin in range(0, max(map(len, own)), n_items)
        ]

    def only(self, score_name: str) -> References:
        """Return the references of one score."""
        return replace(self, items=tuple(each for each in self.items if each.score_name == score_name))


def find_references(
    evaluator: Evaluator,
    lm: TemplateLM,
    documents: Mapping[str, Sequence[int]] | None = None,
    replies: Sequence[pd.DataFrame] = (),
) -> References:
    """Find what a model should say to a suite's items.

    Prompts, few-shot examples, chat template and tokens are those of the evaluation: lm-eval builds
    them here, too. Of a question with choices all are taken, and of a text to be scored the text. A
    reply to be generated is the reply in `replies` that scores best or, where that does worse, the item's
    answer as the examples show it (JSON as `json.dumps` writes it); it must reach `SUFFICIENT`
    of the best score that any of them has in its task, the answer being scored as a reply is. So items
    without an answer, such as those of the scorer `regex`, have a reference where some model shows one.

    Args:
        evaluator: the suite.
        lm: a model as lm-eval sees it, or anything with its tokenizer.
        documents: by task, the indices of documents; by default those of the search split.
        replies: measurements of these items, a frame for each model, as `Measurement.items`.
    """
    if documents is None:
        documents = evaluator.documents("search")
    chat = evaluator.suite.config.chat_template
    items: list[Reference] = []
    missing: dict[str, str] = {}
    for name, indices in documents.items():
        if indices:
            task = _TaskReferences(evaluator, name, lm, chat)
            own = list(task.find(list(indices), replies))
            items += own
            if not own:
                missing[name] = f"`{name}` has no references: {task.why_none}."
    return References(tuple(items), missing)


class _TaskReferences:
    """The references of one task's items."""

    def __init__(self, evaluator: Evaluator, name: str, lm: TemplateLM, chat: bool) -> None:
        bound, self._evaluator = evaluator.tasks[name], evaluator
        self._name, self._bound, self._task = name, bound, bound.task
        self._lm, self._chat = lm, chat
        self._is_better_high = evaluator.suite.config.scores[bound.score_name].sign > 0

    @property
    def why_none(self) -> str:
        """Say why there is none, where there is none."""
        if self._task.OUTPUT_TYPE == "multiple_choice":
            return "no item names one of its choices as the right one"
        if self._task.OUTPUT_TYPE == "loglikelihood":
            return "each of its items asks for several likelihoods, and not which is to be the largest"
        if not self._is_better_high:
            return "its score is minimized, and what a reply with a low score lacks cannot be shown"
        return "no answer of its items, and no reply given, scores well"

    def find(self, indices: list[int], replies: Sequence[pd.DataFrame]) -> Iterator[Reference]:
        asked = self._evaluator.requests(self._lm, {self._name: indices})[self._name]
        kind = self._task.OUTPUT_TYPE
        if kind == "generate_until":
            yield from self._replies(asked, replies)
        for index, instances in asked.items():
            if kind == "multiple_choice":
                yield from self._choices(index, instances)
            elif kind == "loglikelihood" and len(instances) == 1:
                yield self._reference(index, (continued(self._lm, *instances[0].args[:2]),))
            elif kind == "loglikelihood_rolling":
                tokens = [self._lm.prefix_token_id, *self._lm.tok_encode(instances[0].args[0])]
                yield self._reference(index, (Scoring(tokens[: self._lm.max_length], 1),))

    def _reference(self, index: int, texts: tuple[Scoring, ...], **choices: Any) -> Reference:
        return Reference(self._bound.score_name, self._name, self._bound.item_ids[index], texts, **choices)

    def _replies(
        self, asked: Mapping[int, list[Instance]], replies: Sequence[pd.DataFrame]
    ) -> Iterator[Reference]:
        if not self._is_better_high:
            return
        shown = self._shown(replies)
        answers = _score_answers(self._bound, asked, self._chat)
        candidates = {
            index: [*shown.get(self._bound.item_ids[index], []), *answers.get(index, [])] for index in asked
        }
        best = max((score for each in candidates.values() for score, _ in each), default=0.0)
        end = closing(self._lm, self._task, self._chat)
        for index, instances in asked.items():
            # of equal scores the first one counts: that of the better model
            score, reply = max(candidates[index], key=lambda each: each[0], default=(0.0, ""))
            if best > 0 and score >= SUFFICIENT * best:
                prompt, settings = instances[0].args[:2]
                yield self._reference(index, (replied(self._lm, prompt, settings, reply, end),))

    def _shown(self, replies: Sequence[pd.DataFrame]) -> dict[str, list[tuple[float, str]]]:
        """Return what models replied to each item, with its score, the better model first.

        lm-eval's own tasks are left out: what is on record of them may be a part of the reply only.
        """
        if self._bound.config.items is None:
            return {}
        own = [frame[frame["task"] == self._name] for frame in replies]
        found: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for frame in sorted(own, key=lambda frame: -frame["score"].mean()):
            for item, score, reply in zip(frame["item"], frame["score"], frame["response"], strict=True):
                found[item].append((score, reply))
        return found

    def _choices(self, index: int, instances: list[Instance]) -> Iterator[Reference]:
        doc = instances[0].doc
        choices: list[str] = self._task.doc_to_choice(doc)
        gold = (self._task.doc_to_text if self._task.multiple_input else self._task.doc_to_target)(doc)
        right = [choices.index(each) if each in choices else each for each in _as_list(gold)]
        if not all(each in range(len(choices)) for each in right):
            return  # mislabelled, as lm-eval would warn
        texts = tuple(continued(self._lm, *each.args[:2]) for each in instances[: len(choices)])
        yield self._reference(index, texts, right=tuple(right), scales=_scales(self._bound, choices))


def _score_answers(
    bound: BoundTask, asked: Mapping[int, list[Instance]], chat: bool
) -> dict[int, list[tuple[float, str]]]:
    """Score each item's answer as if a model had replied it; items whose answer is no text have none."""
    texts = {index: _answer(bound, instances[0].doc, chat) for index, instances in asked.items()}
    for index, instances in asked.items():
        for instance in instances:
            instance.resps = [texts[index] or ""]
    try:
        results = filtered(bound.task, asked, bound.filter)
        scores = {index: _score(bound, index, own) for index, own in results.items()}
    except Exception:  # whatever a task's own code raises at a reply that is none
        return {}
    return {
        index: [(score, text)]
        for index, score in scores.items()
        if score is not None and (text := texts[index]) is not None
    }


def _score(bound: BoundTask, index: int, results: Sequence[Any]) -> float | None:
    score = bound.task.process_results(bound.docs[index], list(results)).get(bound.metric)
    return float(score) if isinstance(score, (int, float)) else None


def _answer(bound: BoundTask, doc: Any, chat: bool) -> str | None:
    """Return the answer as few-shot examples show it; None where it is a list of words that all count."""
    task, scorer = bound.task, bound.config.scorer
    if scorer is not None and scorer.kind == "contains" and isinstance(item_answer(doc), list):
        return None
    first = next(iter(_as_list(right_answer(task, doc))), None)
    prefix = task.doc_to_prefix(doc)
    if prefix:
        delimiter = "" if prefix[-1].isspace() else " "
    else:
        delimiter = "" if chat else task.config.target_delimiter
    return None if first is None else f"{delimiter}{first}"


def _scales(bound: BoundTask, choices: Sequence[str]) -> tuple[float, ...]:
    lengths = {
        "acc_norm": [len(choice) for choice in choices],
        "acc_bytes": [len(choice.encode()) for choice in choices],
    }.get(bound.metric, [1] * len(choices))
    mean = sum(lengths) / len(lengths)
    return tuple(mean / max(length, 1) for length in lengths)


def _alternating(references: Iterable[Reference]) -> list[Reference]:
    """Order references by their ids, which are digests, one of each task after the other."""
    by_task: dict[str, list[Reference]] = defaultdict(list)
    for reference in sorted(references, key=lambda each: each.item):
        by_task[reference.task].append(reference)
    places = [(place, each) for own in by_task.values() for place, each in enumerate(own)]
    return [each for _place, each in sorted(places, key=lambda pair: pair[0])]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
