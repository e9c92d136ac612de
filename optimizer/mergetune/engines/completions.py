"""lm-eval's model over anything that completes sequences of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mergetune.engines.conversations import MARKERS, Tools, render
from mergetune.engines.reply_times import ReplyTimes
from mergetune.errors import MergetuneError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_CANDIDATES = 100  # for one next token; vLLM takes 128
Truncate = Literal["refuse", "left"]

_DEFAULT_NEW_TOKENS = 256  # as everywhere in lm-eval
_AT_RANDOM = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # without effect on greedy replies
_REMEDY = (
    "Shorten the prompt or, where the model can take more, raise `engine.max_length`; or let the beginning "
    "of a prompt be cut off (`truncate: left` in the suite)."
)


@dataclass(frozen=True)
class Generation:
    """A prompt to continue.

    Attributes:
        tokens: the prompt.
        max_new_tokens: the longest reply.
        stop: texts that end the reply, and are no part of it.
        stop_tokens: tokens that do, and are no part of it either.
        sampling: `temperature`, 0 for greedy, and what else the sampler takes, such as `top_p`.
        skip_special_tokens: whether these are left out of the reply.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    skip_special_tokens: bool = True


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
        """Return the replies."""
        ...

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """Return what each token after `start` scores."""
        ...

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """Return what each candidate scores."""
        ...


class TokenizerPrompts:
    """Prompts as a tokenizer from transformers writes them, in every engine alike."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(
        self,
        chat_history: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: Tools = (),
        template_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return a conversation as the model's chat template writes it; see `render`."""
        return render(self.tokenizer, chat_history, add_generation_prompt, tools, template_arguments)

    def count_tokens(self, reply: str) -> int:
        """Return how many tokens a reply has."""
        return len(self.tokenizer.encode(reply, add_special_tokens=False, verbose=False))


