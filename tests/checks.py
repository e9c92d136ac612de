"""Checks that never ran: of models that say whatever may break a page, and of releases one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mergetune.evaluation.suite import GuardConfig, ObjectiveConfig, SuiteConfig, TaskConfig
from mergetune.files.atomic_files import write_parquet
from mergetune.gate.judge import Check, judge
from mergetune.gate.outputs import write_outputs

LONG = "x" * 100_000
HOSTILE = (
    "<script>alert('owned')</script>",
    "]]></failure></testcase>",
    "| a | b |\n|---|---|\n# head",
    "```\n</pre></details>\n~~~ `code` ``",
    "\x00\x1b[31mred\x1b]0;title\x07\r\x9b2J\ufffe",
    "<img src=http://evil.example/x onerror=alert(1)> @everyone [a](javascript:alert(1))",
    "{{ 7 * 7 }} [bold red]rich[/bold red]",
    LONG,
)


def frame(scores: dict[tuple[str, str], Any], responses: tuple[str, ...]) -> pd.DataFrame:
    rows = [
        (name, task, f"{task}-{i}", float(value), responses[i % len(responses)])
        for (name, task), values in scores.items()
        for i, value in enumerate(values)
    ]
    found = pd.DataFrame(rows, columns=["score_name", "task", "item", "score", "response"])
    return found.assign(reason=found["response"])


def hostile_check(**options: Any) -> Check:
    """A task collapses, a guard is undecided, an objective improves; every text is hostile."""
    rng = np.random.default_rng(0)
    tasks = (TaskConfig(lm_eval="any"),)
    suite = SuiteConfig(
        description="any",
        chat_template=True,
        objectives={
            "tools": ObjectiveConfig(tasks=tasks, margin=0.1),
            "persona": ObjectiveConfig(tasks=tasks, direction="minimize"),
        },
        guards={"a|b<i>": GuardConfig(tasks=tasks, margin=0.02)},
    )
    base = {
        ("tools", "tools"): rng.random(200) < 0.8,
        ("tools", "tools:calls|`x`.jsonl"): rng.random(200) < 0.9,
        ("persona", "p\x1b[31m"): rng.random(80),
        ("a|b<i>", "arc"): rng.random(40) < 0.7,
    }
    own = dict(base)
    own["tools", "tools:calls|`x`.jsonl"] = rng.random(200) < 0.4
    own["persona", "p\x1b[31m"] = rng.random(80) * 0.4
    own["a|b<i>", "arc"] = rng.random(40) < 0.7
    first, second = frame(own, HOSTILE), frame(base, HOSTILE[::-1])
    items = second.assign(split="search", prompt="Say " + HOSTILE[4], target=HOSTILE[0])
    labels = ("new <b>|`model`", "../old\x00")
    return judge(first, second, items, suite, suite_name="evals & co", labels=labels, **options)


SUITE = SuiteConfig(
    description="any",
    chat_template=True,
    objectives={"tone": ObjectiveConfig(tasks=(TaskConfig(lm_eval="any"),))},
)
N_ITEMS = 50


def measured(n_right: int, rules: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "score_name": "tone",
            "task": "t",
            "item": [str(i) for i in range(N_ITEMS)],
            "score": (np.arange(N_ITEMS) < n_right).astype(float),
            "response": "so",
            "rules": rules,
        }
    )


def write_check(folder: Path, n_right: int, rules: str = "now") -> None:
    """Write what `check --out` writes of a candidate, with the same baseline always."""
    candidate, baseline = measured(n_right, rules), measured(30, rules)
    items = candidate[["score_name", "task", "item"]].assign(prompt="?", target="!")
    labels = f"<b>{folder.name}</b>", "deployed"
    write_outputs(judge(candidate, baseline, items, SUITE, suite_name="deploy", labels=labels), folder)
    write_parquet(folder / "candidate.parquet", candidate)
