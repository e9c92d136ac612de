"""Rescoring: what a run's models replied, scored by another suite, without asking any of them again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergetune.engines.completions import TokenizerPrompts
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Documents, Evaluator, Measurement
from mergetune.evaluation.suite import Split
from mergetune.files.library import find
from mergetune.measuring.model_under_test import LocalModel
from mergetune.measuring.reply_store import ReplyStore, StoredLM
from mergetune.report import write_report
from mergetune.results.roles import BASE
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.study.candidates import write_facts
from mergetune.study.plan import Plan

_AS_THEY_ARE = (
    *("coordinates.json", "warm_start.json", "search.json"),
    *("versions.json", "seconds.json", "holdout.json"),
)


@dataclass(frozen=True)
class Rescored:
    """What came of rescoring: the report, and by task how many items lack a reply of some candidate."""

    report: Path
    n_items: int
    lacking: Mapping[str, int]


def rescore(run: RunDir, suite: str, out: Path, say: Callable[[str], object] = lambda _: None) -> Rescored:
    """Score the replies kept in a run directory by another suite, into a new run directory.

    Items that some measured candidate has no reply to are left out, for scores are compared item by item, and
    so are candidates that were dropped on part of their items, by scores that no longer count. The
    new directory is a run of its own, which `run` can go on with.

    Args:
        run: the run; nothing in it changes.
        suite: the suite: a preset's name or a path, relative to this folder.
        out: the new run directory.
        say: is told what is done.

    Raises:
        MergetuneError: the suite does not fit the run, or no item of a task has replies of all candidates.
    """
    candidates = [candidate for candidate in run.candidates() if candidate.state != "dropped"]
    if not any(each.state == "complete" for each in candidates):
        raise MergetuneError(f"{run.path}: must hold measured candidates to score anew, but there is none.")
    plan = Plan.read_of_run(run, find("evals", suite, Path()))
    inputs = plan.open_inputs(out, say)
    evaluator = Evaluator(plan.suite)
    plan = replace(plan, suite=evaluator.suite)
    # it counts no tokens: what is not asked is not too long
    renderer = TokenizerPrompts(LocalModel.base_of(inputs).prompts().tokenizer)
    store = ReplyStore(run.path / "replies")

    def lm(candidate: Candidate, repeat: int = 0) -> StoredLM:
        digest = candidate.recipe.digest
        return StoredLM(renderer, store, f"{digest}-{repeat}" if repeat else digest)

    def has_measured(candidate: Candidate, split: Split) -> bool:
        return run.holds_measurement(candidate.name, split)

    splits: tuple[Split, ...] = ("search", "holdout")
    known: dict[Split, Documents] = {
        split: _known(evaluator, (lm(each) for each in candidates if has_measured(each, split)), split)
        for split in splits
    }
    lacking = _lacking(evaluator, known)
    target = RunDir(out)
    with target.claim(plan.record(inputs, evaluator.rules)):
        write_facts(target, inputs, evaluator)
        shutil.copytree(store.folder, target.path / "replies", dirs_exist_ok=True)
        for name in _AS_THEY_ARE:
            if (run.path / name).is_file():
                shutil.copyfile(run.path / name, target.path / name)
        for candidate in candidates:
            say(f"scoring {candidate.name}")
            own = lm(candidate)
            found: dict[Split, Measurement] = {
                split: evaluator.measure_documents(own, known[split])
                for split in known
                if has_measured(candidate, split) and any(known[split].values())
            }
            target.write_candidate(candidate, found.get("search"))
            if "holdout" in found:
                target.write_measurement(candidate.name, "holdout", found["holdout"])
        base = next((each for each in candidates if each.name == BASE), None)
        if base is not None and run.noise() is not None:
            again = lm(base, repeat=1)
            if _known(evaluator, [again], "search") == known["search"]:
                target.write_noise(evaluator.measure_documents(again, known["search"]))
        target.write_agreements(evaluator.agreements)
        report = write_report(target)
    n_items = sum(len(own) for documents in known.values() for own in documents.values())
    return Rescored(report, n_items, lacking)


def _known(evaluator: Evaluator, lms: Iterable[StoredLM], split: Split) -> dict[str, list[int]]:
    """Return the documents of a split, by task, that every model has replied to; none without a model."""
    documents = {name: list(own) for name, own in evaluator.documents(split).items()}
    lm = None
    for lm in lms:
        asked = evaluator.requests(lm, documents)
        documents = {
            name: [index for index in own if all(map(lm.knows, asked[name][index]))]
            for name, own in documents.items()
        }
    return {name: [] for name in documents} if lm is None else documents


def _lacking(evaluator: Evaluator, known: Mapping[Split, Documents]) -> dict[str, int]:
    """Count the items without replies by task; raises `MergetuneError` where a task has too few with them."""
    lacking = {}
    search = evaluator.documents("search")
    for name in evaluator.tasks:
        if (n_known := len(known["search"][name])) < 2:
            raise MergetuneError(
                f"{evaluator.suite.path}: the replies in the run must belong to the items that are scored, "
                f"but of `{name}` {n_known} of {len(search[name])} items in the search split "
                "have one from every candidate. Ask the same prompts in the same way (chat template, system "
                "message, `max_new_tokens`, `stop`), or measure them: mergetune run."
            )
        splits: tuple[Split, ...] = ("search", "holdout") if any(known["holdout"].values()) else ("search",)
        n_lacking = sum(len(evaluator.documents(split)[name]) - len(known[split][name]) for split in splits)
        if n_lacking:
            lacking[name] = n_lacking
    return lacking
