"""lm-eval's model over anything that completes sequences of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from optimizer.engines.conversations import render
from optimizer.errors import MergetuneError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_CANDIDATES = 100  # for one next token; vLLM takes 128
_DEFAULT_NEW_TOKENS = 256  # as lm-eval's HFLM


@dataclass(frozen=True)
class Generation:
    """A prompt to continue.

    Attributes:
        tokens: the prompt.
        max_new_tokens: the longest reply.
        stop: texts that end the reply, and are no part of it.
        stop_tokens: tokens that do, beside the model's own end of sequence.
        sampling: `temperature`, 0 for greedy, and what else the sampler takes, such as `top_p`.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})


@dataclass(frozen=True)
class Scoring:
    """A text whose tokens from `start` ≥ 1 on are to be scored."""

    tokens: Sequence[int]
    start: int


@dataclass(frozen=True)
class Choosing:
    """A prompt and up to `MAX_CANDIDATES` candidates for its next token."""

    tokens: Sequence[int]
    candidates: Sequence[int]


@dataclass(frozen=True)
class Scored:
    """The log-probability (nats) of each token, and whether it was the likeliest one at its place."""

    logprobs: Sequence[float]
    are_likeliest: Sequence[bool]


class Completer(Protocol):
    """What answers requests; each method takes any number of them and batches as it likes."""

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """Return the replies, without special tokens."""
        ...

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """Return what each token after `start` scores."""
        ...

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """Return what each candidate scores."""
        ...


@dataclass(frozen=True)
class TokenizerPrompts:
    """Prompts as a tokenizer from transformers writes them, in every engine alike."""

    tokenizer: Any

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the model's chat template writes it; see `render`."""
        return render(self.tokenizer, chat_history, add_generation_prompt)


