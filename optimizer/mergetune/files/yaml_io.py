"""YAML files that users write, read strictly: a misspelt key is an error that names its remedy."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mergetune.errors import MergetuneError
from mergetune.files.atomic_files import write_text


class Strict(BaseModel):
    """Base of everything a user writes in YAML: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, data: object) -> object:
        """Leave out a mapping or a list that is empty, as `guards:` with nothing after it."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or not _has_parts(cls, key)}


def _has_parts(model: type[BaseModel], key: str) -> bool:
    """Say whether a key may be left out and holds a mapping or a list."""
    field = model.model_fields.get(key)
    default = field.get_default(call_default_factory=True) if field else None
    return isinstance(default, (dict, tuple, BaseModel))


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    return pattern


def _as_mapping(given: object) -> object:
    return {"kind": given} if isinstance(given, str) else given


Regex = Annotated[str, AfterValidator(_check_regex)]
KindAlone = BeforeValidator(_as_mapping)  # `engine: vllm` is `engine: {kind: vllm}`

M = TypeVar("M", bound=BaseModel)

# What a file is, the keys that tell so, and what is to be done with it.
_FILES = (
    ("a study file", {"base", "experts", "search_space", "suite"}, "`mergetune run` takes it"),
    ("a recipe", {"method", "base", "experts", "groups"}, "`mergetune merge` writes its model"),
    ("a suite", {"description", "chat_template", "objectives"}, "`--suite` and a study's `suite` take it"),
    ("a search space", {"description", "method"}, "a study's `search_space` takes it"),
    ("a stack of layers", {"stack"}, "it can stand where a model is named"),
    (
        "a configuration of mergekit (`merge_method`)",
        {"merge_method"},
        "`mergetune import` makes a recipe of it",
    ),
    (
        "a configuration of mergekit-evolve (`genome`)",
        {"genome", "tasks"},
        "`mergetune import` makes a study of it",
    ),
)


_KEY_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}
# What YAML 1.1 reads a word as that stands without quotes.
_READ_AS = {
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:timestamp": "a date",
}


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that takes text alone for keys, and none twice.

    A merge key (`<<`) gives what its mapping does not say itself; of several mappings the first counts.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if problem := _wrong_key(key, seen):
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return node


def _wrong_key(key: yaml.Node, seen: Collection[str]) -> str | None:
    """Say what is wrong with a key of a mapping that has these keys before it."""
    if not isinstance(key, yaml.ScalarNode):
        return "a key must be plain text"
    if key.tag not in _KEY_TAGS:
        return (
            f"a key must be text, but YAML reads `{key.value}` as {_READ_AS.get(key.tag, 'something else')}: "
            f'put it in quotes, "{key.value}"'
        )
    return f"the key `{key.value}` is given twice" if key.value in seen else None


def read_yaml(path: Path, model: type[M]) -> M:
    """Read `path` as a `model`.

    Anchors, aliases and merge keys are YAML's own; a key at the top that begins with `x-` is left out, so
    that something to refer to can stand there.

    Raises:
        MergetuneError: the file is missing, is not YAML, is of another kind, or breaks a rule of `model`;
            the message names the file, the path of each offending key and, for a misspelling, the valid key.
    """
    data = parse_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise MergetuneError(f"{path}: must hold `key: value` pairs, {_received(data)}.")
    data = {key: value for key, value in data.items() if not key.startswith("x-")}
    _check_kind(data, model, path)
    return validate(data, model, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Return what YAML says; raises `MergetuneError`, which names its `origin`, where it is none."""
    with _explained(origin):
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


