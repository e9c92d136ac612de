"""A suite of joint items: two files of items, and which scorer looks at which turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergetune.errors import MergetuneError
from mergetune.evaluation.joint_items import JointItems, Row
from mergetune.evaluation.scorers import BaseScorer, RegexScorer
from mergetune.evaluation.suite import Suite, read_suite
from mergetune.files.atomic_files import write_text
from mergetune.files.library import writable

_MAX_NEW_TOKENS = 256
# Scorers that look for something in a reply, and so may find it beside a call.
_BESIDE_CALLS = ("contains", "judge", "python", "regex")
_ENDS = ("$", r"\Z", r"\z")
_REMARK = """\
# {stem}_calls: a call is due, and none after the tool's result. {stem}_voice: the reply after the result.
"""
_REMARK_BESIDE = """\
# {stem}_voice_beside_calls: the text beside the call. Leave it out where a call is to stand alone.
"""


def write_joint_suite(
    joint: JointItems, scorer: BaseScorer, given: str | Mapping[str, Any], out: Path
) -> Suite:
    """Write joint items and a suite of them, and read it back.

    Beside the suite `joint.yaml` stand `joint_calls.jsonl` and `joint_replies.jsonl`.

    Args:
        joint: the items.
        scorer: the persona's.
        given: the same scorer as a suite says it.
        out: the suite's file; the files that the scorer names are relative to its folder.

    Raises:
        MergetuneError: the file is there, or cannot be written, or the scorer cannot be used.
    """
    if out.suffix not in (".yaml", ".yml") or out.exists():
        what = "is there already" if out.exists() else "ends otherwise"
        raise MergetuneError(f"{out}: must be a new file that ends in .yaml, but {what}. Name another.")
    folder = writable(out.parent, "--out")
    _write_rows(folder / f"{out.stem}_calls.jsonl", joint.calls)
    _write_rows(folder / f"{out.stem}_replies.jsonl", joint.replies)
    beside = _finds_beside_calls(scorer, joint.calls)
    remarks = _REMARK + (_REMARK_BESIDE if beside else "")
    data = _suite(out.stem, given, beside=beside)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
    write_text(out, remarks.format(stem=out.stem) + text)
    try:
        return read_suite(out)
    except MergetuneError:
        out.unlink()  # so that the same command can be run again
        raise


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _suite(stem: str, scorer: str | Mapping[str, Any], *, beside: bool) -> dict[str, Any]:
    calls, replies = (
        {"items": f"{stem}_{turn}.jsonl", "max_new_tokens": _MAX_NEW_TOKENS} for turn in ("calls", "replies")
    )

    def by_voice(task: dict[str, Any]) -> dict[str, Any]:
        fields = {"answer": "voice.answer", "patterns": "voice.patterns"}
        return {**task, "fields": fields, "scorer": scorer}

    tasks = {f"{stem}_calls": [{**each, "scorer": "tool_calls"} for each in (calls, replies)]}
    tasks[f"{stem}_voice"] = [by_voice(replies)]
    if beside:
        tasks[f"{stem}_voice_beside_calls"] = [by_voice(calls)]
    return {
        "description": "A persona and tools at once: the call, and the reply after its result.",
        "chat_template": True,
        "objectives": {name: {"tasks": own} for name, own in tasks.items()},
    }


def _finds_beside_calls(scorer: BaseScorer, rows: Sequence[Row]) -> bool:
    """Say whether a scorer can judge a text that a call follows; a pattern of a reply's end cannot."""
    patterns = scorer.patterns if isinstance(scorer, RegexScorer) else ()
    every = {*patterns, *(pattern for row in rows for pattern in row["voice"]["patterns"])}
    return scorer.kind in _BESIDE_CALLS and not any(pattern.endswith(_ENDS) for pattern in every)
