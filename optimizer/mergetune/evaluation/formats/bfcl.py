"""Questions of the Berkeley Function-Calling Leaderboard (BFCL), with its functions and their types."""

from __future__ import annotations

from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.formats.form import Form, Row, has, list_at, refuse
from mergetune.evaluation.formats.messages import history, read_messages
from mergetune.evaluation.formats.tools import read_tools

# As BFCL's own GORILLA_TO_OPENAPI maps them; what it does not name is text there, too.
_TYPES = {
    **dict.fromkeys(("integer", "byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool", "Boolean"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("object", "dict", "HashMap", "Hashtable"), "object"),
}


def _fields(row: Row) -> dict[str, Any]:
    turns = list_at(row.get("question"), "question")
    if len(turns) != 1:
        raise MergetuneError(
            f"`question`: must have one turn, but has {len(turns)}. BFCL scores several turns by running "
            "their calls, which is not done here. Leave such questions out."
        )
    if row.get("function") is None:
        refuse(
            "function", "must be the functions that may be called, as in BFCL's single-turn categories", None
        )
    tools = read_tools(row["function"], "function")
    for tool in tools:
        tool["function"] = _with_json_types(tool["function"])
    fields = {**history(read_messages(turns[0], "question.0"), "question.0"), "tools": tools}
    return {**fields, "answer": row["ground_truth"]} if has(row, "ground_truth") else fields


def _with_json_types(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    return function if parameters is None else {**function, "parameters": json_schema(parameters)}


def json_schema(schema: Any) -> Any:
    """Return a schema of BFCL with the types of JSON Schema; a `float` keeps its name as `format`."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    if isinstance(given := schema.get("type"), str):
        found["type"] = _TYPES.get(given, "string")
        if given == "float":
            found["format"] = "float"
    if isinstance(inner := schema.get("properties"), dict):
        found["properties"] = {name: json_schema(each) for name, each in inner.items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            found[key] = json_schema(schema[key])
    return found


def _is_question(row: Row) -> bool:
    question = row.get("question")
    return isinstance(question, list) and (has(row, "function") or has(row, "involved_classes"))


BFCL = Form(
    "BFCL questions",
    ("question", "function", "ground_truth"),
    "the messages of the one turn are asked, with the functions as tools; the answers stand in a second "
    "file, `answers: FILE`, or no call is right, `answers: none`, or any, `answers: any`",
    _is_question,
    _fields,
    is_conversation=True,
)
