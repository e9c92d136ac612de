"""References: what a model should, or should not, say to each item, as tokens after the evaluation's prompts.

A score gets better as the texts become likelier that its items name, or as they become less likely: that is
its `direction`, together with whether its metric rises or falls with their likelihood (`metric_direction`).
An accuracy to be minimized asks for less of the right choice, and so does a Brier score to be maximized; a
perplexity to be minimized asks for more of the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergetune.engines.completions import Scoring
from mergetune.evaluation.bound_task import BoundTask
from mergetune.evaluation.metric_direction import NamedTexts, rise_with_likelihood
from mergetune.slopes.continuation import continued
from mergetune.slopes.replies import TaskReplies

if TYPE_CHECKING:
    import pandas as pd
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

    from mergetune.evaluation.evaluate import Evaluator


@dataclass(frozen=True)
class Reference:
    """What one item asks for: that a reply, or some among choices, become likelier, or less likely.

    Attributes:
        score_name: the objective or guard.
        task: the task's name.
        item: the item's id.
        texts: the prompt with the reply, of each turn that is scored, or with each of the choices; the tokens
            after the prompt count.
        wanted: the indices of the choices that are to become likelier: the right ones or, where the score
            gets better without them, all others; empty: the texts are replies.
        scales: what a choice's log-likelihood is multiplied by: 1, or where the score counts it per
            character or byte, their mean number over this choice's.
        is_unwanted: whether the replies are to become less likely.
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
    """References of some of a suite's items.

    Attributes:
        items: the references.
        missing: why a task without any has none.
        remarks: what is to be known of those of a task.
    """

    items: tuple[Reference, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

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

    def cut(self, n_items: int) -> list[References]:
        """Cut them into batches with this many of each score, spread over its tasks.

        A score with fewer begins anew.
        """
        own = [_alternating(each) for each in self.by_score.values()]
        return [
            replace(
                self,
                items=tuple(
                    each[i % len(each)] for each in own for i in range(begin, begin + min(n_items, len(each)))
                ),
            )
            for begin in range(0, max(map(len, own)), n_items)
        ]

    def only(self, *score_names: str) -> References:
        """Return the references of these scores."""
        return replace(self, items=tuple(each for each in self.items if each.score_name in score_names))

    def joined(self, other: References) -> References:
        """Return these references and others."""
        return replace(self, items=(*self.items, *other.items))


def find_references(
    evaluator: Evaluator,
    lm: TemplateLM,
    documents: Mapping[str, Sequence[int]] | None = None,
    replies: Sequence[pd.DataFrame] = (),
) -> References:
    """Find what a model should, or should not, say to a suite's items.

    Prompts, few-shot examples, chat template and tokens are those of the evaluation: lm-eval builds
    them here, too. Of a question with choices all are taken, and of a text to be scored the text. A
    reply to be generated is the reply in `replies` that scores highest or, where that has less, the reply in
    the data or the item's answer (JSON as `json.dumps` writes it); it must reach `SUFFICIENT`
    of the highest score that any of them has in its task, all being scored as replies are. So items
    without an answer, such as those of the scorer `regex`, have a reference where some model shows one.
    Where such a score is to fall, that reply is what has to become less likely. In a conversation the model's
    own chat template writes the reply, its calls of tools and its end; where every turn is scored, an item
    has a reply for each.

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
    remarks: dict[str, str] = {}
    for name, indices in documents.items():
        if indices:
            task = _TaskReferences(evaluator, name, lm)
            own = task.find(indices, replies)
            items += own
            if not own:
                missing[name] = f"`{name}` has no references: {task.why_none}."
            if task.remark:
                remarks[name] = task.remark
    return References(tuple(items), missing, remarks)


class _TaskReferences:
    """The references of one task's items.

    `why_none` says why there is none, where there is none, and `remark` what is to be known of them.
    """

    def __init__(self, evaluator: Evaluator, name: str, lm: TemplateLM) -> None:
        bound = evaluator.tasks[name]
        self._evaluator, self._lm = evaluator, lm
        self._name, self._bound, self._task = name, bound, bound.task
        self._sign = evaluator.suite.config.scores[bound.score_name].sign
        self.why_none = "no answer of its items, and no reply given, has a high score"
        self.remark = ""

    def find(self, indices: Sequence[int], replies: Sequence[pd.DataFrame]) -> list[Reference]:
        scorer = self._bound.config.scorer
        if scorer is not None and scorer.asks == "seconds":
            self.why_none = "its items score times, and no text"
            return []
        asked = self._evaluator.requests(self._lm, {self._name: indices})[self._name]
        if self._task.OUTPUT_TYPE == "generate_until":
            return self._replies(asked, replies)
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
    ) -> list[Reference]:
        found = TaskReplies(self._bound, self._lm, self._evaluator.suite.config).best(asked, replies)
        if found.n_plain:
            n_replies = sum(map(len, found.texts.values()))
            self.remark = (
                f"`{self._name}`: {found.n_plain} of {n_replies} replies follow the prompt as plain text: "
                "the chat template does not write them after it, or not in a form that the scorer reads."
            )
        unwanted = found.rise * self._sign < 0
        return [self._reference(index, own, is_unwanted=unwanted) for index, own in found.texts.items()]

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
