"""Losses of a model on references: how far it is, in nats, from saying what each item asks for.

With n tokens of a text after its prompt and pₜ the probability of each, p̄ = (Π pₜ)^(1/n) is the text's
likelihood per token. With wₖ = exp(sₖ log pₖ) for the likelihood pₖ of choice k (sₖ = 1, or per character),
q = Σ_wanted wₖ / Σ_all wₖ is the share of the choices that are wanted. The loss of an item is

    −log q              of a question with choices,
    −log p̄              of a text that is to become likelier: its cross-entropy per token,
    −log(1 − p̄ + ε)     of a text that is to become less likely, plus log(1 + ε), with ε = 1e-6.

All are positive and fall as the score gets better; of an item with several turns it is the mean over them, as
the score is. The last one is the unlikelihood of Welleck et al. (2020,
Neural Text Generation with Unlikelihood Training, equation 4) of a text instead of a token: smooth, with a
slope opposite to that of −log p̄, and between 0 and log(1 + 1/ε) = 13.8 nats. The negative of a cross-entropy
has no least value and would push for ever; this one pushes less the less likely the text is. Where a score
gets better without the right choices, all others are wanted: −log q is then to choices what it is to texts.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergetune.engines.completions import Scoring
from mergetune.errors import TrialError
from mergetune.merging.elementwise import wide
from mergetune.slopes.references import Reference, References

MAX_TOKENS = 1024  # in one batch, padding counted
_SURE = 1e-6  # ε above: keeps the loss finite where a model is sure of a text that is not wanted


def item_losses(model: Any, references: Sequence[Reference]) -> Tensor:
    """Return a loss for each item, in nats: (n_items,), in float32 or the model's float64.

    Of choices the share counts, not the likelihood: it grows with the margin that the score's argmax
    depends on, and not with what all choices have in common.
    """
    texts = [text for reference in references for text in reference.texts]
    totals = _log_likelihoods(model, texts)
    losses, begin = [], 0
    for reference in references:
        own = totals[begin : begin + len(reference.texts)]
        begin += len(own)
        if reference.wanted:
            shares = functional.log_softmax(own * own.new_tensor(reference.scales), dim=0)
            losses.append(-shares[list(reference.wanted)].logsumexp(dim=0))
        else:
            lengths = [max(len(text.tokens) - text.start, 1) for text in reference.texts]
            paid = -own / own.new_tensor(lengths)  # (n_turns,)
            losses.append((_unlikelihood(paid) if reference.is_unwanted else paid).mean())
    return torch.stack(losses)


def _unlikelihood(paid: Tensor) -> Tensor:
    """Return the loss of a text that is to become less likely from its cross-entropy per token."""
    return math.log1p(_SURE) - (_SURE - torch.expm1(-paid)).log()


def losses_by_task(
    model: Any, references: References, max_tokens: int = MAX_TOKENS
) -> dict[str, dict[str, dict[str, float]]]:
    """Return each item's loss, in nats, by score, task and item.

    Raises:
        TrialError: a loss is infinite or NaN.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    with torch.no_grad():
        for score_name, own in references.by_score.items():
            tasks: dict[str, dict[str, float]] = {}
            for batch, _ in batches(own, max_tokens):
                for reference, loss in zip(batch, item_losses(model, batch).tolist(), strict=True):
                    tasks.setdefault(reference.task, {})[reference.item] = loss
            check_finite(
                f"the loss of `{score_name}`", [loss for task in tasks.values() for loss in task.values()]
            )
            found[score_name] = tasks
    return found


def mean_losses(model: Any, references: References, max_tokens: int = MAX_TOKENS) -> dict[str, float]:
    """Return each score's loss: the mean over its tasks of the mean over their items, as the score is.

    Raises:
        TrialError: a loss is infinite or NaN.
    """
    by_task = losses_by_task(model, references, max_tokens)
    return {name: mean_of_tasks(own.values()) for name, own in by_task.items()}


def mean_of_tasks(tasks: Iterable[Mapping[str, float]]) -> float:
    """Return the mean over tasks of the mean over their items."""
    means = [sum(items.values()) / len(items) for items in tasks]
    return sum(means) / len(means)


def batches(
    references: Sequence[Reference], max_tokens: int = MAX_TOKENS
) -> Iterator[tuple[list[Reference], list[float]]]:
    """Yield one score's references in batches of about one length, with each one's weight in the mean."""
    sizes = Counter(reference.task for reference in references)
    batch: list[Reference] = []
    for reference in sorted(references, key=lambda each: each.n_tokens):
        rows = sum(len(each.texts) for each in (*batch, reference))
        if batch and rows * reference.n_tokens > max_tokens:
            yield batch, [1 / sizes[each.task] / len(sizes) for each in batch]
            batch = []
        batch.append(reference)
    if batch:
        yield batch, [1 / sizes[each.task] / len(sizes) for each in batch]


def check_finite(what: str, values: Iterable[float]) -> None:
    """Raise `TrialError` if one of these values is infinite or NaN."""
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise TrialError(
            f"{what} must be finite, but got {wrong[0]}: the weights are too large for the model's dtype. "
            "Narrow the ranges of the search space, or take `dtype: float32`."
        )


def _log_likelihoods(model: Any, texts: Sequence[Scoring]) -> Tensor:
    """Return the sum of the log-probabilities of each text's tokens from its start on: (n_texts,)."""
    longest = max(len(text.tokens) for text in texts)
    tokens = torch.zeros(len(texts), longest, dtype=torch.long)
    is_text, counts = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)] = torch.tensor(text.tokens)
        is_text[row, : len(text.tokens)] = 1
        counts[row, text.start : len(text.tokens)] = True
    first = min(text.start for text in texts) - 1  # its logits say what comes at the first start
    tokens, is_text, counts = (each.to(model.device) for each in (tokens, is_text, counts[:, first + 1 :]))
    logits = _logits(model, tokens, is_text, first)[counts]  # (n_counted, vocabulary)
    paid = functional.cross_entropy(wide(logits), tokens[:, first + 1 :][counts], reduction="none")
    rows = counts.nonzero()[:, 0]
    return -paid.new_zeros(len(texts)).index_add(0, rows, paid)


def _logits(model: Any, tokens: Tensor, is_text: Tensor, first: int) -> Tensor:
    """Return the logits from position `first` up to the last but one: (n_texts, length, vocabulary)."""
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": is_text, "use_cache": False}
    can_choose = "logits_to_keep" in inspect.signature(model.forward).parameters
    if can_choose:
        inputs["logits_to_keep"] = torch.arange(first, tokens.shape[1] - 1, device=tokens.device)
    logits: Tensor = model(**inputs).logits
    return logits if can_choose else logits[:, first:-1]
