"""The scorer `tool_calls`: the reply calls the right tools with the right arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mergetune.evaluation import accepted_calls, call_formats, tool_schemas
from mergetune.evaluation.accepted_calls import AcceptedCall
from mergetune.evaluation.call_formats import CallFormat, MalformedCallError
from mergetune.evaluation.items import Item, Message, ToolCall
from mergetune.evaluation.scorers.scorer import BaseScorer, shown, stop_problem
from mergetune.evaluation.tool_schemas import Schema
from mergetune.files.yaml_io import nearest

_ANY = {"call": "any"}
_FORMS = (
    '`answer` must be a list of calls, such as [{"name": "weather", "arguments": {"city": "Oslo"}}] or, with '
    'the accepted values of each argument, [{"weather": {"city": ["Oslo"], "unit": ["C", ""]}}]; [] or a '
    'text, where no call is right; or {"call": "any"}'
)


class ToolCallsScorer(BaseScorer):
    """The reply makes the calls that the answer wants, and none where it wants none.

    `format` is what the server reads calls in. `part` scores the names alone, the arguments, or whether the
    calls are valid by the tools' schemas.
    """

    needs = (
        "`tools`, and `answer`: calls, with exact arguments or the accepted values of each; `[]` or a text "
        'where no call is right; `{"call": "any"}` where any is'
    )
    scores = (
        "1 if the reply makes exactly these calls, in any order; with `part: name`, `arguments` or `schema`, "
        "the share that is right"
    )
    modules = (accepted_calls, call_formats, tool_schemas)

    kind: Literal["tool_calls"] = "tool_calls"
    format: CallFormat = "auto"
    part: Literal["all", "name", "arguments", "schema"] = "all"

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [self._share_right(item, reply) for item, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:
        """See `BaseScorer.check_item`."""
        if problem := self.lacking(item, is_example=is_example):
            return problem
        if not item.tools:
            return "the scorer `tool_calls` needs tools that may be called, but the item has no `tools`."
        try:
            schemas = tool_schemas.tool_schemas(item.tools)
            if self.part == "schema":
                tool_schemas.check_schemas(schemas)
            wanted = self._wanted(item)
        except ValueError as error:
            return f"{error}."
        problem = next(filter(None, (_call_problem(call, schemas) for call in wanted or ())), None)
        if problem is None and is_example and self.wanted_reply(item) is None:
            return f"a few-shot example must show a reply, but `answer` is {shown(item.answer)}: give a text."
        return problem or self._reply_problem(item, stop)

    def answer_text(self, item: Item) -> str:
        """See `BaseScorer.answer_text`; there is none where `answer` names no reply."""
        reply = self.wanted_reply(item)
        return self.reply_text(reply) if reply else ""

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`: the calls with all that is accepted."""
        wanted = self._wanted(item)
        if wanted is None:
            return "any call"
        return "; ".join(call.shown() for call in wanted) or "no call"

    def wanted_reply(self, item: Item) -> Message | None:
        """See `BaseScorer.wanted_reply`: a text as it is, calls with the first accepted values."""
        if isinstance(item.answer, str):
            return Message(role="assistant", content=item.answer.strip())
        calls = tuple(self.wanted_calls(item))
        return Message(role="assistant", tool_calls=calls) if calls else None

    def reply_text(self, reply: Message) -> str:
        """See `BaseScorer.reply_text`."""
        return call_formats.message_text(reply, self.format)

    def wanted_calls(self, item: Item) -> list[ToolCall]:
        """Return the calls that an item wants, with the first accepted values; none where any call is right.

        Raises:
            ValueError: its answer says something else.
        """
        schemas = tool_schemas.tool_schemas(item.tools)
        return [call.first(schemas.get(call.name, {})) for call in self._wanted(item) or ()]

    def _wanted(self, item: Item) -> tuple[AcceptedCall, ...] | None:
        """Return the calls that an item wants; None: any call.

        Raises:
            ValueError: its answer says something else.
        """
        if item.answer == _ANY:
            return None
        try:
            if isinstance(item.answer, list):
                return accepted_calls.accepted_calls(item.answer)
            if isinstance(item.answer, str):
                schemas = tool_schemas.tool_schemas(item.tools)
                calls = call_formats.read_calls(item.answer, self.format, schemas)
                return tuple(map(accepted_calls.exactly, calls))
        except MalformedCallError as error:
            raise ValueError(f"`answer` begins a call that cannot be read ({error!s:.80})") from error
        except ValueError as error:
            raise ValueError(f"{_FORMS}, but {error!s:.200}") from error
        raise ValueError(f"{_FORMS}, but is {shown(item.answer)}")

    def _reply_problem(self, item: Item, stop: Sequence[str]) -> str | None:
        """Say why no reply can make the wanted calls: no format can write them, or they are cut off."""
        calls = self.wanted_calls(item)
        if not calls:
            return None
        forms: Iterable[CallFormat] = call_formats.FORMATS if self.format == "auto" else [self.format]
        written = [call_formats.write_calls(calls, form) for form in forms]
        replies = [item.answer] if isinstance(item.answer, str) else written
        if any(self._share_right(item, _cut_off(reply, stop), "all") == 1 for reply in replies):
            return None
        return stop_problem(replies, stop) or (
            f"no reply in the format `{self.format}` can make the calls of `answer`: {shown(item.answer)}."
        )

    def _share_right(self, item: Item, reply: str, part: str | None = None) -> float:
        schemas = tool_schemas.tool_schemas(item.tools)
        wanted = self._wanted(item)
        try:
            calls = call_formats.read_calls(reply, self.format, schemas)
        except MalformedCallError:
            return 0.0
        if not calls or wanted == ():
            return float(not calls and wanted == ())
        part = part or self.part
        if part == "schema":
            return sum(tool_schemas.is_valid(call, schemas) for call in calls) / len(calls)
        if wanted is None:
            return float(all(call.name in schemas for call in calls))
        share = _paired_share(wanted, calls, schemas, by_name=part == "name")
        return float(share == 1) if part == "all" else share


