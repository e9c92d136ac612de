"""YAML files that users write, read strictly: a misspelt key is an error that names its remedy."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from optimizer.errors import MergetuneError


class Strict(BaseModel):
    """Base of everything a user writes in YAML: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


def _check_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    return pattern


Regex = Annotated[str, AfterValidator(_check_regex)]

M = TypeVar("M", bound=BaseModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a key given twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, model: type[M]) -> M:
    """Read `path` as a `model`.

    Raises:
        MergetuneError: the file is missing, is not YAML, or breaks a rule of `model`; the message
            names the file, the path of each offending key and, for a misspelling, the valid key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MergetuneError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise MergetuneError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise MergetuneError(f"{path}: must hold `key: value` pairs, but holds {_shown(data)}.")
    return validate(data, model, str(path))


def validate(data: object, model: type[M], origin: str) -> M:
    """Validate plain `data` as a `model`; `origin` names the file in the error."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(detail, model) for detail in error.errors() if not _is_other_branch(detail)]
        raise MergetuneError(f"{origin}:\n  " + "\n  ".join(dict.fromkeys(lines))) from error


def to_yaml(model: BaseModel) -> str:
    """Return `model` as YAML, without the keys that are unset."""
    data = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def write_yaml(path: Path, model: BaseModel) -> None:
    """Write `model` to `path`, whole or not at all."""
    write_text(path, to_yaml(model))


def write_text(path: Path, text: str) -> None:
    """Write a text file to a temporary name and rename it: a reader never sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def nearest(word: str, valid: typing.Iterable[str]) -> str:
    """Return `" Did you mean …?"` for the nearest valid word, or the list of all of them."""
    words = sorted(valid)
    close = difflib.get_close_matches(word, words, n=1)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Valid: {', '.join(words)}." if words else ""


def refuse_unknown_keys(model: type[BaseModel], data: object, also: typing.Iterable[str]) -> object:
    """Return `data` if its keys are those of `model` or among `also`, as a validator does.

    For models whose further keys a table names.
    """
    valid = {*_keys(model), *also}
    for key in data if isinstance(data, dict) else ():
        if key not in valid:
            context = {"key": key, "valid": sorted(valid)}
            raise PydanticCustomError("unknown_key", "unknown key {key}", context)
    return data


def _explain(detail: Any, model: type[BaseModel]) -> str:
    location = [part for part in detail["loc"] if not _is_union_branch(part)]
    path = ".".join(str(part) for part in location) or "(the whole file)"
    if detail["type"] == "extra_forbidden":
        owner = _model_at(model, location[:-1])
        return f"`{path}`: unknown key.{nearest(str(location[-1]), _keys(owner))}"
    if detail["type"] == "unknown_key":
        prefix = "" if not location else f"{path}."
        key = detail["ctx"]["key"]
        return f"`{prefix}{key}`: unknown key.{nearest(str(key), detail['ctx']['valid'])}"
    if detail["type"] == "missing":
        return f"`{path}`: required key is missing."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error" and " but " in message:  # the rule's own message has the value
        return f"`{path}`: {message}."
    return f"`{path}`: {message}, but got {_shown(detail['input'])}."


def _is_other_branch(detail: Any) -> bool:
    """Say whether a mapping was only refused because a plain value would have been allowed too."""
    return isinstance(detail["input"], dict) and detail["type"] in {"float_type", "string_type"}


def _is_union_branch(part: object) -> bool:
    """Pydantic puts the name of a union's branch (`Range`, `float`, `list[str]`) in the path."""
    return isinstance(part, str) and (part in {"float", "str", "int"} or part[:1].isupper() or "[" in part)


def _model_at(model: type[BaseModel], location: list[Any]) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in location:
        if found is None:
            return None
        if not isinstance(part, str):
            continue
        fields = {info.alias or name: info for name, info in found.model_fields.items()}
        if part in fields:
            found = _nested_model(fields[part].annotation)
    return found


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (
        typing.Union,
        types.UnionType,
        list,
        tuple,
        dict,
        typing.Annotated,
    ):
        for argument in typing.get_args(annotation):
            if (found := _nested_model(argument)) is not None:
                return found
    return None


def _keys(model: type[BaseModel] | None) -> list[str]:
    if model is None:
        return []
    return [info.alias or name for name, info in model.model_fields.items()]


def _shown(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
