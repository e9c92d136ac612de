"""Which way a task's metric goes: up or down as what an item names becomes likelier.

The metric itself is asked, with made-up log-likelihoods or replies, so that not its name decides but what it
does: an accuracy rises with the right choice's likelihood and a Brier score falls, perplexities and bits per
byte fall as a text becomes likelier, an error rate is lower for the answer than for silence, and a measure of
bias may go either way or both. A score's `direction` says which of the two is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergetune.evaluation.lm_requests import filtered

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from mergetune.evaluation.bound_task import BoundTask

_N_DOCUMENTS = 32  # that a metric is tried on
_LIKELY, _UNLIKELY, _ALIKE = -0.01, -20.0, -10.0  # made-up log-likelihoods, in nats
_SAME = 1e-9  # metrics that differ by less, relative to the larger one, are equal but for rounding


@dataclass(frozen=True)
class NamedTexts:
    """What a document asks a model for, and which of the texts it names.

    Attributes:
        index: the document's, in its task.
        instances: lm-eval's requests, those of the texts first.
        n_texts: how many texts there are: the choices, or one.
        named: the indices of the right choices, or of the one text.
    """

    index: int
    instances: Sequence[Instance]
    n_texts: int
    named: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """The texts that are not named."""
        return tuple(k for k in range(self.n_texts) if k not in self.named)


def rise_with_likelihood(bound: BoundTask, documents: Sequence[NamedTexts]) -> int:
    """Return +1 where a task's metric rises as the named texts become likelier, −1 where it falls, else 0.

    A model to which the named texts of all documents are likely is compared with others to which, at one
    document, another text is, each in its turn. 0 means that the metric is higher for some of these and lower
    for others, that it is the same for all, or that it has no value.
    """
    some = documents[:: max(len(documents) // _N_DOCUMENTS, 1)][:_N_DOCUMENTS]
    try:
        found = set(_gains(bound, some))
    except Exception:  # whatever a task's own code raises at likelihoods that it does not expect
        return 0
    return int(any(gain > 0 for gain in found)) - int(any(gain < 0 for gain in found))


def reply_scores(
    bound: BoundTask, asked: Mapping[int, Sequence[Instance]], replies: Mapping[int, str]
) -> dict[int, float]:
    """Score texts by the metric of lm-eval's task as if a model had replied them.

    Those without a number are left out.

    Args:
        bound: the task.
        asked: its requests by document.
        replies: the texts by document; of a document without one nothing is returned.
    """
    requests = {index: asked[index] for index in replies}
    for index, own in requests.items():
        for request in own:
            request.resps, request.filtered_resps = [replies[index]], {}
    try:
        results = filtered(bound, requests)
        values = {index: own[bound.metric] for index, own in bound.measured(results).items()}
        of_one, parts = bound.aggregation.of_one, bound.aggregation.parts
        scores = {index: of_one(value, parts(value)) for index, value in values.items()}
    except Exception:  # whatever a task's own code raises at a reply that is none
        return {}
    return {index: score for index, score in scores.items() if math.isfinite(score)}


def _gains(bound: BoundTask, documents: Sequence[NamedTexts]) -> Iterator[float]:
    """Yield how much higher the metric is where all named texts are likely than where one is not."""

    def parts(document: NamedTexts, likely: Sequence[int]) -> tuple[float, ...]:
        replies = {document.index: _made_up(document, likely)}
        measured = bound.measured(replies)[document.index]
        return bound.aggregation.parts(measured.get(bound.metric, math.nan))

    named = np.array([parts(document, document.named) for document in documents], dtype=np.float64)
    whole = float(bound.aggregation.combine(named.mean(axis=0)))
    for i, document in enumerate(documents):
        for likely in [[k] for k in document.others] or [[]]:
            changed = named.copy()
            changed[i] = parts(document, likely)
            other = float(bound.aggregation.combine(changed.mean(axis=0)))
            yield 0.0 if abs(whole - other) <= _SAME * max(abs(whole), abs(other)) else whole - other


def _made_up(document: NamedTexts, likely: Sequence[int]) -> list[Any]:
    """Return what a model to which these texts are likely answers to a document's requests."""
    answers: list[Any] = []
    for k, instance in enumerate(document.instances):
        log_likelihood = (_LIKELY if k in likely else _UNLIKELY) if k < document.n_texts else _ALIKE
        is_rolling = instance.request_type == "loglikelihood_rolling"
        answers.append(log_likelihood if is_rolling else (log_likelihood, k in likely))
    return answers
