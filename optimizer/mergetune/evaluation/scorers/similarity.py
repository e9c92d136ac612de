"""The scorer `similarity`: how alike the reply and the answer are, by chrF, ROUGE-L or BLEU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer, each_text, plain_problem, shown

Measure = Literal["chrf", "rouge_l", "bleu"]


class SimilarityScorer(BaseScorer):
    """The likeness of reply and answer; of a list of answers, that of the most alike.

    `chrf` (Popović 2015) and `bleu` (Papineni et al. 2002, smoothed, with fewer than four n-grams where a
    text is short) are sacrebleu's for one sentence, divided by 100; `rouge_l` (Lin 2004) is the F-measure of
    rouge-score, which knows Latin letters and digits alone.
    """

    needs = "`answer`: text, a number, true or false, or a list of these, any of which is right"
    scores = "how alike reply and answer are: chrF, ROUGE-L or BLEU, each in [0, 1]"

    kind: Literal["similarity"] = "similarity"
    measure: Measure = "chrf"

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [self._likeness(item, reply) for item, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`; a part of an answer may be right, so that no stop string matters."""
        if problem := self.lacking(item, is_example=is_example) or plain_problem(
            item.answer, "any of which is right"
        ):
            return problem
        alike = _measure(self.measure)
        empty = next((text for text in each_text(item.answer) if alike(text, text) == 0), None)
        if empty is None:
            return None
        return (
            f"`answer` must have something that `{self.measure}` counts, or no reply is like it, but holds "
            f"{shown(empty)}."
        )

    def answer_text(self, item: Item) -> str:
        """See `BaseScorer.answer_text`."""
        return "" if item.answer is None else each_text(item.answer)[0]

    def _likeness(self, item: Item, reply: str) -> float:
        alike = _measure(self.measure)
        return max(alike(reply.strip(), text) for text in each_text(item.answer))


@functools.cache
def _measure(name: Measure) -> Callable[[str, str], float]:
    """Return a measure of a reply and one right text, in [0, 1]."""
    if name == "rouge_l":
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
        return lambda reply, right: float(rouge.score(right, reply)["rougeL"].fmeasure)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF() if name == "chrf" else BLEU(effective_order=True)
    return lambda reply, right: min(1.0, metric.sentence_score(reply, [right]).score / 100)
