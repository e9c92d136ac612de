"""Formats of tool calls: read as vLLM's parsers read them, written so that they are read again."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetune.evaluation.call_formats import CallFormat, MalformedCallError, read_calls, write_calls
from mergetune.evaluation.items import ToolCall

SCHEMAS: dict[str, Any] = {
    "f": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "array"}}}
}
MALFORMED = "malformed"
ONE, TWO = {"a": 1}, {"b": "x"}


def read(reply: str, form: CallFormat) -> Any:
    """Return the arguments of each call, all of which are of `f`; or that one is malformed."""
    try:
        calls = read_calls(reply, form, SCHEMAS)
    except MalformedCallError:
        return MALFORMED
    assert {call.name for call in calls} <= {"f"}
    return [call.arguments for call in calls]


A, B = '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {"b": "x"}}'
LLAMA_A, LLAMA_B = A.replace("arguments", "parameters"), B.replace("arguments", "parameters")
XML_A = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"

# The format of a reply, the reply and its calls.
REPLIES: list[tuple[CallFormat, str, Any]] = [
    ("hermes", f"<tool_call>\n{A}\n</tool_call>", [ONE]),
    ("hermes", f"Let me see. <tool_call>{A}</tool_call>\nDone.", [ONE]),
    ("hermes", f"<tool_call>{A}</tool_call><tool_call>{B}", [ONE, TWO]),
    ("hermes", f"<tool_call>{A[:-1]}</tool_call>", MALFORMED),
    ("hermes", '<tool_call>{"name":"f"}</tool_call>', MALFORMED),
    ("hermes", "<tool_call>f(a=1)</tool_call>", MALFORMED),
    ("hermes", "No call.", []),
    ("qwen_xml", f"<tool_call>\n{XML_A}\n</tool_call>", [ONE]),
    ("qwen_xml", XML_A, [ONE]),
    ("qwen_xml", f"<tool_call>\n<function=f>\n</function>\n</tool_call>\n{XML_A}", [{}, ONE]),
    ("qwen_xml", "<function=f>\n<parameter=b>\n1\n\n 2\n</parameter>\n</function>", [{"b": "1\n\n 2"}]),
    ("qwen_xml", '<function=f>\n<parameter=c>\n[1, "x"]\n</parameter>\n</function>', [{"c": [1, "x"]}]),
    ("qwen_xml", "<function=f>\n<parameter=a>\none\n</parameter>\n</function>", [{"a": "one"}]),
    ("qwen_xml", "<function=f>\n<parameter=more>\n1\n</parameter>\n</function>", [{"more": "1"}]),
    ("llama_json", LLAMA_A, [ONE]),
    ("llama_json", f"<|python_tag|>{LLAMA_A}; {LLAMA_B}", [ONE, TWO]),
    ("llama_json", f"Sure: {A} there.", [ONE]),
    ("llama_json", LLAMA_A[:-1], MALFORMED),
    ("llama_json", "Use {braces}.", []),
    ("llama_json", "No call.", []),
    ("pythonic", '[f(a=1), f(b="x")]', [ONE, TWO]),
    ("pythonic", "[f(a=-1, c=[1, {'x': (1, 2)}])]", [{"a": -1, "c": [1, {"x": [1, 2]}]}]),
    ("pythonic", "[f(a=None, b=true)]", [{"a": None, "b": True}]),
    ("pythonic", "[f()]", [{}]),
    ("pythonic", "[f(a=1)", MALFORMED),
    ("pythonic", "[f(1)]", MALFORMED),
    ("pythonic", "[f(a=g(1))]", MALFORMED),
    ("pythonic", "[f(a=1)] Done.", MALFORMED),
    ("pythonic", "f(a=1)", []),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', [ONE]),
    ("mistral", 'Sure.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f{"b": "x"}', [ONE, TWO]),
    ("mistral", "No call.", []),
]
# More, of which vLLM has no word or another one.
MORE: list[tuple[CallFormat, str, Any]] = [
    ("qwen_xml", "<function=f>\n<parameter=a>\n1", MALFORMED),
    ("qwen_xml", "<tool_call>\n<function=f", MALFORMED),
    ("llama_json", "<|python_tag|>print(1)", MALFORMED),
    ("pythonic", '<|python_start|>[f(b="x")]<|python_end|>', [TWO]),
    ("pythonic", "[f(**{'a': 1})]", MALFORMED),
    ("pythonic", "[f(a=b'x')]", MALFORMED),
    *(("pythonic", f"[f(a={sign * 100_000}1)]", MALFORMED) for sign in ("[", "-", "1+")),
    ("pythonic", f"[f(a={'9' * 10_000})]", MALFORMED),
    ("mistral", f"[TOOL_CALLS] [{A}, {B}]", [ONE, TWO]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', [ONE]),
    ("mistral", 'f{"a": 1}f{"b": "x"}', [ONE, TWO]),  # an engine left out special tokens
    ("mistral", "[TOOL_CALLS]f", MALFORMED),
    ("mistral", '[TOOL_CALLS]f{"a": 1', MALFORMED),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]f', MALFORMED),
    ("json", A, [ONE]),
    ("json", '{"name": "f", "parameters": "{\\"a\\": 1}"}', [ONE]),
    ("json", '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [ONE]),
    ("json", f"[{A}, {B}]", [ONE, TWO]),
    ("json", f"{A}\n{B}\nDone.", [ONE, TWO]),
    ("json", f"Here:\n```json\n{B}\n```\nand\n```\n[{A}]\n```", [TWO, ONE]),
    ("json", B.replace("x", "```\\n[1]\\n```"), [{"b": "```\n[1]\n```"}]),
    ("json", A[:-1], MALFORMED),
    ("json", f'[{A}, {{"a": 1}}]', MALFORMED),
    ("json", '{"name": "f", "arguments": [1]}', MALFORMED),
    ("json", '{"name": "", "arguments": {}}', MALFORMED),
    ("json", '[{"name":' * 20_000, MALFORMED),
    ("json", '{"name": "Ada", "age": 36}', []),
    ("json", "[1, 2]", []),
    ("json", "[see below]", []),
    ("json", "{not JSON}", []),
    ("json", "```python\nf(a=1)\n```", []),
    ("json", "[" * 100_000, []),
    ("json", "", []),
]


@pytest.mark.parametrize(("form", "reply", "expected"), REPLIES + MORE)
def test_replies_are_read(form: CallFormat, reply: str, expected: Any) -> None:
    assert read(reply, form) == expected


@pytest.mark.parametrize(("form", "reply", "expected"), REPLIES + MORE)
def test_auto_tells_formats_by_their_marks(form: CallFormat, reply: str, expected: Any) -> None:
    has_no_mark = reply.startswith(("f{", "Sure: {"))  # they are calls to a server of that format alone
    assert read(reply, "auto") == ([] if has_no_mark else expected)


@pytest.mark.parametrize("form", get_args(CallFormat))
@given(
    calls=st.lists(
        st.dictionaries(
            st.sampled_from("abc"),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(st.characters(codec="utf-8")),
                lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["x", "y z"]), inner),
                max_leaves=4,
            ),
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_what_is_written_is_read_again(form: CallFormat, calls: list[dict[str, Any]]) -> None:
    if form == "qwen_xml":  # where text has no quotes, only a schema tells it from other values
        calls = [{"b": str(own.get("b"))} for own in calls]
    made = tuple(ToolCall(name="f", arguments=own) for own in calls)
    assert read_calls(write_calls(made, form), form, SCHEMAS) == made


@pytest.mark.parametrize(
    "part", ["```\n", "{", "[{", "<tool_call>", "<function=f>", '[{"name":', "[f(", " ", "[TOOL_CALLS]f{"]
)
def test_no_reply_takes_long(part: str) -> None:
    started = time.monotonic()
    for form in get_args(CallFormat):
        read(part * 5000, form)
    assert time.monotonic() - started < 5


@cache
def served(form: CallFormat) -> Any:
    """Return vLLM's parser of a format, and the request that it is given."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    marks = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    words = Tokenizer(models.WordLevel({"a": 0}, "a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)  # type: ignore[no-untyped-call]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    function = {"name": "f", "parameters": {"type": "object", **SCHEMAS["f"]}}
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "x"}],
        model="m",
        tools=[{"type": "function", "function": function}],
    )
    names = {"llama_json": "llama3_json", "qwen_xml": "qwen3_coder"}
    parser = ToolParserManager.get_tool_parser(names.get(form, form))
    return parser, tokenizer, request


@pytest.mark.parametrize(("form", "reply", "expected"), REPLIES)
def test_vllm_reads_the_same(form: CallFormat, reply: str, expected: Any) -> None:
    """Where we say malformed, it makes no call and hands the text on."""
    pytest.importorskip("vllm")
    parser, tokenizer, request = served(form)
    found = parser(tokenizer, request.tools).extract_tool_calls(reply, request)
    calls = [json.loads(call.function.arguments) for call in found.tool_calls]
    assert calls == ([] if expected == MALFORMED else expected)
    assert found.tools_called == bool(calls)
