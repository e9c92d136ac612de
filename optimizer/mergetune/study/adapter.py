"""The recommended merge as an adapter: written, and measured as it will be served."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.suite import Split
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.pool import Job, Pool, PoolOptions
from mergetune.measuring.reply_store import default_store
from mergetune.report.adapter_loss import adapter_losses
from mergetune.report.confirmation import measured_noise
from mergetune.report.metric import metrics_of
from mergetune.results.run_dir import AdapterRecord, Candidate
from mergetune.study.candidates import Candidates
from mergetune.study.export import write_merged_adapter

log = logging.getLogger("mergetune")


def export_adapter(candidates: Candidates, recommended: Candidate, rank: int | None) -> None:
    """Write a merge as an adapter into the run directory, and say what one of a rank loses against the merge.

    The adapter is measured on the held-out items or, where there are none, on the search split, as one expert
    with λ = 1. The engines of `candidates` must have ended, so that there is room for its own.

    Raises:
        MergetuneError: the merge is no adapter, or it cannot be written.
    """
    run, progress = candidates.run, candidates.progress
    folder = run.path / "adapter"
    found = write_merged_adapter(folder, recommended.recipe, candidates.inputs, rank, progress.at_work)
    for line in found.summary:
        progress.say(f"adapter: {line}")
    measured = None if found.is_exact else _measure(candidates, folder)
    split, measurement = measured or (None, None)
    run.write_adapter(AdapterRecord(of=recommended.name, summary=found.summary, split=split), measurement)
    if split is None:
        return
    metrics = metrics_of(candidates.evaluator.suite.config, run.all_scores(split).values())
    noise = measured_noise(run, metrics)
    for loss in adapter_losses(run, metrics, noise.variances if noise else {}):
        own, merge = (loss.metric.text(score) for score in (loss.own, loss.merge))
        progress.say(f"adapter, {split}: {loss.metric.name} {own}, the full merge {merge}: {loss.text}")


def _measure(candidates: Candidates, folder: Path) -> tuple[Split, Measurement] | None:
    """Score the adapter, or say why that cannot be done: the report and the merged model are still to come.

    Replies are kept where `check` looks for them.
    """
    evaluator, progress = candidates.evaluator, candidates.progress
    split: Split = "holdout" if evaluator.count("holdout") else "search"
    progress.at_work(f"{split}: the adapter")
    base, chat = str(candidates.inputs.base.folder), evaluator.suite.config.chat_template
    opened = open_model(str(folder), base, chat=chat, say=progress.at_work)
    options = PoolOptions(folder=candidates.run.path, say=progress.say, at_work=progress.at_work)
    with closing(Pool(opened, candidates.pool.config, evaluator, default_store(), options)) as pool:
        try:
            return split, pool.measured(Job("adapter", evaluator.documents(split))).measurement
        except Exception as error:
            if candidates.pool.ends_all(error):
                raise
            log.exception("the adapter was not measured")
            progress.say(f"warning: the adapter cannot be measured: {error}")
            return None
