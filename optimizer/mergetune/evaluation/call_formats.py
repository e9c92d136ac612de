"""Tool calls in a model's reply, read as servers read them and written in the same formats.

The formats are those of vLLM's tool parsers `hermes`, `qwen3_coder`, `llama3_json`, `pythonic` and `mistral`,
and bare JSON. Text beside calls does not count, but for `pythonic`, where it makes them malformed as in vLLM.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergetune.engines.call_text import call_json, hermes_call
from mergetune.evaluation.items import Message, ToolCall
from mergetune.evaluation.tool_schemas import Schema

CallFormat = Literal["auto", "mistral", "qwen_xml", "hermes", "llama_json", "pythonic", "json"]
Schemas = Mapping[str, Schema]  # of the parameters of each tool, by its name

_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_JSON = json.JSONDecoder()
_NEXT_VALUE = re.compile(r"\s*(?:[;,]\s*)?(?=\{|\[\s*\{)")
_JSON_OPENING = re.compile(r"(?:\A|```\w*)\s*(?=[{\[])")
_NAME_KEY = re.compile(r'"name"\s*:')
_HERMES_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_XML_CALL = re.compile(r"<function=([^>]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^>]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MISTRAL_NAME = re.compile(r"\s*(?:\[TOOL_CALLS\]\s*)?([\w.-]+)\s*(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_PYTHONIC = re.compile(r"\A\s*(?:<\|python_start\|>\s*)?(?=\[\s*[^\W\d][\w.]*\()")


class MalformedCallError(ValueError):
    """A reply begins a tool call that cannot be read."""


def read_calls(reply: str, form: CallFormat = "auto", schemas: Schemas | None = None) -> tuple[ToolCall, ...]:
    """Return the tool calls in a reply; none where it begins no call.

    `auto` takes the first format of `CallFormat` whose mark the reply has: `[TOOL_CALLS]`, `<function=`,
    `<tool_call>`, `<|python_tag|>`, a beginning such as `[name(`, and JSON at the beginning or in a code
    fence. JSON is a call where it has `name`, and `arguments` or `parameters`.

    Args:
        reply: what the model said.
        form: the format that the server reads; others are text to it.
        schemas: the parameters of the tools, by which `qwen_xml` tells text from other values.

    Raises:
        MalformedCallError: it begins a call that cannot be read.
    """
    own = FORMATS.values() if form == "auto" else [FORMATS[form]]
    found = next((each for each in own if form != "auto" or each.begins.search(reply)), None)
    if found is None:
        return ()
    try:
        return tuple(found.read(reply, schemas or {}))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise MalformedCallError(str(error)) from error


def write_calls(calls: Sequence[ToolCall], form: CallFormat = "auto") -> str:
    """Return a reply that makes these calls; `auto` writes `hermes`."""
    return FORMATS["hermes" if form == "auto" else form].write(calls)


def message_text(message: Message, form: CallFormat = "auto") -> str:
    """Return what a message says as one text: its content, then its calls as `write_calls` writes them."""
    calls = write_calls(message.tool_calls, form) if message.tool_calls else ""
    return "\n".join(filter(None, [message.content, calls]))


def call_of(data: Any) -> ToolCall:
    """Return the call that an object states, be its arguments JSON text or nested in `function` (OpenAI).

    Raises:
        ValueError: it states none.
    """
    own = data.get("function", data) if isinstance(data, dict) else None
    name, arguments = (own.get("name"), _arguments(own)) if isinstance(own, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError(f"no call with `name` and `arguments` is {_text(data):.80}")
    return ToolCall(name=name, arguments=arguments)


def _arguments(call: Mapping[str, Any]) -> Any:
    given = call.get("arguments", call.get("parameters"))
    return json.loads(given) if isinstance(given, str) else given


def is_call(data: Any) -> bool:
    """Say whether a JSON value states a call rather than anything else."""
    own = data.get("function", data) if isinstance(data, dict) else None
    return isinstance(own, dict) and "name" in own and ("arguments" in own or "parameters" in own)


def _calls_at(text: str, start: int) -> tuple[list[ToolCall], int]:
    """Return the calls that JSON at this place states, one value after another, and where it ends."""
    values: list[Any] = []
    end = start
    try:
        while following := _NEXT_VALUE.match(text, end):
            value, end = _JSON.raw_decode(text, following.end())
            values += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        if any(map(is_call, values)) or _NAME_KEY.search(text, end):
            raise
        return [], end
    return [call_of(value) for value in values] if any(map(is_call, values)) else [], end


def _read_json(reply: str, _schemas: Schemas) -> Iterator[ToolCall]:
    end = 0
    while opening := _JSON_OPENING.search(reply, end):
        calls, end = _calls_at(reply, opening.end())
        end = max(end, opening.end() + 1)  # where the JSON is of no use
        yield from calls


def _read_llama(reply: str, _schemas: Schemas) -> Iterable[ToolCall]:
    _, tag, after = reply.partition("<|python_tag|>")
    text = after if tag else reply[max(reply.find("{"), 0) :]
    calls, _ = _calls_at(text, 0)
    if tag and not calls:
        raise ValueError("no JSON call follows <|python_tag|>")
    return calls


def _read_hermes(reply: str, _schemas: Schemas) -> Iterator[ToolCall]:
    for text in _HERMES_CALL.findall(reply):
        yield call_of(json.loads(text))


def _read_xml(reply: str, schemas: Schemas) -> Iterator[ToolCall]:
    calls = _XML_CALL.findall(reply)
    if not calls and "<function=" in reply:
        raise ValueError("the name of a function does not end")
    for name, body in calls:
        if rest := _XML_ARGUMENT.sub("", body).strip():
            raise ValueError(f"a parameter does not end, or is none: {rest:.80}")
        declared = schemas.get(name.strip(), {}).get("properties", {})
        arguments = {key: _xml_value(text, declared.get(key)) for key, text in _XML_ARGUMENT.findall(body)}
        yield ToolCall(name=name.strip(), arguments=arguments)


def _xml_value(text: str, schema: Schema | None) -> Any:
    """Return what a parameter's text means: itself where its schema takes text or is absent, else JSON."""
    kinds = schema.get("type") if schema is not None else "string"
    if not {"string", "any"}.isdisjoint([kinds] if isinstance(kinds, str) else kinds or ()):
        return text
    try:
        return _NAMES[text.strip()] if text.strip() in _NAMES else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _read_pythonic(reply: str, _schemas: Schemas) -> Iterator[ToolCall]:
    beginning = _PYTHONIC.match(reply)
    if beginning is None:
        return
    text = reply[beginning.end() :].strip().removesuffix("<|python_end|>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, about backslashes in the reply's strings
        calls = ast.parse(text, mode="eval").body
    if not isinstance(calls, ast.List):
        raise ValueError("more than a list of calls is there")
    yield from map(_python_call, calls.elts)


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or any(each.arg is None for each in node.keywords):
        raise ValueError("each must be a call whose arguments have names")
    arguments = {str(each.arg): _python_value(each.value) for each in node.keywords}
    return ToolCall(name=ast.unparse(node.func), arguments=arguments)


class _JsonNames(ast.NodeTransformer):
    """Takes JSON's true, false and null for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(_NAMES[node.id]), node) if node.id in _NAMES else node


def _python_value(node: ast.expr) -> Any:
    """Return the JSON value of a literal; nothing is evaluated, and a tuple is a list."""
    return json.loads(json.dumps(ast.literal_eval(_JsonNames().visit(node))))


def _read_mistral(reply: str, _schemas: Schemas) -> Iterable[ToolCall]:
    _, mark, after = reply.partition("[TOOL_CALLS]")
    text = (after if mark else reply).strip()  # engines that leave out special tokens show no mark
    calls, end = _calls_at(text, 0)
    while named := _MISTRAL_NAME.match(text, end):
        arguments, end = _JSON.raw_decode(text, named.end())
        calls.append(ToolCall(name=named[1], arguments=arguments))
    if mark and (not calls or "[TOOL_CALLS]" in text[end:]):
        raise ValueError("no call follows [TOOL_CALLS]")
    return calls


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_json(calls: Sequence[ToolCall]) -> str:
    objects = ", ".join(call_json(call.name, call.arguments) for call in calls)
    return objects if len(calls) == 1 else f"[{objects}]"


def _write_pythonic(calls: Sequence[ToolCall]) -> str:
    arguments = [", ".join(f"{key}={value!r}" for key, value in call.arguments.items()) for call in calls]
    return f"[{', '.join(f'{call.name}({own})' for call, own in zip(calls, arguments, strict=True))}]"


def _write_xml(calls: Sequence[ToolCall]) -> str:
    texts = []
    for call in calls:
        values = {key: own if isinstance(own, str) else _text(own) for key, own in call.arguments.items()}
        body = "".join(f"<parameter={key}>\n{own}\n</parameter>\n" for key, own in values.items())
        texts.append(f"<tool_call>\n<function={call.name}>\n{body}</function>\n</tool_call>")
    return "\n".join(texts)


@dataclass(frozen=True)
class _Format:
    """A format of calls: what a reply in it has, and how it is read and written."""

    begins: re.Pattern[str]
    read: Callable[[str, Schemas], Iterable[ToolCall]]
    write: Callable[[Sequence[ToolCall]], str]


# In the order in which `auto` looks for them.
FORMATS: dict[CallFormat, _Format] = {
    "mistral": _Format(
        re.compile(r"\[TOOL_CALLS\]"),
        _read_mistral,
        lambda calls: "".join(f"[TOOL_CALLS]{call.name}{_text(call.arguments)}" for call in calls),
    ),
    "qwen_xml": _Format(re.compile(r"<function="), _read_xml, _write_xml),
    "hermes": _Format(
        re.compile(r"<tool_call>"),
        _read_hermes,
        lambda calls: "\n".join(hermes_call(call.name, call.arguments) for call in calls),
    ),
    "llama_json": _Format(
        re.compile(r"<\|python_tag\|>"),
        _read_llama,
        lambda calls: "; ".join(call_json(call.name, call.arguments, "parameters") for call in calls),
    ),
    "pythonic": _Format(_PYTHONIC, _read_pythonic, _write_pythonic),
    "json": _Format(_JSON_OPENING, _read_json, _write_json),
}