class CompletionsLM(TokenizerPrompts, ReplyTimes, TemplateLM):  # type: ignore[misc]
    """A `Completer` as lm-eval sees it; tokens, prompts, lengths and stops are the same in every engine.

    Args:
        completer: what answers the requests; None: they are only rendered and counted.
        tokenizer: the model's, from transformers.
        max_length: the most tokens that prompt and reply may have together.
        seed: of every reply that is drawn at random, so that it does not depend on the other items.
        end_tokens: the tokens that end every reply.
        requests_at_a_time: how many it should be given at once, few enough that an end of the process
            loses little; None: as many as you like.

    Attributes:
        end_tokens: the tokens that end every reply.
        truncate: what becomes of a prompt that is too long: `refuse` raises `MergetuneError`, `left` cuts
            its beginning off.
    """

    def __init__(
        self,
        completer: Completer | None,
        tokenizer: Any,
        max_length: int,
        seed: int = 0,
        end_tokens: Sequence[int] = (),
        requests_at_a_time: int | None = None,
    ) -> None:
        TemplateLM.__init__(self)
        TokenizerPrompts.__init__(self, tokenizer)
        self.max_length = max_length
        self.requests_at_a_time = requests_at_a_time
        self.truncate: Truncate = "refuse"
        self._optional_completer, self._seed, self.end_tokens = completer, seed, tuple(end_tokens)
        special = set(tokenizer.all_special_tokens)
        self._says_nothing = special - MARKERS if special & MARKERS else set()

    @property
    def _completer(self) -> Completer:
        assert self._optional_completer is not None  # who only renders is not asked
        return self._optional_completer

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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens; a text that begins with the BOS token gets no second one."""
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and has_bos_prefix(string, prefix):
            chosen = {"add_special_tokens": False}
        # not verbose: lengths are checked here, and transformers would warn of the tokenizer's own
        tokens: list[int] = self.tokenizer.encode(string, verbose=False, **chosen)
        return tokens

    def excess_tokens(self, request: Instance) -> int:
        """Return how many tokens a request has beyond the model's length; 0 where it fits.

        A reply takes the prompt's tokens and `max_gen_toks`; a log-likelihood those of both texts and one
        more, for some servers must generate one. Rolling log-likelihoods come in windows that fit.
        """
        if request.request_type == "loglikelihood_rolling":
            return 0
        if request.request_type in ("generate_until", "reply_seconds"):
            prompt, settings = request.args
            needed = len(self._prompt(prompt)) + generation_settings(settings)[0]
        else:
            needed = sum(map(len, self.split(*request.args))) + 1
        return max(needed - self.max_length, 0)

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what follows it.

        Raises:
            MergetuneError: no token belongs to the continuation alone.
        """
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise MergetuneError(
                "A continuation whose log-likelihood is asked for must have a token of its own, but "
                f"{continuation!r:.200} after {context[-100:]!r} has none. Correct the item's choices."
            )
        return before, after

    def fitted(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Return a context, cut as `truncate` says, together with the tokens to be scored after it.

        Raises:
            MergetuneError: it is too long and may not be cut, or what is scored leaves no room for it.
        """
        what = f"{len(after)} tokens to be scored and one to be generated"
        return [*self._cut(before, self.max_length - 1 - len(after), what), *after]

    def fitted_prompt(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Return a prompt's tokens, cut as `truncate` says to leave room for a reply; raises as `fitted`."""
        what = f"a reply of up to {max_new_tokens} tokens (`max_new_tokens`)"
        return self._cut(self._prompt(prompt), self.max_length - max_new_tokens, what)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations."""
        return self._loglikelihood_tokens(
            [(request.args, *self.split(*request.args)) for request in requests], disable_tqdm=disable_tqdm
        )

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
            postprocess_generated_text(self._said(reply), stop, think_end_token=None)
            for reply, stop in zip(replies, stops, strict=True)
        ]

    def _said(self, reply: str) -> str:
        """Return a reply without the special tokens that say nothing, where they were not left out before."""
        for token in self._says_nothing:
            reply = reply.replace(token, "")
        return reply

    def _generation(self, prompt: str, settings: Mapping[str, Any]) -> tuple[Generation, list[str]]:
        """Return a request and the stops of an lm-eval request."""
        max_new_tokens, until, sampling = generation_settings(settings)
        if sampling.get("temperature", 1.0):
            sampling.setdefault("seed", self._seed)
        # special tokens are no part of the text that stops are looked for in
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        stop_tokens = {*self.end_tokens, *(special[text] for text in until if text in special)}
        stop = [text for text in until if text not in special]
        tokens = self.fitted_prompt(prompt, max_new_tokens)
        skip = not self._says_nothing
        return Generation(tokens, max_new_tokens, stop, sorted(stop_tokens), sampling, skip), stop

    def _prompt(self, prompt: str) -> list[int]:
        return self.tok_encode(prompt) or [self.prefix_token_id]

    def _cut(self, tokens: Sequence[int], room: int, what: str) -> list[int]:
        if room < 1:
            raise MergetuneError(
                f"There must be room for a prompt, but the model's length is {self.max_length} tokens and "
                f"there are {what}. Lower that or, if the model takes more, raise `engine.max_length`."
            )
        if len(tokens) > room and self.truncate == "refuse":
            raise MergetuneError(
                f"A prompt and what follows it must fit into the model's length of {self.max_length} tokens, "
                f"but the prompt has {len(tokens)} and there are {what}, so that there is room for {room}. "
                f"{_REMEDY}"
            )
        return list(tokens[-room:])

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
            tokens = self.fitted(context, continuation)
            if len(continuation) == 1:
                same_context[tuple(tokens[:-1])].append(number)
            else:
                scorings[number] = Scoring(tokens, len(tokens) - len(continuation))
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


def generation_settings(settings: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """Return the longest reply in tokens, the stops and the sampling of an lm-eval request."""
    sampling = dict(normalize_gen_kwargs(dict(settings), _DEFAULT_NEW_TOKENS))
    stop = [text for text in handle_stop_sequences(sampling.pop("until", None), eos=None) if text]
    max_new_tokens = int(sampling.pop("max_gen_toks"))
    if not sampling.pop("do_sample"):
        others = {name: value for name, value in sampling.items() if name not in _AT_RANDOM}
        sampling = {"temperature": 0.0, **others}
    if sampling.get("num_beams") == 1:  # what every engine does
        del sampling["num_beams"]
    return max_new_tokens, stop, sampling
