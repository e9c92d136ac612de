"""A deployed model as lm-eval sees it: conversations are rendered by the server's own chat template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from mergetune.engines.completions import CompletionsLM, Truncate, generation_settings
from mergetune.engines.endpoint import Endpoint
from mergetune.engines.model_text import sane_length
from mergetune.errors import MergetuneError
from mergetune.weights.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_UNKNOWN_LENGTH = 10**9  # tokens: the server will refuse what is too long


class _Conversation(str):
    """Messages as JSON, in the place of a prompt."""

    @property
    def messages(self) -> list[dict[str, str]]:
        messages: list[dict[str, str]] = json.loads(self)
        return messages

    @property
    def begins_the_reply(self) -> bool:
        return self.messages[-1]["role"] == "assistant"


class ChatLM(LM):  # type: ignore[misc]
    """A deployed endpoint as lm-eval sees it: conversations are rendered by its own chat template.

    Args:
        endpoint: the server.
        scorer: the same with the model's tokenizer, for log-likelihoods; where they follow a
            conversation, the tokenizer's chat template renders it. None: there are no such tasks.
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

    def apply_chat_template(self, chat_history: list[dict[str, str]], **_: Any) -> str:
        """Return the messages for the server to render."""
        return _Conversation(json.dumps(chat_history))

    def excess_tokens(self, request: Instance) -> int:
        """Return how many tokens a request has beyond the model's length; 0 where that cannot be known.

        It can with the tokenizer and, for conversations, its chat template: see `CompletionsLM`.
        """
        scorer, prompt = self._optional_scorer, request.args[0]
        if scorer is None or (isinstance(prompt, _Conversation) and not scorer.tokenizer.chat_template):
            return 0
        return scorer.excess_tokens(replace(request, arguments=(self._render(prompt), *request.args[1:])))

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
            if prompt.begins_the_reply:
                options |= {"add_generation_prompt": False, "continue_final_message": True}
            choice = self._endpoint.complete("/v1/chat/completions", messages=prompt.messages, **options)
            text = (choice.get("message") or {}).get("content")
        else:
            text = self._endpoint.complete("/v1/completions", prompt=prompt, **options).get("text")
        reply: str = postprocess_generated_text(text or "", stop, think_end_token=None)
        return reply

    def _render(self, prompt: str) -> str:
        if not isinstance(prompt, _Conversation):
            return prompt
        return self._scorer.apply_chat_template(prompt.messages, not prompt.begins_the_reply)

    @property
    def _scorer(self) -> CompletionsLM:
        if self._optional_scorer is None:
            raise MergetuneError(
                f"{self._endpoint.url}: choices and log-likelihood tasks need the model's tokenizer, but "
                "there is none. Give its directory or hub id by `--tokenizer`."
            )
        return self._optional_scorer


def served_lm(
    url: str, model: str | None, tokenizer: str | None, concurrency: int, api_key: str | None
) -> ChatLM:
    """Return a served model as lm-eval sees it; see `Endpoint`.

    `tokenizer` is a directory or hub id; None takes it from the directory that vLLM serves, where
    that is on this machine.
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
    length = endpoint.max_length or sane_length(loaded) or _UNKNOWN_LENGTH
    return ChatLM(endpoint, CompletionsLM(endpoint, loaded, length))
