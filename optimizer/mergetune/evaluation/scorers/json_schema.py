"""The scorer `json_schema`: the reply is JSON that is valid by a JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import PrivateAttr

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers import json_answer
from mergetune.evaluation.scorers.json_answer import NOT_JSON, parse_json
from mergetune.evaluation.scorers.scorer import BaseScorer, shown, text_of
from mergetune.files.library import placed
from mergetune.files.yaml_io import read_text


class JsonSchemaScorer(BaseScorer):
    """The reply is JSON that is valid by the JSON Schema in `schema_file`, relative to the suite's folder.

    An item's `answer`, where it has one, is a valid reply, as examples and slopes need it.
    """

    needs = "nothing; `answer`, a valid reply, as an example"
    scores = (
        "1 if the reply is JSON that is valid by the JSON Schema in `schema_file`; a Markdown code fence "
        "around the reply does not count"
    )
    modules = (json_answer,)

    kind: Literal["json_schema"] = "json_schema"
    schema_file: str

    _file: Path = PrivateAttr(default=Path())
    _validator: Any = PrivateAttr(default=None)  # of `jsonschema`, by the draft that the schema names

    @property
    def files(self) -> tuple[Path, ...]:
        """See `BaseScorer.files`."""
        return (self._file,)

    def with_files(self, folder: Path, items: Sequence[Item]) -> Self:  # noqa: ARG002
        """See `BaseScorer.with_files`; the schema must be valid itself."""
        file = placed(folder, self.schema_file)
        try:
            schema = json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise MergetuneError(f"{file}: must be a JSON Schema, but is not JSON: {error}.") from error
        found = self.model_copy()
        found._file, found._validator = file, _validator(schema, file)
        return found

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [float(self._is_valid(reply)) for _, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        if item.answer is None:
            return self.lacking(item, is_example=is_example) if item.patterns or is_example else None
        if self._is_valid(text_of(item.answer)):
            return None
        return (
            f"`answer`, where it is there, must be a reply that is valid by {self._file}, but is "
            f"{shown(item.answer)}."
        )

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`."""
        return self.answer_text(item) or f"JSON that is valid by {self.schema_file}"

    def _is_valid(self, reply: str) -> bool:
        from referencing.exceptions import Unresolvable

        value = parse_json(reply)
        try:
            return value is not NOT_JSON and self._validator.is_valid(value)
        except RecursionError:  # of a reply nested so deep
            return False
        except Unresolvable as error:
            raise MergetuneError(
                f"{self._file}: every `$ref` must lead to a place in this file, but one does not: {error}."
            ) from error


def _validator(schema: Any, file: Path) -> Any:
    """Return what validates by a schema, of the draft that it names; it fetches nothing.

    Raises:
        MergetuneError: it is no schema, or one that every value is valid by.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, dict) or not schema:
        raise MergetuneError(f"{file}: must be a JSON Schema, an object with a rule, but is {shown(schema)}.")
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise MergetuneError(
            f"{file}: must be a JSON Schema, but is none at {error.json_path}: {error.message}."
        ) from error
    return kind(schema, registry=Registry())
