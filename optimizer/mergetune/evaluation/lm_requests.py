"""What a suite asks a model: lm-eval's requests, by document, and the replies to them.

lm-eval's own loop labels what it scored by the order in which documents were asked for, and runs them in
ascending order. Here a request is made for a document, and belongs to it from then on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergetune.engines.conversations import render
from mergetune.errors import MergetuneError
from mergetune.evaluation.item_requests import Renderer, conversation_requests, drawn, told
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.suite import SuiteConfig
from mergetune.evaluation.thinking import without_thoughts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

    from mergetune.evaluation.bound_task import BoundTask

Messages = list[dict[str, Any]]


def make_requests(
    bound: BoundTask, indices: Iterable[int], lm: LM, suite: SuiteConfig
) -> dict[int, list[Instance]]:
    """Make the requests of some documents, by their indices, each in the order of lm-eval's `idx`.

    Of an item there is one for each turn that is scored, and of these each repeat.

    Args:
        bound: the task.
        indices: of the documents to ask.
        lm: whose chat template renders the prompts, where the suite wants that.
        suite: the suite's file.
    """
    template = _renderer(lm, suite) if suite.chat_template else None
    return {index: _made(bound, index, template) for index in sorted(set(indices))}


def _made(bound: BoundTask, index: int, template: Renderer | None) -> list[Instance]:
    task, doc, config = bound.task, bound.docs[index], bound.config
    if config.items is None:
        return _requests(task, doc, index, template)
    if template is None:
        made = _requests(task, doc, index, None)
    else:
        made = conversation_requests(task, config, doc, index, template)
    if config.scorer is not None and config.scorer.asks == "seconds":
        made = [replace(request, request_type="reply_seconds") for request in made]
    return made if config.sampling is None else list(drawn(made, config.sampling, bound.items[index]))


def conversation_with(
    reply: Message, bound: BoundTask, turn: Item, tokenizer: Any, suite: SuiteConfig
) -> str:
    """Return a turn's conversation and a reply to it as the chat template writes them.

    Without the reply that is the prompt of the turn's request, if the template writes both alike.

    Raises:
        MergetuneError: the template refuses it, or leaves a part of it out.
    """
    messages = [message.as_dict() for message in (*told(bound.task, bound.config, turn), reply)]
    sent = _sent(messages, suite)
    return render(tokenizer, sent, tools=turn.tools, arguments=suite.template_arguments, is_whole=True)


def request_key(request: Instance) -> str:
    """Return a digest of what a reply depends on beside the model: the kind of request and its arguments."""
    text = json.dumps([request.request_type, *request.args], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def ask(lm: LM, requests: Iterable[Instance]) -> None:
    """Put each request to a model and keep its replies in `resps`; equal requests are asked once.

    What stands in the batches depends on the requests alone, so their order should be the suite's.
    """
    for kind, alike in _alike(requests).items():
        replies = iter(getattr(lm, kind)(_asked(alike)))
        for same in alike:
            own = [next(replies) for _ in range(same[0].repeats or 1)]
            for request in same:
                request.resps, request.filtered_resps = list(own), {}


def asked_of(requests: Iterable[Instance]) -> dict[str, list[Instance]]:
    """Return what `ask` puts to a model, by the kind of request."""
    return {kind: _asked(alike) for kind, alike in _alike(requests).items()}


def _alike(requests: Iterable[Instance]) -> dict[str, list[list[Instance]]]:
    """Return groups of equal requests, by the kind of request."""
    by_kind: dict[str, dict[str, list[Instance]]] = {}
    for request in requests:
        by_kind.setdefault(request.request_type, {}).setdefault(request_key(request), []).append(request)
    return {kind: list(alike.values()) for kind, alike in by_kind.items()}


def _asked(alike: Iterable[Sequence[Instance]]) -> list[Instance]:
    return [same[0] for same in alike for _ in range(same[0].repeats or 1)]


def spoken(requests: Mapping[int, Sequence[Instance]], suite: SuiteConfig) -> dict[int, list[Instance]]:
    """Return requests, by document, with what was replied to them after any thoughts; see `SuiteConfig`."""
    return {index: [_spoken(request, suite) for request in own] for index, own in requests.items()}


def filtered(bound: BoundTask, requests: Mapping[int, Sequence[Instance]]) -> dict[int, list[Any]]:
    """Return the replies by document, those to lm-eval's own tasks as the task's filter leaves them."""
    if bound.config.items is not None:
        return {index: [request.resps[0] for request in own] for index, own in requests.items()}
    every = [request for own in requests.values() for request in own]
    chosen = next(each for each in bound.task._filters if each.name == bound.filter)
    chosen.apply(every)
    if any(bound.filter not in request.filtered_resps for request in every):
        raise MergetuneError(
            f"The filter `{bound.filter}` of `{bound.task.task_name}` must give one result for each reply."
        )
    return {
        index: [request.filtered_resps[bound.filter] for request in own] for index, own in requests.items()
    }


def spoken_text(reply: str, suite: SuiteConfig) -> str:
    """Return a reply as it is scored."""
    return without_thoughts(reply, suite.thinking_end) if suite.thinking == "strip" else reply


def _spoken(request: Instance, suite: SuiteConfig) -> Instance:
    """Return a request with its replies as they are scored."""
    own = copy(request)
    own.filtered_resps = {}
    own.resps = [spoken_text(each, suite) if isinstance(each, str) else each for each in request.resps]
    return own


def filter_names(task: Task) -> list[str]:
    """Return the names of a task's filters."""
    return [each.name for each in task._filters]


def merged_into_user(messages: Messages) -> Messages:
    """Write system messages before the first user message; one of their own where there is none."""
    system = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
    rest = [dict(each) for each in messages if each["role"] != "system"]
    if not system:
        return rest
    first = next((each for each in rest if each["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system}, *rest]
    first["content"] = f"{system}\n\n{first['content']}"
    return rest


def _sent(messages: Messages, suite: SuiteConfig) -> Messages:
    """Return messages with their system message where the suite wants it."""
    return merged_into_user(messages) if suite.system == "merge_into_user" else messages


def _renderer(lm: LM, suite: SuiteConfig) -> Renderer:
    def rendered(messages: Messages, **options: Any) -> str:
        if suite.template_arguments:
            options["template_arguments"] = suite.template_arguments
        text: str = lm.apply_chat_template(_sent(messages, suite), **options)
        return text

    return rendered


def _requests(task: Task, doc: Any, index: int, template: Renderer | None) -> list[Instance]:
    chat = template is not None
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot or 0,
        system_instruction=None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=template,
        gen_prefix=task.doc_to_prefix(doc),
    )
    made = task.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(task.config.task, index, task.config.repeats),
        apply_chat_template=chat,
        chat_template=template,
    )
    return sorted(made, key=lambda each: each.idx) if isinstance(made, list) else [made]