class CompletionsLM(TemplateLM):  # type: ignore[misc]
    """A `Completer` as lm-eval sees it: prompts, truncation and stops are those of `HFLM`.

    Args:
        completer: what answers the requests.
        tokenizer: the model's, from transformers.
        max_length: the most tokens that prompt and reply may have together.
        seed: of every reply that is drawn at random, so that it does not depend on the other items.
    """

    def __init__(self, completer: Completer, tokenizer: Any, max_length: int, seed: int = 0) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._completer, self._seed = completer, seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's directory or hub id."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens; a text that begins with the BOS token gets no second one."""
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            chosen = {"add_special_tokens": False}
        tokens: list[int] = self.tokenizer.encode(string, **chosen)
        return tokens

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the model's chat template writes it; see `render`."""
        return render(self.tokenizer, chat_history, add_generation_prompt)

    def excess_tokens(self, request: Instance) -> int:
        """Return by how many tokens a request is too long; see `excess_tokens`."""
        return excess_tokens(self, request, self.max_length - 1)  # one token must be generated

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Score whole texts, in windows of the model's length where they are longer."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [
            (number, (("", ""), context, continuation))
            for number, tokens in enumerate(texts)
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=tokens,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 2,  # beside the context's one and the one to generate
                    context_len=1,
                ),
            )
        ]
        scores = self._loglikelihood_tokens([window for _number, window in windows])
        totals = [0.0] * len(texts)
        for (number, _window), (logprob, _is_greedy) in zip(windows, scores, strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Generate replies."""
        stops, generations = [], []
        for request in requests:
            prompt, settings = request.args
            generation, stop = self._generation(prompt, settings)
            generations.append(generation)
            stops.append(stop)
        replies = self._completer.generate(generations)
        # a stop may stand where a token that also holds other text was cut
        return [
            postprocess_generated_text(reply, stop, think_end_token=None)
            for reply, stop in zip(replies, stops, strict=True)
        ]

    def _generation(self, prompt: str, settings: Mapping[str, Any]) -> tuple[Generation, list[str]]:
        """Return a request and the stops of an lm-eval request."""
        max_new_tokens, until, sampling = generation_settings(settings)
        if sampling.get("temperature", 1.0):
            sampling.setdefault("seed", self._seed)
        # special tokens are no part of the text that stops are looked for in
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        stop_tokens = [special[text] for text in until if text in special]
        stop = [text for text in until if text not in special]
        room = room_for_prompt(max_new_tokens, self.max_length)
        tokens = self.tok_encode(prompt)[-room:]
        return Generation(tokens, max_new_tokens, stop, stop_tokens, sampling), stop

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Score token sequences; single tokens after one context come from one request."""
        found: dict[int, tuple[float, bool]] = {}
        same_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        scorings: dict[int, Scoring] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            if len(continuation) == 1:
                same_context[tuple(context[-(self.max_length - 1) :])].append(number)
            else:  # one token must be generated, so one less fits
                tokens = [*context, *continuation][-(self.max_length - 1) :]
                start = max(len(tokens) - len(continuation), 1)
                scorings[number] = Scoring(tokens, start)
        choosings = [
            (numbers[start : start + MAX_CANDIDATES], context)
            for context, numbers in same_context.items()
            for start in range(0, len(numbers), MAX_CANDIDATES)
        ]
        chosen = self._completer.choose(
            [Choosing(context, [requests[n][2][0] for n in numbers]) for numbers, context in choosings]
        )
        for (numbers, _context), scored in zip(choosings, chosen, strict=True):
            found |= zip(numbers, zip(scored.logprobs, scored.are_likeliest, strict=True), strict=True)
        for number, scored in zip(scorings, self._completer.score(list(scorings.values())), strict=True):
            found[number] = sum(scored.logprobs), all(scored.are_likeliest)
        return [found[number] for number in range(len(requests))]


def excess_tokens(lm: TemplateLM, request: Instance, most_scored: int) -> int:
    """Return by how many tokens a request is longer than the model takes, 0 where it fits.

    Args:
        lm: with the model's tokenizer and length.
        request: whole texts are scored in windows, and always fit.
        most_scored: how many tokens a context and its continuation may have together.
    """
    if request.request_type == "loglikelihood_rolling":
        return 0
    if request.request_type == "generate_until":
        prompt, settings = request.args
        n_tokens = len(lm.tok_encode(prompt)) + generation_settings(settings)[0]
        return max(n_tokens - int(lm.max_length), 0)
    context, continuation = context_and_continuation(lm, *request.args)
    return max(len(context) + len(continuation) - most_scored, 0)


def context_and_continuation(lm: TemplateLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and of its continuation, as `TemplateLM.loglikelihood` splits them.

    Where there is no context, the token that a text begins with is one.
    """
    if context:
        before, after = lm._encode_pair(context, continuation)
        return before, after
    tokens: list[int] = lm.tok_encode(continuation, add_special_tokens=False)
    if tokens[:1] == [lm.prefix_token_id]:
        return tokens[:1], tokens[1:]
    return [lm.prefix_token_id], tokens


def room_for_prompt(max_new_tokens: int, max_length: int) -> int:
    """Return how many tokens a prompt may have; raises `MergetuneError` where replies leave it none."""
    if max_new_tokens >= max_length:
        raise MergetuneError(
            f"A reply must leave room for its prompt, but `max_new_tokens` is {max_new_tokens}, and the "
            f"model's length is {max_length} tokens. Give a smaller one, or the engine a longer `max_length`."
        )
    return max_length - max_new_tokens


def generation_settings(settings: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """Return the longest reply in tokens, the stops and the sampling of an lm-eval request."""
    sampling = dict(normalize_gen_kwargs(dict(settings), _DEFAULT_NEW_TOKENS))
    stop = [text for text in handle_stop_sequences(sampling.pop("until", None), eos=None) if text]
    max_new_tokens = int(sampling.pop("max_gen_toks"))
    if not sampling.pop("do_sample"):
        sampling = {"temperature": 0.0}
    return max_new_tokens, stop, sampling
