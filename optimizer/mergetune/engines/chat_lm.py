"""A deployed model as lm-eval sees it: conversations are rendered by the server's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from mergetune.engines.call_text import hermes_call, openai_message
from mergetune.engines.completions import CompletionsLM, Truncate, generation_settings
from mergetune.engines.conversations import Tools
from mergetune.engines.endpoint import Endpoint
from mergetune.engines.model_text import sane_length
from mergetune.engines.reply_times import ReplyTimes
from mergetune.errors import MergetuneError
from mergetune.weights.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_UNKNOWN_LENGTH = 10**9  # tokens: the server will refuse what is too long


class _Conversation(str):
    """Messages, tools and arguments of the chat template as JSON, in the place of a prompt."""

    def parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
        """Return the messages, the tools and the template's arguments."""
        messages, tools, arguments = json.loads(self)
        return messages, tools, arguments


class ChatLM(ReplyTimes, LM):  # type: ignore[misc]
    """A deployed endpoint as lm-eval sees it: conversations are rendered by its own chat template.

    Args:
        endpoint: the server.
        scorer: the same with the model's tokenizer, for log-likelihoods and lengths; where they belong to a
            conversation, the tokenizer's chat template renders it. None: there is no tokenizer.
    """

    def __init__(self, endpoint: Endpoint, scorer: CompletionsLM | None) -> None:
        super().__init__()
        self._endpoint, self._optional_scorer = endpoint, scorer

    @property
    def truncate(self) -> Truncate:
        """What becomes of a text that is too long to be scored; replies are left to the server."""
        return self._optional_scorer.truncate if self._optional_scorer else "refuse"

    @truncate.setter
    def truncate(self, truncate: Truncate) -> None:
        if self._optional_scorer:
            self._optional_scorer.truncate = truncate

    @property
    def max_length(self) -> int | None:
        """The most tokens that prompt and reply may have together; None where nothing says it."""
        return self._optional_scorer.max_length if self._optional_scorer else self._endpoint.max_length

    def apply_chat_template(
        self,
        chat_history: list[dict[str, Any]],
        add_generation_prompt: bool = True,  # noqa: ARG002  the last message says it
        tools: Tools = (),
        template_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the conversation for the server to render."""
        return _Conversation(json.dumps([chat_history, list(tools), dict(template_arguments)]))

    def excess_tokens(self, request: Instance) -> int:
        """Return how many tokens a request has beyond the model's length; 0 where that cannot be known.

        It can with a tokenizer whose chat template takes the conversation, as the server's may do alone.
        """
        if self._optional_scorer is None:
            return 0
        try:
            prompt = self._render(request.args[0])
        except MergetuneError:
            return 0
        return self._optional_scorer.excess_tokens(replace(request, arguments=(prompt, *request.args[1:])))

    def count_tokens(self, reply: str) -> int:
        """Return how many tokens a reply has; raises `MergetuneError` where there is no tokenizer."""
        return self._scorer.count_tokens(reply)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Generate replies: to conversations by the chat endpoint, to plain prompts as text."""
        return self._endpoint.each(self._reply, requests)

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Score continuations; see `CompletionsLM.loglikelihood`."""
        contexts = [self._render(request.args[0]) for request in requests]
        return self._scorer.loglikelihood(
            [
                replace(request, arguments=(context, request.args[1]))
                for request, context in zip(requests, contexts, strict=True)
            ]
        )

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Score whole texts; see `CompletionsLM.loglikelihood_rolling`."""
        return self._scorer.loglikelihood_rolling(requests)

    def _reply(self, request: Instance) -> str:
        prompt, settings = request.args
        max_tokens, stop, sampling = generation_settings(settings)
        options = {**sampling, "max_tokens": max_tokens, "stop": stop}
        if isinstance(prompt, _Conversation):
            messages, tools, arguments = prompt.parts()
            if _begins_the_reply(messages):
                options |= {"add_generation_prompt": False, "continue_final_message": True}
            if arguments:
                options["chat_template_kwargs"] = arguments
            sent = [openai_message(message) for message in messages]
            choice = self._endpoint.complete("/v1/chat/completions", messages=sent, tools=tools, **options)
            message = choice.get("message") or {}
            return "\n".join(filter(None, [_ended(message.get("content"), stop), *_calls(message)]))
        return _ended(self._endpoint.complete("/v1/completions", prompt=prompt, **options).get("text"), stop)

    def _render(self, prompt: str) -> str:
        if not isinstance(prompt, _Conversation):
            return prompt
        messages, tools, arguments = prompt.parts()
        begin = not _begins_the_reply(messages)
        return self._scorer.apply_chat_template(messages, begin, tools, arguments)

    @property
    def _scorer(self) -> CompletionsLM:
        if self._optional_scorer is None:
            raise MergetuneError(
                f"{self._endpoint.url}: choices, log-likelihood tasks and `reply_tokens` need the model's "
                "tokenizer, but there is none. Give its directory or hub id by `--tokenizer`."
            )
        return self._optional_scorer


def _begins_the_reply(messages: Sequence[Mapping[str, Any]]) -> bool:
    return bool(messages[-1]["role"] == "assistant")


def _ended(text: str | None, stop: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings, where a server has not ended it there."""
    return str(postprocess_generated_text(text or "", list(stop), think_end_token=None))


def _calls(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield the calls that the server found, in Hermes' form; arguments that are no JSON stay as text."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError):
            arguments = function.get("arguments")
        yield hermes_call(function.get("name"), arguments)


def served_lm(
    url: str,
    model: str | None,
    tokenizer: str | None,
    concurrency: int,
    api_key: str | None,
    template: str | None = None,
) -> ChatLM:
    """Return a served model as lm-eval sees it; see `Endpoint`.

    `tokenizer` is a directory or hub id; None takes it from the directory that vLLM serves, where
    that is on this machine. `template` is the chat template that it renders with, in place of its own.
    """
    endpoint = Endpoint(url, model, concurrency, api_key=api_key)
    if tokenizer is None and endpoint.root is not None and has_tokenizer(Path(endpoint.root)):
        tokenizer = endpoint.root
    if tokenizer is None:
        return ChatLM(endpoint, None)
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MergetuneError(
            f"The tokenizer must be a directory or hub id that holds one, but is `{tokenizer}`: {error}"
        ) from error
    loaded.chat_template = template or loaded.chat_template
    length = endpoint.max_length or sane_length(loaded) or _UNKNOWN_LENGTH
    return ChatLM(endpoint, CompletionsLM(endpoint, loaded, length))
