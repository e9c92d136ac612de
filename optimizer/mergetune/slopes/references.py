"""References: what a model should, or should not, say to each item, as tokens after the evaluation's prompts.

A score gets better as the texts become likelier that its items name, or as they become less likely: that is
its `direction`, together with whether its metric rises or falls with their likelihood (`metric_direction`).
An accuracy to be minimized asks for less of the right choice, and so does a Brier score to be maximized; a
perplexity to be minimized asks for more of the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergetune.engines.completions import Scoring
from mergetune.evaluation.bound_task import BoundTask, right_answer
from mergetune.evaluation.lm_tasks import item_of
from mergetune.evaluation.metric_direction import NamedTexts, reply_scores, rise_with_likelihood
from mergetune.slopes.continuation import closing, continued, replied
from mergetune.stats.gains import ROUNDING

if TYPE_CHECKING:
    import pandas as pd
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

    from mergetune.evaluation.evaluate import Evaluator

# A reply is a reference from this share of the best score of its task on: it shows most of what is scored.
SUFFICIENT = 0.75


@dataclass(frozen=True)
class Reference:
    """What one item asks for: that a reply, or some among choices, become likelier, or less likely.

    Attributes:
        score_name: the objective or guard.
        task: the task's name.
        item: the item's id.
        texts: the prompt with the reply, or with each of the choices; the tokens after the prompt count.
        wanted: the indices of the choices that are to become likelier: the right ones or, where the score
            gets better without them, all others; empty: there is one text.
        scales: what a choice's log-likelihood is multiplied by: 1, or where the score counts it per
            character or byte, their mean number over this choice's.
        is_unwanted: whether the one text is to become less likely.
    """

    score_name: str
    task: str
    item: str
    texts: tuple[Scoring, ...]
    wanted: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    is_unwanted: bool = False

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

    @property
    def n_texts(self) -> int:
        """The texts of all items: what one evaluation of them costs, in forward passes of one text."""
        return sum(len(each.texts) for each in self.items)

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
    """Find what a model should, or should not, say to a suite's items.

    Prompts, few-shot examples, chat template and tokens are those of the evaluation: lm-eval builds
    them here, too. Of a question with choices all are taken, and of a text to be scored the text. A
    reply to be generated is the reply in `replies` that scores highest or, where that has less, the item's
    answer as the examples show it (JSON as `json.dumps` writes it); it must reach `SUFFICIENT`
    of the highest score that any of them has in its task, the answer being scored as a reply is. So items
    without an answer, such as those of the scorer `regex`, have a reference where some model shows one.
    Where such a score is to fall, that reply is what has to become less likely.

    Args:
        evaluator: the suite.
        lm: a model as lm-eval sees it, or anything with its tokenizer.
        documents: by task, the indices of documents; by default those of the search split.
        replies: measurements of these items, a frame for each model, as `Measurement.items`.
    """
    if documents is None:
        documents = evaluator.documents("search")
    items: list[Reference] = []
    missing: dict[str, str] = {}
    for name, indices in documents.items():
        if indices:
            task = _TaskReferences(evaluator, name, lm)
            own = task.find(indices, replies)
            items += own
            if not own:
                missing[name] = f"`{name}` has no references: {task.why_none}."
    return References(tuple(items), missing)


class _TaskReferences:
    """The references of one task's items; `why_none` says why there is none, where there is none."""

    def __init__(self, evaluator: Evaluator, name: str, lm: TemplateLM) -> None:
        bound = evaluator.tasks[name]
        self._evaluator, self._lm = evaluator, lm
        self._name, self._bound, self._task = name, bound, bound.task
        self._chat = bool(evaluator.suite.config.chat_template)
        self._sign = evaluator.suite.config.scores[bound.score_name].sign
        self.why_none = "no answer of its items, and no reply given, has a high score"

    def find(self, indices: Sequence[int], replies: Sequence[pd.DataFrame]) -> list[Reference]:
        asked = self._evaluator.requests(self._lm, {self._name: indices})[self._name]
        if self._task.OUTPUT_TYPE == "generate_until":
            return list(self._replies(asked, replies))
        named = {i: found for i, own in asked.items() if (found := self._named(i, own)) is not None}
        if not named:
            self.why_none = "no item names one of its choices, and not all of them, as the right one"
            if self._task.OUTPUT_TYPE == "loglikelihood":
                self.why_none = (
                    "each of its items asks for several likelihoods, and not which is the right one"
                )
            return []
        toward = self._sign * rise_with_likelihood(self._bound, list(named.values()))
        self.why_none = "its metric does not tell whether it gets better as the right text becomes likelier"
        return [self._likelihood(index, own, toward) for index, own in named.items() if toward]

    def _reference(self, index: int, texts: tuple[Scoring, ...], **how: Any) -> Reference:
        return Reference(self._bound.score_name, self._name, self._bound.item_ids[index], texts, **how)

    def _replies(
        self, asked: Mapping[int, list[Instance]], replies: Sequence[pd.DataFrame]
    ) -> Iterator[Reference]:
        candidates = self._candidates(asked, replies)
        most = max((score for each in candidates.values() for score, _ in each), key=abs, default=0.0)
        rise = 1 if most > 0 else -1  # an error rate falls from silence to the answer
        end = closing(self._lm, self._task, self._chat)
        for index, instances in asked.items():
            # of equal scores the first one counts: that of the better model
            score, reply = max(candidates[index], key=lambda each: rise * each[0], default=(0.0, ""))
            if most and rise * score >= (SUFFICIENT - ROUNDING) * abs(most):
                prompt, settings = instances[-1].args[:2]  # the last turn's
                text = replied(self._lm, prompt, settings, reply, end)
                yield self._reference(index, (text,), is_unwanted=rise * self._sign < 0)

    def _candidates(
        self, asked: Mapping[int, list[Instance]], replies: Sequence[pd.DataFrame]
    ) -> dict[int, list[tuple[float, str]]]:
        """Return what may be replied to each document, with its score above that of saying nothing.

        A JSONL item's score is taken as it is: it counts what a reply has.
        """
        bound, shown = self._bound, self._shown(replies)
        texts = {index: _answer(bound, bound.docs[index], self._chat) for index in asked}
        answers = {index: text for index, text in texts.items() if text is not None}
        silent = {} if bound.config.items else reply_scores(bound, asked, dict.fromkeys(asked, ""))
        scores = reply_scores(bound, asked, answers)
        found = {index: list(shown.get(bound.item_ids[index], [])) for index in asked}
        for index, score in scores.items():
            found[index].append((score - silent.get(index, 0.0), answers[index]))
        return found

    def _shown(self, replies: Sequence[pd.DataFrame]) -> dict[str, list[tuple[float, str]]]:
        """Return what models replied to each item, with its score, the better model first.

        lm-eval's own tasks are left out: what is on record of them may be a part of the reply only; and so
        are items with several replies each.
        """
        config = self._bound.config
        if config.items is None or config.score_turns != "last" or config.repeats > 1:
            return {}
        own = [frame[frame["task"] == self._name] for frame in replies]
        found: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for frame in sorted(own, key=lambda frame: -frame["score"].mean()):
            for item, score, reply in zip(frame["item"], frame["score"], frame["response"], strict=True):
                found[item].append((score, reply))
        return found

    def _named(self, index: int, instances: list[Instance]) -> NamedTexts | None:
        """Return the texts whose likelihoods a document asks for, and which it names; None: none of them."""
        if self._task.OUTPUT_TYPE != "multiple_choice":
            return NamedTexts(index, instances, 1, (0,)) if len(instances) == 1 else None
        doc = self._bound.docs[index]
        choices: list[str] = self._task.doc_to_choice(doc)
        gold = (self._task.doc_to_text if self._task.multiple_input else self._task.doc_to_target)(doc)
        right = [choices.index(each) if each in choices else each for each in _as_list(gold)]
        if not all(each in range(len(choices)) for each in right):
            return None  # mislabelled, as lm-eval would warn
        found = NamedTexts(index, instances, len(choices), tuple(right))
        return found if found.others else None  # where all are right nothing can be wrong

    def _likelihood(self, index: int, own: NamedTexts, toward: int) -> Reference:
        """Return the reference of a document whose named texts are to become likelier, or less likely."""
        args = [each.args for each in own.instances[: own.n_texts]]
        if self._task.OUTPUT_TYPE == "multiple_choice":
            texts = tuple(continued(self._lm, *each[:2]) for each in args)
            wanted = own.named if toward > 0 else own.others
            scales = _scales(self._bound, self._task.doc_to_choice(self._bound.docs[index]))
            return self._reference(index, texts, wanted=wanted, scales=scales)
        if self._task.OUTPUT_TYPE == "loglikelihood_rolling":
            tokens = [self._lm.prefix_token_id, *self._lm.tok_encode(args[0][0])]
            text = Scoring(tokens[: self._lm.max_length], 1)
        else:
            text = continued(self._lm, *args[0][:2])
        return self._reference(index, (text,), is_unwanted=toward < 0)


def _answer(bound: BoundTask, doc: Any, chat: bool) -> str | None:
    """Return the answer as few-shot examples show it; None: there is none."""
    task, scorer = bound.task, bound.config.scorer
    if scorer is None:
        first = next(iter(_as_list(right_answer(task, doc))), None)
    else:
        first = scorer.wanted_reply(item_of(doc))
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
