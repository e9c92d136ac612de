"""Patterns of replies: regular expressions that some replies match and others do not."""

from __future__ import annotations

from typing import Annotated

import regex
from pydantic import AfterValidator

_NOTHING = {"(?!)", "$^", ".^", "$."}  # what is written for a pattern that matches nothing
_ASSERTION = regex.compile(r"(?<!\[)\^|\$|\\[AZzbBGmMK]|\(\?<?[=!]")


def _check_pattern(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    if pattern in _NOTHING:
        raise ValueError("must be a pattern that some reply matches")
    if _matches_everything(pattern):
        raise ValueError("must be a pattern that not every reply matches; `^` and `$` hold it at the ends")
    return pattern


def _matches_everything(pattern: str) -> bool:
    """Say whether a pattern is sure to be found in every text: it takes no character, wherever it is tried.

    What it asserts about the text around, such as `^`, is held against that, but for one end alone.
    """
    body = pattern.removeprefix("^")
    if body == pattern and not pattern.endswith("\\$"):
        body = pattern.removesuffix("$")
    try:
        return _ASSERTION.search(body) is None and regex.search(body, "") is not None
    except regex.error:  # what was taken off belonged to the rest
        return False


ReplyPattern = Annotated[str, AfterValidator(_check_pattern)]
