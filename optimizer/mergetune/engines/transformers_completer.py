"""A transformers model as a `Completer`: batches of like lengths, greedy unless told otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
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

from mergetune.engines.batches import joined_batches, plan_batches
from mergetune.engines.completions import Choosing, Generation, Scored, Scoring
from mergetune.engines.grouped_attention import use_grouped_attention
from mergetune.engines.key_value_cache import cache_of_beginning, has_cache, joined_caches
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
# How many tokens of prompts cost as much as a pass beside its tokens: its weights are read, and Python works.
_PASS, _GPU_PASS = 128, 512
# How many tokens that a step looks back at cost as much as the step beside them.
_STEP = 20_000
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
        use_grouped_attention(model)
        self.model = model
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._has_cache = has_cache(model)
        self._takes_places = "position_ids" in signature(model.base_model.forward).parameters

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
            n_steps = requests[numbers[0]].max_new_tokens
            replies |= self._in_batches(numbers, requests, self._replies, n_steps)
        return [replies[number] for number in range(len(requests))]

    @torch.no_grad()
    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`."""
        found = self._in_batches(range(len(requests)), requests, lambda parts: self._scored(*parts))
        return [found[number] for number in range(len(requests))]

    @torch.no_grad()
    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`."""
        found = self._in_batches(range(len(requests)), requests, lambda parts: self._chosen(*parts))
        return [found[number] for number in range(len(requests))]

    def _in_batches(
        self,
        numbers: Iterable[int],
        requests: Sequence[Asked],
        answer: Callable[[list[list[Asked]]], list[Answer]],
        n_steps: int = 0,
    ) -> dict[int, Answer]:
        """Answer requests by their numbers, the longest first: what does not fit in memory shows at once.

        What does not fit is halved, and so is all after it.

        Args:
            numbers: of the requests.
            requests: those and others.
            answer: answers batches that begin alike each.
            n_steps: how many tokens are generated; where there is a cache, several batches do that together.

        Raises:
            TrialError: not even one request fits.
        """
        joins = n_steps > 0 and self._has_cache
        overhead = _PASS if self.model.device.type == "cpu" else _GPU_PASS
        overhead *= 1 if joins else 1 + n_steps
        left = list(numbers)
        found: dict[int, Answer] = {}
        while left:
            texts = [requests[number].tokens for number in left]
            plan = plan_batches(texts, self._batch_size, overhead)
            joined = joined_batches(texts, plan, self._batch_size, _STEP if joins else -1)
            for parts in [[[left[place] for place in part] for part in parts] for parts in joined]:
                batch = [number for part in parts for number in part]
                try:
                    answers = answer([[requests[number] for number in part] for part in parts])
                    found |= zip(batch, answers, strict=True)
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
                break
            left = [number for number in left if number not in found]
        return found

    def _scored(self, requests: Sequence[Scoring]) -> list[Scored]:
        found = []
        logits, start = self._logits(
            [each.tokens[:-1] for each in requests], [each.start for each in requests]
        )
        for request, row in zip(requests, logits, strict=True):
            wanted = torch.tensor(request.tokens[request.start :], device=row.device)
            own = row[request.start - 1 - start : len(request.tokens) - 1 - start]
            logprobs = _logprobs(own)  # (n_scored, n_tokens)
            scores = logprobs.gather(1, wanted[:, None])[:, 0]
            found.append(Scored(scores.tolist(), (logprobs.argmax(dim=1) == wanted).tolist()))
        return found

    def _chosen(self, requests: Sequence[Choosing]) -> list[Scored]:
        found = []
        texts = [request.tokens for request in requests]
        logits, start = self._logits(texts, [len(text) for text in texts])
        for request, row in zip(requests, logits, strict=True):
            candidates = torch.tensor(request.candidates, device=row.device)
            logprobs = _logprobs(row[len(request.tokens) - 1 - start])  # (n_tokens,)
            likeliest = (candidates == logprobs.argmax()).tolist()
            found.append(Scored(logprobs[candidates].tolist(), likeliest))
        return found

    def _logits(self, texts: Sequence[Sequence[int]], needed: Sequence[int]) -> tuple[Tensor, int]:
        """Return logits after the tokens of texts; shorter texts end earlier.

        Args:
            texts: their tokens.
            needed: of each text, after how many tokens its logits are needed, from 1.

        Returns:
            (n_texts, length, n_tokens), and how many tokens at the beginning of all texts are left out.
        """
        cache, start = cache_of_beginning(self.model, texts, min(needed) - 1)
        length = max(map(len, texts))
        tokens = torch.tensor([[*text[start:], *[_PAD] * (length - len(text))] for text in texts])
        known = {"past_key_values": cache} if start else {"use_cache": False}
        logits: Tensor = self.model(tokens.to(self.model.device), **known).logits
        return logits, start

    def _replies(self, parts: Sequence[Sequence[Generation]]) -> list[str]:
        """Reply to requests that differ in nothing but their prompts and seeds; each part begins alike.

        When half of the replies have ended, the others go on alone, unless they depend on settings that count
        from where they go on.
        """
        requests = [request for part in parts for request in part]
        first = requests[0]
        length = max(len(request.tokens) for request in requests)
        tokens, mask, cache = self._read(parts, length)
        drawing = _drawing(requests, self.model.device)
        replies: dict[int, list[int]] = {}
        may_leave = cache is not None and first.sampling.keys() <= {*_WARPERS, "seed"}
        going = list(range(len(requests)))
        while going:
            ends = _Ends(self._tokenizer, first, length, may_leave=may_leave)
            tokens = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=_generation_config(first, length + first.max_new_tokens),
                logits_processor=LogitsProcessorList(drawing),
                stopping_criteria=StoppingCriteriaList([ends]),
            )
            left = [] if tokens.shape[1] == length + first.max_new_tokens else ends.going()
            ended = set(range(len(going))) - set(left)
            replies |= {going[place]: tokens[place, length:].tolist() for place in ended}
            going = [going[place] for place in left]
            if going:
                assert cache is not None  # else all rows end together
                kept = torch.tensor(left, device=tokens.device)
                new = mask.new_ones(len(left), tokens.shape[1] - mask.shape[1])
                tokens, mask = tokens[kept], torch.cat([mask[kept], new], dim=1)
                cache.batch_select_indices(kept)
                for each in drawing:
                    each.keep(left)
        return [self._text(replies[row], first) for row in range(len(requests))]

    def _read(
        self, parts: Sequence[Sequence[Generation]], length: int
    ) -> tuple[Tensor, Tensor, DynamicCache | None]:
        """Return the prompts' tokens and their mask, (n_rows, length), and a cache of all but the last token.

        There is no cache where the model has none, see `has_cache`.
        """
        tokens: list[Tensor] = []
        masks: list[Tensor] = []
        caches: list[DynamicCache] = []
        for part in parts:
            prompts = [request.tokens for request in part]
            cache, start = cache_of_beginning(self.model, prompts, min(map(len, prompts)) - 1)
            own_length = max(map(len, prompts))
            rows = [_padded(prompt, start, own_length) for prompt in prompts]
            own, mask = (torch.tensor(each, device=self.model.device) for each in zip(*rows, strict=True))
            if cache is not None:
                self._extend(cache, own[:, start:-1], mask[:, :-1])
                caches.append(cache)
            tokens.append(pad(own, (length - own_length, 0), value=_PAD))
            masks.append(pad(mask, (length - own_length, 0)))
        cache = caches[0] if len(caches) == 1 else joined_caches(self.model, caches) if caches else None
        return torch.cat(tokens), torch.cat(masks), cache

    def _extend(self, cache: DynamicCache, tokens: Tensor, mask: Tensor) -> None:
        """Add tokens, (n_rows, n_new), to a cache; `mask`, (n_rows, n_tokens), is also of those in it."""
        n_new = tokens.shape[1]
        if n_new:
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -n_new:]
            given = {"position_ids": places} if self._takes_places else {}
            self.model.base_model(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **given
            )

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


class _Ends(StoppingCriteria):
    """Ends a reply at a stop token, or once it holds a stop text; ends all when half of them have ended.

    Args:
        tokenizer: the model's.
        request: what ends a reply.
        prompt_length: how many tokens stand before the replies.
        may_leave: the other half can go on later.
    """

    def __init__(self, tokenizer: Any, request: Generation, prompt_length: int, *, may_leave: bool) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, request.stop, prompt_length
        self._stop_tokens = torch.tensor(sorted(request.stop_tokens), dtype=torch.long)
        self._may_leave = may_leave
        # a token holds a byte or more; two of slack for those without text
        self._n_last = max((len(text.encode()) for text in request.stop), default=0) + 2
        self._is_ended: Tensor | None = None  # (n_rows,)

    def going(self) -> list[int]:
        """Return the rows that have not ended."""
        assert self._is_ended is not None  # at least one token was generated
        return (~self._is_ended).nonzero()[:, 0].tolist()

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self._stop_tokens.to(input_ids.device))
        if self._stop:
            ended |= self._have_stop_texts(input_ids)
        self._is_ended = ended if self._is_ended is None else ended | self._is_ended
        if self._may_leave and 2 * int(self._is_ended.sum()) >= len(ended):
            return torch.ones_like(ended)
        return self._is_ended

    def _have_stop_texts(self, input_ids: Tensor) -> Tensor:
        """Say of each row whether its last tokens hold a stop text."""
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

    def keep(self, rows: Sequence[int]) -> None:
        """Draw for these rows alone from now on."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits: Tensor = self._warpers(input_ids, scores.float())  # (n_rows, n_tokens)
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return logits - noise.log()


def _drawing(requests: Sequence[Generation], device: torch.device) -> list[_Drawing]:
    """Return what draws replies at random; nothing where they are greedy."""
    sampling = requests[0].sampling
    if not sampling.get("temperature", 1.0):
        return []
    warpers = [warper(sampling[name]) for name, warper in _WARPERS.items() if sampling.get(name)]
    return [_Drawing(warpers, [request.sampling.get("seed", 0) for request in requests], device)]


def _padded(prompt: Sequence[int], start: int, length: int) -> tuple[list[int], list[int]]:
    """Return a prompt's tokens, padded to a length after the first `start`, and which of them count."""
    n_missing = length - len(prompt)
    tokens = [*prompt[:start], *[_PAD] * n_missing, *prompt[start:]]
    return tokens, [*[1] * start, *[0] * n_missing, *[1] * (len(prompt) - start)]


def _logprobs(logits: Tensor) -> Tensor:
    """Return log-probabilities in float32: in bfloat16 they would be rounded to steps of 0.03."""
    return logits.float().log_softmax(dim=-1)


def _generation_config(request: Generation, max_length: int) -> GenerationConfig:
    """Return all that a reply depends on beside the model and the prompt; `max_length` counts both.

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
        max_length=max_length,
        eos_token_id=list(request.stop_tokens) or None,
        pad_token_id=_PAD,
        **others,
    )
