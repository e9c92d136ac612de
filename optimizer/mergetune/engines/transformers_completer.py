"""A transformers model as a `Completer`: batches of like lengths, greedy unless told otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mergetune.engines.completions import Choosing, Generation, Scored, Scoring
from mergetune.errors import MergetuneError, TrialError
from mergetune.machine.memory import free_memory, is_out_of_memory

Asked = TypeVar("Asked", Generation, Scoring, Choosing)
Answer = TypeVar("Answer")

# In transformers' own order.
_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": lambda value: TemperatureLogitsWarper(float(value)),
    "top_k": lambda value: TopKLogitsWarper(int(value)),
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}
_PAD = 0  # any token: what stands in its places is never looked at


class TransformersCompleter:
    """A causal language model of transformers as a `Completer`.

    What its generation_config.json says has no part in the replies.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        batch_size: how many requests are worked on at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model = model
        self._tokenizer, self._batch_size = tokenizer, batch_size

    @torch.no_grad()
    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """See `Completer.generate`."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            sampling = sorted(item for item in request.sampling.items() if item[0] != "seed")
            kind = request.max_new_tokens, request.stop, request.stop_tokens, sampling
            groups[repr(kind)].append(number)
        replies: dict[int, str] = {}
        for numbers in groups.values():
            replies |= self._in_batches(numbers, requests, self._replies)
        return [replies[number] for number in range(len(requests))]

    @torch.no_grad()
    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`."""
        found = self._in_batches(range(len(requests)), requests, self._scored)
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`."""
        found = self._in_batches(range(len(requests)), requests, self._chosen)
        return [found[number] for number in range(len(requests))]

    def _in_batches(
        self, numbers: Iterable[int], requests: Sequence[Asked], answer: Callable[[list[Asked]], list[Answer]]
    ) -> dict[int, Answer]:
        """Answer requests by their numbers, the longest first: what does not fit in memory shows at once.

        A batch that does not fit is halved, and so are those after it.

        Raises:
            TrialError: not even one request fits.
        """
        ordered = sorted(numbers, key=lambda number: len(requests[number].tokens), reverse=True)
        found: dict[int, Answer] = {}
        while ordered:
            batch = ordered[: self._batch_size]
            try:
                found |= zip(batch, answer([requests[number] for number in batch]), strict=True)
                del ordered[: len(batch)]
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())
            free_memory()
            if len(batch) == 1:
                raise TrialError(
                    f"Memory is too small for a single prompt of {len(requests[batch[0]].tokens)} tokens "
                    f"({reason}). Take a device with more, a smaller `engine.dtype` or shorter items."
                )
            self._batch_size = len(batch) // 2
        return found

    def _scored(self, requests: Sequence[Scoring]) -> list[Scored]:
        found = []
        logits = self._logits([request.tokens[:-1] for request in requests])
        for request, row in zip(requests, logits, strict=True):
            wanted = torch.tensor(request.tokens[request.start :], device=row.device)
            logprobs = _logprobs(row[request.start - 1 : len(request.tokens) - 1])  # (n_scored, n_tokens)
            scores = logprobs.gather(1, wanted[:, None])[:, 0]
            found.append(Scored(scores.tolist(), (logprobs.argmax(dim=1) == wanted).tolist()))
        return found

    def _chosen(self, requests: Sequence[Choosing]) -> list[Scored]:
        found = []
        logits = self._logits([request.tokens for request in requests])
        for request, row in zip(requests, logits, strict=True):
            candidates = torch.tensor(request.candidates, device=row.device)
            logprobs = _logprobs(row[len(request.tokens) - 1])  # (n_tokens,)
            likeliest = (candidates == logprobs.argmax()).tolist()
            found.append(Scored(logprobs[candidates].tolist(), likeliest))
        return found

    def _logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits after every token, (n_texts, length, n_tokens); shorter texts end earlier."""
        length = max(map(len, texts))
        tokens = torch.tensor([[*text, *[_PAD] * (length - len(text))] for text in texts])
        logits: Tensor = self.model(tokens.to(self.model.device)).logits
        return logits

    def _replies(self, requests: Sequence[Generation]) -> list[str]:
        """Reply to requests that differ in nothing but their prompts and seeds."""
        first = requests[0]
        length = max(len(request.tokens) for request in requests)
        padded = [[*[_PAD] * (length - len(each.tokens)), *each.tokens] for each in requests]
        mask = [[0] * (length - len(each.tokens)) + [1] * len(each.tokens) for each in requests]
        criteria = [_StopTexts(self._tokenizer, first.stop, length)] if first.stop else []
        tokens = self.model.generate(
            input_ids=torch.tensor(padded, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=_generation_config(first),
            logits_processor=LogitsProcessorList(_drawing(requests, self.model.device)),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
        return [self._text(row, first) for row in tokens[:, length:].tolist()]

    def _text(self, tokens: Sequence[int], request: Generation) -> str:
        """Return a reply up to the first token that ends it."""
        ends = request.stop_tokens
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        text: str = self._tokenizer.decode(
            tokens[:end],
            skip_special_tokens=request.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text


class _StopTexts(StoppingCriteria):
    """Ends a reply once it holds one of these texts, which are looked for in its last tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, prompt_length
        # a token holds a byte or more; two of slack for those without text
        self._n_last = max(len(text.encode()) for text in stop) + 2

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        last = input_ids[:, self._start :][:, -self._n_last :]
        texts = self._tokenizer.batch_decode(
            last, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # the bytes of a character that is not whole yet are no text
        held = [any(stop in text.rstrip("\ufffd") for stop in self._stop) for text in texts]
        return torch.tensor(held, device=input_ids.device)


class _Drawing(LogitsProcessor):
    """Draws each row's next token by random numbers of its own, whatever else is in the batch.

    The largest of log p − log E is a draw from p, where the E are exponential and independent: the Gumbel-max
    trick (Maddison et al. 2014, section 2).
    """

    def __init__(
        self, warpers: Sequence[LogitsProcessor], seeds: Sequence[int], device: torch.device
    ) -> None:
        self._warpers: Any = LogitsProcessorList(warpers)  # its types are of no use
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits: Tensor = self._warpers(input_ids, scores.float())  # (n_rows, n_tokens)
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return logits - noise.log()


def _drawing(requests: Sequence[Generation], device: torch.device) -> list[LogitsProcessor]:
    """Return what draws replies at random; nothing where they are greedy."""
    sampling = requests[0].sampling
    if not sampling.get("temperature", 1.0):
        return []
    warpers = [warper(sampling[name]) for name, warper in _WARPERS.items() if sampling.get(name)]
    return [_Drawing(warpers, [request.sampling.get("seed", 0) for request in requests], device)]


def _logprobs(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32: in bfloat16 they would be rounded to steps of 0.03."""
    return logits.float().log_softmax(dim=-1)


def _generation_config(request: Generation) -> GenerationConfig:
    """Return all that a reply depends on beside the model and the prompt.

    Raises:
        MergetuneError: transformers knows no such setting.
    """
    sampling = {name: value for name, value in request.sampling.items() if name != "seed"}
    kind: Any = GenerationConfig  # it has no types
    if unknown := sampling.keys() - kind().to_dict().keys():
        raise MergetuneError(
            f"transformers does not take these generation settings: {', '.join(sorted(unknown))}. Leave them "
            "out of the task."
        )
    others = {name: value for name, value in sampling.items() if name not in _WARPERS}
    return kind(  # type: ignore[no-any-return]
        do_sample=False,  # see `_Drawing`
        max_new_tokens=request.max_new_tokens,
        eos_token_id=list(request.stop_tokens) or None,
        pad_token_id=_PAD,
        **others,
    )
