"""Joint items: a persona's system message and voice with the tools and requests of others, in two turns.

The first turn is the request, where a call is due; the second comes after the tool's result, where a reply in
the persona's voice is due and no call.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

from mergetune.engines.call_text import openai_message
from mergetune.errors import MergetuneError
from mergetune.evaluation.item_files import ItemFile
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.scorers import BaseScorer, ToolCallsScorer

Row = dict[str, Any]  # of a file in OpenAI's chat format
T = TypeVar("T")

# What a persona's `answer` would be to these scorers is a reply to another request.
_WITHOUT_ANSWER = ("regex", "judge")
# Splits go by the question where there are half as many as items, so that both turns of one stay together.
_MOST_OF_A_REQUEST = 2
_CALLS = ToolCallsScorer()


@dataclass(frozen=True)
class JointItems:
    """Items that need two skills at once, as rows: the n-th reply comes after the n-th call.

    Attributes:
        calls: a call is due, the tool item's answer.
        replies: the call was made, and its result is there.
        n_made: how many results were made of the call, since the data have none.
        n_left_out: how many tool items were not used: they call no tool, or their request stands too often.
    """

    calls: tuple[Row, ...]
    replies: tuple[Row, ...]
    n_made: int
    n_left_out: int

    @property
    def summary(self) -> str:
        """Say how many items there are, and what became of the rest."""
        made = f"; {self.n_made} results are made of the call" if self.n_made else ""
        left_out = f"; {self.n_left_out} tool items are left out" if self.n_left_out else ""
        return f"{len(self.calls)} calls and {len(self.replies)} replies{made}{left_out}"


@dataclass(frozen=True)
class _Request:
    """A tool item at its call.

    Attributes:
        number: which one of the file's items it is, from 1.
        item: the messages up to the call, and the accepted calls as `answer`.
        call: the call, as the assistant makes it.
        results: of the tools, in the data; empty: there are none.
    """

    number: int
    item: Item
    call: Message
    results: tuple[Message, ...]


def join_items(
    persona: ItemFile,
    tools: ItemFile,
    scorer: BaseScorer,
    *,
    system: str | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> JointItems:
    """Pair each request of a tool with an item of a persona, whose items are used equally often.

    Args:
        persona: items with a system message, and what their scorer needs to know a voice.
        tools: items whose answer is a call, or conversations with a call and its result.
        scorer: the persona's.
        system: the persona's system message, where its items have none.
        seed: of the pairing.
        limit: the most requests.

    Raises:
        MergetuneError: the scorer knows no voice, an item does not suit its scorer, a persona has no system
            message, or no tool item calls a tool.
    """
    if scorer.asks != "reply" or scorer.kind == "tool_calls":
        raise MergetuneError(
            f"The persona's scorer must know a voice by a reply's text, but is `{scorer.kind}`. Take "
            "`regex`, `contains`, `judge` or `python`."
        )
    persona.check(scorer)
    tools.check(_CALLS)
    systems = [_system(*each, system) for each in zip(persona.items, persona.places, strict=True)]
    requests = list(_requests(tools))
    if not requests:
        raise MergetuneError(
            f"{tools.summary}. Joint items need items that call a tool, but none of these does."
        )
    draw = random.Random(seed)
    chosen = sorted(_shuffled(requests, draw)[:limit], key=lambda request: request.number)
    order = _shuffled(range(len(persona.items)), draw)
    calls, replies = [], []
    for place, request in enumerate(chosen):
        number = order[place % len(order)]
        beside = _beside(persona.items[number], number + 1, request, scorer)
        results = request.results or _made(request.call)
        asked = [*_system_messages(systems[number], request.item), *request.item.messages_without_system]
        calls.append(_row(asked, request.item.answer, beside))
        replies.append(_row([*asked, request.call, *results], [], beside))
    n_made = sum(not request.results for request in chosen)
    return JointItems(tuple(calls), tuple(replies), n_made, len(tools.items) - len(requests))


def _system(item: Item, place: str, given: str | None) -> str:
    system = item.system or given
    if system is None:
        raise MergetuneError(
            f"{place}: a persona needs a system message, but the item has none. Say `--system TEXT`: what "
            'their suite has as `system` or, if the persona needs none, "".'
        )
    return system


def _requests(tools: ItemFile) -> Iterator[_Request]:
    """Yield the items that call a tool, of one request two at most."""
    seen: Counter[str] = Counter()
    for number, (item, place) in enumerate(zip(tools.items, tools.places, strict=True), start=1):
        request = _to_be_called(number, item) or _was_called(number, item)
        prompt = "" if request is None else request.item.prompt
        if request is None or not prompt.strip() or seen[prompt] == _MOST_OF_A_REQUEST:
            continue
        if problem := _CALLS.check_item(request.item):
            raise MergetuneError(f"{place}: {problem}")
        seen[prompt] += 1
        yield request


def _to_be_called(number: int, item: Item) -> _Request | None:
    """Return the request of an item whose answer is a call; None where it is none."""
    calls = _CALLS.wanted_calls(item)
    if not calls:
        return None
    target = item.target if item.target is not None and item.target.tool_calls else None
    call = target or Message(role="assistant", tool_calls=tuple(calls))
    return _Request(number, item, call.with_call_ids(), ())


def _was_called(number: int, item: Item) -> _Request | None:
    """Return the request of the last call in a conversation that has its result; None where there is none."""
    for turn in reversed(item.turns("all")[:-1]):
        call, after = turn.target, item.messages[len(turn.messages) + 1 :]
        results = tuple(takewhile(lambda message: message.role == "tool", after))
        if call is not None and call.tool_calls and results and _is_asked(turn):
            return _Request(number, turn, call, results)
    return None


def _is_asked(turn: Item) -> bool:
    """Say whether a turn comes after one of the user or a tool, and a request is there."""
    roles = [message.role for message in turn.messages]
    return "user" in roles and roles[-1] in ("user", "tool")


def _made(message: Message) -> list[Message]:
    """Return the results of calls whose data have none: that each was carried out as it says."""
    return [
        Message(
            role="tool",
            content=json.dumps({"status": "ok", **call.arguments}, ensure_ascii=False),
            tool_call_id=call.id,
            name=call.name,
        )
        for call in message.tool_calls
    ]


def _system_messages(persona: str, tool_item: Item) -> list[Message]:
    """Return the persona's system message with that of the tool item, which its answer may rest on."""
    parts = dict.fromkeys(filter(None, (persona, tool_item.system)))
    return [Message(role="system", content="\n\n".join(parts))] if parts else []


def _beside(persona: Item, number: int, request: _Request, scorer: BaseScorer) -> Row:
    """Return what both turns of a pair have beside the conversation."""
    answer = None if scorer.kind in _WITHOUT_ANSWER else persona.answer
    return {
        "tools": list(request.item.tools),
        "voice": {"answer": answer, "patterns": list(persona.patterns)},
        "persona": {"item": number, **(persona.metadata or {})},
        "request": {"item": request.number, **(request.item.metadata or {})},
        "result_from": "data" if request.results else "call",
    }


def _row(messages: Sequence[Message], answer: Any, beside: Row) -> Row:
    return {
        "messages": [openai_message(message.as_dict()) for message in messages],
        "answer": answer,
        **beside,
    }


def _shuffled(values: Sequence[T], draw: random.Random) -> list[T]:
    """Return values in a random order, the same in every version of Python."""
    return sorted(values, key=lambda _: draw.random())
