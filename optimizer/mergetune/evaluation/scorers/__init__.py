"""Scorers of JSONL items, one a file: adding one is its file and its place in the union here."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import BeforeValidator, Field

from mergetune.evaluation.scorers.choice import ChoiceScorer
from mergetune.evaluation.scorers.code import CodeScorer
from mergetune.evaluation.scorers.contains import ContainsScorer
from mergetune.evaluation.scorers.exact import ExactScorer
from mergetune.evaluation.scorers.json_answer import JsonScorer
from mergetune.evaluation.scorers.json_schema import JsonSchemaScorer
from mergetune.evaluation.scorers.judge import JudgeScorer
from mergetune.evaluation.scorers.latency import LatencyScorer
from mergetune.evaluation.scorers.numeric import NumericScorer
from mergetune.evaluation.scorers.python_function import PythonScorer
from mergetune.evaluation.scorers.refusal import RefusalScorer
from mergetune.evaluation.scorers.regex import RegexScorer
from mergetune.evaluation.scorers.reply_tokens import ReplyTokensScorer
from mergetune.evaluation.scorers.scorer import BaseScorer
from mergetune.evaluation.scorers.similarity import SimilarityScorer
from mergetune.evaluation.scorers.tool_calls import ToolCallsScorer
from mergetune.files.yaml_io import refuse_unknown

__all__ = [
    "SCORERS",
    "BaseScorer",
    "ChoiceScorer",
    "CodeScorer",
    "ContainsScorer",
    "ExactScorer",
    "JsonSchemaScorer",
    "JsonScorer",
    "JudgeScorer",
    "LatencyScorer",
    "NumericScorer",
    "PythonScorer",
    "RefusalScorer",
    "RegexScorer",
    "ReplyTokensScorer",
    "Scorer",
    "SimilarityScorer",
    "ToolCallsScorer",
    "scorer_rows",
]


def _own_options(given: object) -> object:
    """Refuse options that belong to other scorers, or to none; those of others may be there and off."""
    kind = given.get("kind") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in SCORERS:
        return given  # pydantic says what is wrong
    own = SCORERS[kind].model_fields
    for name in given.keys() - own.keys():
        owners = [f"`{each}`" for each, scorer in SCORERS.items() if name in scorer.model_fields]
        if owners and given[name]:
            *most, last = owners
            whose = f"{', '.join(most)} and {last}" if most else f"the scorer {last}"
            raise ValueError(f"`{name}` belongs to {whose}, not to `{kind}`")
        refuse_unknown([] if owners else [name], own)
    return {name: value for name, value in given.items() if name in own}


Scorer = Annotated[
    ExactScorer
    | ContainsScorer
    | RegexScorer
    | JsonScorer
    | ChoiceScorer
    | ReplyTokensScorer
    | LatencyScorer
    | NumericScorer
    | JsonSchemaScorer
    | SimilarityScorer
    | RefusalScorer
    | PythonScorer
    | CodeScorer
    | ToolCallsScorer
    | JudgeScorer,
    Field(discriminator="kind"),
    BeforeValidator(_own_options),
]
SCORERS: dict[str, type[BaseScorer]] = {
    scorer.model_fields["kind"].default: scorer for scorer in get_args(get_args(Scorer)[0])
}


def scorer_rows() -> list[tuple[str, str, str]]:
    """Return a row per scorer for the docs: its kind, what an item needs, and what it scores."""
    return [(kind, scorer.needs, scorer.scores) for kind, scorer in SCORERS.items()]