@dataclass(frozen=True)
class Document:
    """A document of YAML that knows where its keys and entries stand."""

    data: Any
    _node: yaml.Node

    def line(self, place: Iterable[str | int]) -> int:
        """Return the line, from 1, of the key or entry at a place, as far as the place is there."""
        node, mark = self._node, self._node.start_mark
        for part in place:
            children: Iterable[tuple[str | int, yaml.Node, yaml.Node]] = ()
            if isinstance(node, yaml.MappingNode):
                children = ((key.value, key, value) for key, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                children = ((i, value, value) for i, value in enumerate(node.value))
            found = next(((key, value) for name, key, value in children if name == part), None)
            if found is None:
                break
            mark, node = found[0].start_mark, found[1]
        return int(mark.line) + 1


def parse_documents(text: str, origin: str) -> list[Document]:
    """Return every document of a YAML stream that is not empty; raises as `parse_yaml` does."""
    documents = []
    with _explained(origin):
        loader = _Loader(text)
        while loader.check_node():
            node: Any = loader.get_node()
            documents.append(Document(loader.construct_document(node), node))
    return [document for document in documents if document.data is not None]


@contextmanager
def _explained(origin: str) -> Iterator[None]:
    """Make whatever reading YAML raises an error of the user's."""
    try:
        yield
    except yaml.YAMLError as error:
        raise MergetuneError(f"{origin}: is not valid YAML: {_yaml_problem(error)}") from error
    except RecursionError as error:
        raise MergetuneError(f"{origin}: is not valid YAML: it is nested too deep.") from error
    except Exception as error:  # whatever is raised at a value that is none of its kind, as 2024-99-99
        raise MergetuneError(f"{origin}: is not valid YAML: a value is wrong: {error}.") from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return what is wrong, where, and what helps."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{error}."
    place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    while_at = f"{error.context}: " if error.context else ""
    remedy = " Indent with spaces: YAML takes no tabs there." if "'\\t'" in str(error.problem) else ""
    return f"{place}: {while_at}{error.problem}.{remedy}"


def validate(data: object, model: type[M], origin: str) -> M:
    """Validate plain `data` as a `model`; `origin` names the file in the error."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = _explain(error, data, model)
        between = " " if len(lines) == 1 else "\n  "
        raise MergetuneError(f"{origin}:{between}{between.join(lines)}") from error


def to_yaml(model: BaseModel) -> str:
    """Return `model` as YAML, without the keys that are unset."""
    data = model.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def write_yaml(path: Path, model: BaseModel) -> None:
    """Write `model` to `path`, whole or not at all."""
    write_text(path, to_yaml(model))


# How files begin that are no text in UTF-8, what such a file is, and what is to be done with it.
_NO_TEXT = (
    (b"\x1f\x8b", "is compressed by gzip", "Unpack it: gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", "Unpack it: unzstd"),
    (b"PK\x03\x04", "is an archive (zip, xlsx)", "Unpack it, or export it as text"),
    (b"PAR1", "is a Parquet file", "Export it as text"),
    (b"\xff\xfe", "is text in UTF-16", "Save it in UTF-8, such as with: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is text in UTF-16", "Save it in UTF-8, such as with: iconv -f UTF-16 -t UTF-8"),
)


def read_text(path: Path) -> str:
    """Read a text file that a user wrote, in UTF-8; a byte-order mark at its beginning is left out.

    Raises:
        MergetuneError: the file cannot be read, or is no such text; the message says what it is.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MergetuneError(f"{path}: cannot be read: {error.strerror}.") from error
    for begin, what, remedy in _NO_TEXT:
        if content.startswith(begin):
            raise MergetuneError(f"{path}: must be text in UTF-8, but {what}. {remedy}.")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise MergetuneError(
            f"{path}: must be text in UTF-8, but is not ({error}). Save it in UTF-8."
        ) from error


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean …?"` for the nearest valid word, or the list of all of them."""
    words = sorted(valid)
    return _meant(word, words) or (f" Valid: {', '.join(words)}." if words else "")


def _meant(word: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean …?"` for the nearest valid word; empty where none is near."""
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def refuse_unknown(keys: Iterable[object], valid: Iterable[str]) -> None:
    """Raise, as a validator does, for the first key that is none of the `valid` ones, which a table names."""
    words = sorted(valid)
    for key in keys:
        if key not in words:
            raise PydanticCustomError("unknown_key", "unknown key {key}", {"key": key, "valid": words})


def _check_kind(data: dict[Any, Any], model: type[BaseModel], path: Path) -> None:
    """Refuse a file that has all keys of another kind, and not those that a `model` must have."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    if data.keys() >= set(required) or model.model_config.get("extra") == "ignore":
        return
    for what, keys, remedy in _FILES:
        if data.keys() >= keys:
            raise MergetuneError(
                f"{path}: is {what}; {remedy}. Needed here is a file with `{'`, `'.join(required)}`."
            )


_Place = tuple[Any, ...]  # keys and indices from the top of a file


def _explain(error: ValidationError, data: object, model: type[BaseModel]) -> list[str]:
    """Return a line for each place with a mistake; one inside a value says more than what it breaks."""
    places: dict[_Place, list[Any]] = {}
    for detail in map(_of_a_field, error.errors()):
        places.setdefault(_place(detail, data), []).append(detail)
    outer = {place[:length] for place in places for length in range(len(place))}
    return [_sentence(place, details, model) for place, details in places.items() if place not in outer]


def _of_a_field(detail: Any) -> Any:
    """Return a mistake in the `kind` that a union is told by as one in a field that takes these kinds."""
    loc = (*detail["loc"], "kind")
    match detail["type"]:
        case "union_tag_not_found":
            return {**detail, "type": "missing", "loc": loc}
        case "union_tag_invalid":
            *most, last = detail["ctx"]["expected_tags"].split(", ")
            rule = f"must be {', '.join(most)} or {last}"
            return {"type": "literal_error", "loc": loc, "msg": rule, "input": detail["input"]["kind"]}
        case "model_attributes_type":
            return {**detail, "type": "model_type"}
    return detail


def _place(detail: Any, data: Any) -> _Place:
    """Return where a mistake is: pydantic's path without what no file has, such as a union's branch."""
    found: list[Any] = []
    for part in detail["loc"]:
        is_key = isinstance(data, dict) and part in data
        if is_key or (isinstance(data, list) and part in range(len(data))):
            found.append(part)
            data = data[part]
    if detail["type"] == "missing":
        found.append(detail["loc"][-1])
    if detail["type"] == "unknown_key":
        found.append(detail["ctx"]["key"])
    return tuple(found)


def _sentence(place: _Place, details: list[Any], model: type[BaseModel]) -> str:
    """Say what is wrong at a place; several details are those of a union's branches, none of which fits."""
    detail, path = details[0], ".".join(map(str, place))
    if detail["type"] == "missing":
        return f"`{path}`: is required, but missing."
    if detail["type"] in ("extra_forbidden", "unknown_key"):
        valid = detail.get("ctx", {}).get("valid") or _keys(_model_at(model, place[:-1]))
        return f"`{path}`: unknown key.{nearest(str(place[-1]), valid)}"
    types = [_type_wanted(each, _model_at(model, place)) for each in details]
    if None in types:  # a branch of the right type
        detail = details[types.index(None)]
        rule = _rule(detail, place)
    else:
        rule = f"must be {' or '.join(dict.fromkeys(map(str, types)))}"
    is_said = " but " in rule or (detail["type"] == "value_error" and isinstance(detail["input"], dict))
    received = "" if is_said else f", {_received(detail['input'])}"
    is_unquoted = types[0] == "text" and isinstance(detail["input"], (bool, int, float, date))
    remedy = " Put it in quotes." if is_unquoted else ""
    if detail["type"] == "literal_error" and isinstance(detail["input"], str):
        remedy = _meant(detail["input"], re.findall(r"'([^']+)'", detail["msg"]))
    return f"{f'`{path}`: ' if path else ''}{rule}{received}.{remedy}"


_TYPES = {
    **{"dict": "`name: value` pairs", "tuple": "a list", "list": "a list", "string": "text"},
    **{"int": "a whole number", "float": "a number", "bool": "true or false"},
}


def _type_wanted(detail: Any, model: type[BaseModel] | None) -> str | None:
    """Return what a value should have been, None where its type is right and another rule is broken."""
    match = re.fullmatch(r"(\w+?)_(type|parsing|from_float)", detail["type"])
    if match and match[1] == "model":
        return f"`key: value` pairs ({', '.join(_keys(model))})"
    return _TYPES.get(match[1]) if match else None


def _rule(detail: Any, place: _Place) -> str:
    if detail["type"] == "too_short":
        return f"must name at least one {str(place[-1]).removesuffix('s')}"
    return re.sub(r"^\w+ should ", "must ", str(detail["msg"]).removeprefix("Value error, "))


def _received(value: object, limit: int = 80) -> str:
    if value is None or value in ("", [], {}):
        return "but is empty"
    text = repr(value)
    return f"but got {text if len(text) <= limit else text[: limit - 1] + '…'}"


def _model_at(annotation: Any, place: _Place) -> type[BaseModel] | None:
    """Return the model that a place inside an annotation holds, if any."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not place:
            return annotation
        if place[0] in annotation.model_fields:
            return _model_at(annotation.model_fields[place[0]].annotation, place[1:])
        return _model_at(typing.get_type_hints(annotation).get("__pydantic_extra__"), place)
    if typing.get_origin(annotation) in (dict, list, tuple):
        values = arguments[-1] if typing.get_origin(annotation) is dict else arguments[0]
        return _model_at(values, place[1:]) if place else None
    return next((found for each in arguments if (found := _model_at(each, place))), None)  # a union


def _keys(model: type[BaseModel] | None) -> list[str]:
    return list(model.model_fields) if model else []
