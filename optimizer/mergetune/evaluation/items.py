"""Items: what one is, the messages and tool calls in it, and the JSON that it is read from."""

from __future__ import annotations

import json
from typing import Any, Literal, NoReturn

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mergetune.engines.call_text import call_id
from mergetune.evaluation.patterns import ReplyPattern
from mergetune.files.yaml_io import Strict

Turns = Literal["last", "all", "text", "calls"]  # which of the model's turns in a conversation are scored


class ToolCall(Strict):
    """A call of a tool: its name, and its arguments by name."""

    name: str = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    id: str | None = None


class Message(Strict):
    """A message of a conversation; `tool_call_id` and `name` are those of a tool's result."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def with_call_ids(self) -> Message:
        """Return the message with an id for each of its calls; see `call_id`."""
        calls = tuple(
            call if call.id is not None else call.model_copy(update={"id": call_id(number)})
            for number, call in enumerate(self.tool_calls)
        )
        return self.model_copy(update={"tool_calls": calls})

    @property
    def wanted(self) -> Any:
        """What an item has as its `answer` that wants this reply: its calls or, without any, its text."""
        if not self.tool_calls:
            return self.content
        return [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]

    def as_dict(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            data["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": call.id} if call.id is not None else {}),
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        for key in ("tool_call_id", "name"):
            if (value := getattr(self, key)) is not None:
                data[key] = value
        return data


class Item(Strict):
    """An item of a file: a prompt, or the messages of a conversation up to the reply that is scored.

    Attributes:
        prompt: the user's message; of a conversation, the text of the last one; empty: whole texts, the
            choices, are compared.
        messages: a conversation; empty: there is only the prompt.
        tools: JSON Schemas of the tools that the model may call, as chat templates take them.
        target: the reply that the data have, where these are a conversation.
        answer: what is wanted; what it may be depends on the scorer: see `scorers`.
        choices: see the scorer `choice`.
        patterns: see the scorer `regex`.
        system: the system message; None: the task's. It is no part of `messages`.
        metadata: all other fields of the file, and no part of the item's id.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    target: Message | None = None
    answer: Any = None
    choices: tuple[str, ...] = ()
    patterns: tuple[ReplyPattern, ...] = ()
    system: str | None = None
    metadata: Any = None

    @property
    def messages_without_system(self) -> tuple[Message, ...]:
        """The messages, or where there is no conversation the prompt as one."""
        return self.messages or (Message(role="user", content=self.prompt),)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """All that the model is told: the system message where there is one, and the messages."""
        system = (Message(role="system", content=self.system),) if self.system else ()
        return (*system, *self.messages_without_system)

    def turns(self, which: Turns) -> tuple[Item, ...]:
        """Return an item for each turn of the model in a conversation, each with what truly went before.

        The item itself is the last one. `text` are those in which the data call no tool, `calls` the others.
        """
        if which == "last":
            return (self,)
        asked = [i for i, message in enumerate(self.messages) if i > 0 and message.role == "assistant"]
        every = (*(self._asked_at(i) for i in asked), self)
        return tuple(turn for turn in every if which in ("all", "calls" if turn.wants_calls else "text"))

    @property
    def wants_calls(self) -> bool:
        """Whether the reply in the data calls tools."""
        return self.target is not None and bool(self.target.tool_calls)

    def _asked_at(self, index: int) -> Item:
        before, target = self.messages[:index], self.messages[index]
        prompt = next((each.content for each in reversed(before) if each.role == "user"), self.prompt)
        own = {"messages": before, "target": target, "answer": target.wanted, "prompt": prompt}
        return self.model_copy(update=own)

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a plain item does not have, so that its id does not depend on it."""
        data: dict[str, Any] = serialize(self)
        for name in ("messages", "tools", "target", "metadata"):
            if not getattr(self, name):
                data.pop(name, None)
        return data


class Number(float):
    """A number that is no integer, with the text that it was written as."""

    def __init__(self, written: str) -> None:
        self.written = written

    @property
    def is_certain(self) -> bool:
        """Say whether there is one way to write it: `1.50` could be `1.5`, and `2.0` and `2e0` be `2`."""
        return repr(float(self)) == self.written and not self.is_integer()


def load_json(text: str) -> Any:
    """Read JSON; numbers that are no integers are read as `Number`.

    Raises:
        ValueError: it is no JSON, as are NaN and Infinity, or a number has more digits than Python reads.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, parse_float=Number, parse_constant=_refuse_constant)


def json_equal(first: Any, second: Any) -> bool:
    """Compare parsed JSON: key order is free, 1 equals 1.0, but `true` is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(json_equal(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(json_equal, first, second))
    return bool(first == second)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
