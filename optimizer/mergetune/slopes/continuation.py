"""Continuations: a text after a prompt, as the tokens that a model itself would put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from mergetune.engines.completions import Scoring, generation_settings
from mergetune.engines.conversations import MARKERS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from mergetune.engines.completions import CompletionsLM


class Closing(NamedTuple):
    """What ends a reply: text that follows it directly, and tokens after that."""

    text: str
    tokens: Sequence[int]


def continued(lm: CompletionsLM, context: str, continuation: str) -> Scoring:
    """Return a context and its continuation in the tokens that a log-likelihood is measured on."""
    before, after = lm.split(context, continuation)
    tokens = lm.fitted(before, after)
    return Scoring(tokens, len(tokens) - len(after))


def replied(
    lm: CompletionsLM, prompt: str, settings: Mapping[str, Any], reply: str, closing: Closing
) -> Scoring:
    """Return a prompt with a reply and what ends it; a reply cut at the greatest length has no end.

    `settings` are lm-eval's generation settings; the prompt is cut as where a reply is generated.
    """
    limit, _stop, _sampling = generation_settings(settings)
    before = lm.tok_encode(prompt)
    after = [*_tokens_after(lm, prompt, before, reply + closing.text), *closing.tokens][:limit]
    before = lm.fitted_prompt(prompt, limit)
    return Scoring([*before, *after], len(before))


def closing(lm: CompletionsLM, task: Task, chat: bool) -> Closing:
    """Return what ends a task's replies.

    In a conversation it is what the chat template puts there; else what stands after the examples'
    answers, or the first text that stops the model, or the end of the text.
    """
    if chat:
        return _end_of_turn(lm)
    if task.config.num_fewshot:
        return Closing(str(task.config.fewshot_delimiter), [])
    _limit, stops, _sampling = generation_settings(task.config.generation_kwargs or {})
    return Closing(stops[0], []) if stops else Closing("", [lm.eot_token_id])


def written_reply(lm: CompletionsLM, rest: str) -> tuple[str, Closing]:
    """Return a reply, and what ends it, out of what a chat template writes after the prompt.

    The end is the first token that ends every reply or, if there is none, the last special one, but for white
    space; marks of thoughts and calls end nothing.
    """
    tokenizer: Any = lm.tokenizer
    ending = {tokenizer.decode([token]) for token in (lm.eot_token_id, *lm.end_tokens)}
    found = min(((rest.find(each), each) for each in ending if each in rest), default=None)
    if found is None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()} - MARKERS
        found = max(((rest.rfind(each), each) for each in special if each.strip()), default=(-1, ""))
        if found[0] < 0 or rest[found[0] + len(found[1]) :].strip():
            return rest.rstrip(), Closing("", [lm.eot_token_id])
    return rest[: found[0]], Closing("", [tokenizer.convert_tokens_to_ids(found[1])])


def _end_of_turn(lm: CompletionsLM) -> Closing:
    """Return what the chat template writes after a reply."""
    tokenizer: Any = lm.tokenizer
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}]
    try:
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("reply")[2]
    except TemplateError:
        return Closing("", [lm.eot_token_id])
    text, end = written_reply(lm, rest)
    return end._replace(text=text)


def _tokens_after(lm: CompletionsLM, prompt: str, before: Sequence[int], text: str) -> list[int]:
    """Return a text's tokens after a prompt, whose own tokens stay as they are."""
    whole: list[int] = lm.tok_encode(prompt + text)
    if whole[: len(before)] == list(before):
        return whole[len(before) :]
    alone: list[int] = lm.tok_encode(text, add_special_tokens=False)
    return alone
