"""Items of JSONL files: what a line holds, and its JSON."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mergetune.evaluation.patterns import ReplyPattern
from mergetune.files.yaml_io import Strict


class Item(Strict):
    """An item of a JSONL file; further keys are allowed and kept out of the prompt.

    What `answer` may be depends on the scorer: see `scorers`. `metadata` is for scorers alone.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str = Field(min_length=1)
    answer: Any = None
    choices: tuple[str, ...] = ()
    patterns: tuple[ReplyPattern, ...] = ()
    system: str | None = None
    metadata: Any = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The item's own messages: the system message where it has one, and the user's."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]

    @model_serializer(mode="wrap")
    def _without_absent_metadata(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `metadata` where there is none, so that ids do not depend on it."""
        data: dict[str, Any] = serialize(self)
        if self.metadata is None:
            del data["metadata"]
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
