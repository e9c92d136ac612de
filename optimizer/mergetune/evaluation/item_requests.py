"""What an item asks a model: its conversation, turn by turn, and each repeat with a seed of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.lm_tasks import item_of
from mergetune.evaluation.suite import SamplingConfig, TaskConfig

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

Renderer = Callable[..., str]  # of messages


def conversation_requests(
    task: Task, config: TaskConfig, doc: Mapping[str, str], index: int, render: Renderer
) -> list[Instance]:
    """Make the requests of a JSONL task's document as conversations: one for each turn that is scored.

    Args:
        task: the task as lm-eval has it.
        config: the task in the suite.
        doc: the document.
        index: which one of the task's documents it is.
        render: writes messages and tools as the model's chat template does.
    """
    made: list[Instance] = []
    for turn in item_of(doc).turns(config.score_turns):
        tools = {"tools": [dict(tool) for tool in turn.tools]} if turn.tools else {}
        context = render([message.as_dict() for message in told(task, config, turn)], **tools)
        asked = task.construct_requests(
            doc=doc, ctx=context, metadata=(task.config.task, index, 1), apply_chat_template=True
        )
        made += asked if isinstance(asked, list) else [asked]
    for number, request in enumerate(made):
        request.idx = number
    return made


def told(task: Task, config: TaskConfig, turn: Item) -> list[Message]:
    """Return all that a model is told before it replies: system message, few-shot examples, conversation."""
    return [*_system(turn), *_examples(task, config), *turn.messages_without_system]


def drawn(requests: Sequence[Instance], sampling: SamplingConfig, item: Item) -> Iterator[Instance]:
    """Yield every request as often as it is repeated, with a seed of its own, so that each is asked.

    It depends on what the item asks, the turn and the repeat, and on nothing that scores: tasks with the same
    items and other scorers share their replies.
    """
    asked = json.dumps([item.prompt, *(message.model_dump() for message in item.conversation)])
    for request in requests:
        for repeat in range(sampling.repeats):
            context, settings = request.args
            text = f"{asked}/{request.idx}/{repeat}"
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
            own = copy(request)
            how = {**sampling.settings, "do_sample": sampling.temperature > 0, "seed": seed}
            own.arguments = (context, {**settings, **how})
            own.idx = request.idx * sampling.repeats + repeat
            yield own


def _system(item: Item) -> list[Message]:
    return [Message(role="system", content=item.system)] if item.system else []


def _examples(task: Task, config: TaskConfig) -> Iterator[Message]:
    """Yield the few-shot examples as turns."""
    scorer = config.scorer
    assert scorer is not None  # TaskConfig
    text_of = scorer.target_text if scorer.asks == "likelihoods" else scorer.answer_text
    for doc in list(task.fewshot_docs())[: config.num_fewshot] if config.num_fewshot else ():
        item = item_of(doc)
        yield from item.messages_without_system
        yield item.target or Message(role="assistant", content=text_of(item))