def _paired_share(
    wanted: Sequence[AcceptedCall], calls: Sequence[ToolCall], schemas: Mapping[str, Schema], by_name: bool
) -> float:
    """Return how far calls are the wanted ones, paired as suits them best; each call without a pair counts 0.

    It is F1 over calls (2 × right / (wanted + made)), where a call is right by its name, or as far as its
    arguments are.
    """
    from scipy.optimize import linear_sum_assignment

    shares = [
        [
            float(call.name == each.name) if by_name else each.share_right(call, schemas[each.name])
            for call in calls
        ]
        for each in wanted
    ]
    rows, columns = linear_sum_assignment(shares, maximize=True)
    right = sum(shares[row][column] for row, column in zip(rows, columns, strict=True))
    return 2 * right / (len(wanted) + len(calls))


def _call_problem(call: AcceptedCall, schemas: Mapping[str, Schema]) -> str | None:
    """Say why no reply can make a wanted call; None where one can."""
    if call.name not in schemas:
        return f"`answer` calls `{call.name}`, which is not among `tools`.{nearest(call.name, schemas)}"
    schema = schemas[call.name]
    known = schema.get("properties", {})
    for name in sorted(call.needed(schema)):
        if name not in known:
            return f"`answer` gives `{call.name}` an argument `{name}` that it lacks.{nearest(name, known)}"
        if not call.arguments.get(name):
            return f"`answer` accepts no value for the argument `{name}` that `{call.name}` requires."
    for name, value in call.first(schema).arguments.items():
        if not call.takes(name, value, schema):
            return (
                f"`answer` gives the argument `{name}` of `{call.name}` the value {shown(value)}, which its "
                f"schema does not take: {shown(known[name])}."
            )
    return None


def _cut_off(reply: str, stop: Sequence[str]) -> str:
    for end in stop:
        reply = reply.partition(end)[0]
    return reply
