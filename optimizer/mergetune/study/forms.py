"""The recommended merge as an adapter or quantized: written, and measured as it will be served."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.suite import Split
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.pool import Job, Pool, PoolOptions
from mergetune.measuring.reply_store import default_store
from mergetune.report.confirmation import measured_noise
from mergetune.report.losses import form_losses, merging_losses
from mergetune.report.metric import metrics_of
from mergetune.results.config import DeployConfig
from mergetune.results.run_dir import Candidate, Form, FormRecord
from mergetune.study.candidates import Candidates
from mergetune.study.export import write_merged_adapter
from mergetune.weights.quantized import quantize

log = logging.getLogger("mergetune")


def export_adapter(candidates: Candidates, recommended: Candidate, rank: int | None) -> None:
    """Write a merge as an adapter into the run directory, and say what one of a rank loses against the merge.

    It is measured as one expert with λ = 1. The engines of `candidates` must have ended, so that there is
    room for its own.

    Raises:
        MergetuneError: the merge is no adapter, or it cannot be written.
    """
    progress, folder = candidates.progress, candidates.run.path / "adapter"
    found = write_merged_adapter(folder, recommended.recipe, candidates.inputs, rank, progress.at_work)
    base = str(candidates.inputs.base.folder)
    _keep(candidates, "adapter", recommended, found.summary, None if found.is_exact else (folder, base))


def deploy_quantized(candidates: Candidates, recommended: Candidate, deploy: DeployConfig) -> None:
    """Quantize the merge in `best/`, and say what merging lost and what quantizing loses.

    The engines of `candidates` must have ended.

    Raises:
        MergetuneError: it cannot be quantized, or not be written.
    """
    progress, run = candidates.progress, candidates.run
    progress.at_work(f"quantizing the merged model: {deploy.quantize} …")
    folder = run.path / "quantized"
    found = quantize(run.path / "best", folder, deploy.quantize, deploy.python)
    _keep(candidates, "quantized", recommended, found.summary, (folder, None))


def _keep(
    candidates: Candidates,
    form: Form,
    recommended: Candidate,
    summary: tuple[str, ...],
    model: tuple[Path, str | None] | None,
) -> None:
    """Keep what a form is, measure it unless `model`, its folder and base, is None, and say its losses."""
    run, progress = candidates.run, candidates.progress
    for line in summary:
        progress.say(f"{form}: {line}")
    measured = _measure(candidates, form, *model) if model else None
    split, measurement = measured or (None, None)
    run.write_form(form, FormRecord(of=recommended.name, summary=summary, split=split), measurement)
    if split is None:
        return
    metrics = metrics_of(candidates.evaluator.suite.config, run.all_scores(split).values())
    noise = measured_noise(run, metrics)
    variances = noise.variances if noise else {}
    before = {loss.metric.name: loss for loss in merging_losses(run, form, metrics, variances)}
    for loss in form_losses(run, form, metrics, variances):
        name = loss.metric.name
        own, merge = (loss.metric.text(score) for score in (loss.own, loss.other))
        line = f"{form}, {split}: {name} {own}, the full merge {merge}: {loss.text}"
        if form == "quantized" and name in before:
            line += f"; merging, against {before[name].against}: {before[name].text}"
        progress.say(line)


def _measure(
    candidates: Candidates, form: Form, folder: Path, base: str | None
) -> tuple[Split, Measurement] | None:
    """Score a form on the held-out items or, where there are none, on the search split.

    Where that cannot be done it is said why, for the report is still to come. Replies are kept where `check`
    looks for them.
    """
    evaluator, progress = candidates.evaluator, candidates.progress
    split: Split = "holdout" if evaluator.count("holdout") else "search"
    progress.at_work(f"{split}: {form}")
    opened = open_model(str(folder), base, chat=evaluator.suite.config.chat_template, say=progress.at_work)
    options = PoolOptions(folder=candidates.run.path, say=progress.say, at_work=progress.at_work)
    with closing(Pool(opened, candidates.pool.config, evaluator, default_store(), options)) as pool:
        try:
            return split, pool.measured(Job(form, evaluator.documents(split))).measurement
        except Exception as error:
            if candidates.pool.ends_all(error):
                raise
            log.exception("%s: not measured", form)
            progress.say(f"warning: {folder} cannot be measured: {error}")
            return None
