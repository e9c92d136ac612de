"""What the command line does, as functions; `import mergetune` offers them. Each imports its own stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetune.engines.engine import EngineChanges, EngineConfig, EngineKind
from mergetune.errors import MergetuneError
from mergetune.files.library import find, use_cache

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from mergetune.analysis.advice import Advice
    from mergetune.analysis.task_vectors import TaskVectorStatistics
    from mergetune.evaluation.evaluate import Measurement
    from mergetune.evaluation.item_files import ItemFile
    from mergetune.evaluation.joint_items import JointItems
    from mergetune.evaluation.suite import Split, Suite
    from mergetune.gate.run import Checked, CheckSplit
    from mergetune.importing.importer import Imported
    from mergetune.measuring.model_under_test import ModelUnderTest
    from mergetune.merging.as_adapter import AdapterMerge
    from mergetune.results.run import Run
    from mergetune.space.recipe import LayerGroup
    from mergetune.study.rescore import Rescored
    from mergetune.weights.tokenizer_files import VocabularyRule

Say = Callable[[str], object]
Given = str | Path
LAYER_GROUPS = "task_arithmetic_layer_groups"  # the search space whose layer groups `inspect` compares by


def _quiet(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class ModelOptions:
    """How models that are scored as they are get opened and run.

    Attributes:
        engine: `auto`, `transformers`, `vllm`, a YAML file with `engine`, or the options themselves.
        batch_size: items at a time, where `engine` does not say it.
        workers: engines side by side in a Ray cluster; None: one in this process.
        ray_address: of a Ray cluster that runs already.
        base: the model that an adapter belongs to.
        tokenizer: of a served model, where it is not on this machine.
        api_keys: by host, or host:port, the environment variable with a server's API key.
        vocabulary: what becomes of tokens that an adapter added: `refuse`, `base` or `mean`.
        cache: where replies, the kernel and logs are kept; None: this user's cache.
        say: is told which engine runs, and what it warns of.
        at_work: is told what is being done.
    """

    engine: str | EngineConfig = "auto"
    batch_size: int | None = None
    base: Given | None = None
    tokenizer: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict)
    vocabulary: VocabularyRule = "refuse"
    cache: Path | None = None
    workers: int | None = None
    ray_address: str | None = None
    say: Say = _quiet
    at_work: Say = _quiet

    @property
    def config(self) -> EngineConfig:
        """The engine's options; raises `MergetuneError` as `engine_options` does."""
        from mergetune.results.config import engine_options

        changes = EngineChanges(None, self.batch_size, self.workers, self.ray_address)
        if isinstance(self.engine, EngineConfig):
            return changes.put_into(self.engine)
        return engine_options(self.engine, changes)

    def opened(self, model: Given, suite: Suite) -> ModelUnderTest:
        """Open a model for a suite; raises `MergetuneError` as `open_model` does."""
        from mergetune.measuring.model_under_test import open_model

        return open_model(
            str(model),
            None if self.base is None else str(self.base),
            self.tokenizer,
            suite.config.chat_template,
            self.api_keys,
            self.vocabulary,
            self.at_work,
        )


def run_study(
    study_file: Given,
    out: Given,
    *,
    engine: EngineKind | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> Run:
    """Run a study, or go on with the one in `out`, as `mergetune run` does.

    Args:
        study_file: the study's YAML file.
        out: the run directory.
        engine: takes the place of the study file's `engine.kind`.
        workers: takes the place of its `engine.workers`.
        ray_address: takes the place of its `engine.ray_address`.
        cache: takes the place of the study file's `cache`.
        console: where progress goes; by default standard error.

    Returns:
        What is in the run directory now; the report is `out/report/index.html`, the model `out/best`.

    Raises:
        MergetuneError: something the user has to mend; what was measured stays on disk.
        KeyboardInterrupt: after a report of what is there was written.
    """
    from rich.console import Console

    from mergetune.results.run import Run
    from mergetune.study import loop

    changes = EngineChanges(kind=engine, workers=workers, ray_address=ray_address)
    loop.run_study(Path(study_file), Path(out), console or Console(stderr=True), changes, cache)
    return Run(Path(out))


def rescore(
    run: Given, suite: Given, out: Given, *, cache: Path | None = None, say: Say = _quiet
) -> Rescored:
    """Score what the models of a run replied by another suite, into a new run directory `out`.

    No model is asked again: scorers, rubrics, weights, margins and guards may be others, prompts may not.

    Raises:
        MergetuneError: the suite does not fit the run, or a task has no item with replies of all candidates.
    """
    from mergetune.results.run_dir import RunDir
    from mergetune.study.rescore import rescore as _rescore

    use_cache(cache, say)
    return _rescore(RunDir(Path(run)), str(suite), Path(out), say)


def read_run(folder: Given) -> Run:
    """Read a run directory: candidates, front, recommendation, recipes, scores with intervals, items.

    Raises:
        MergetuneError: it is none.
    """
    from mergetune.results.run import Run

    return Run(Path(folder))


def read_suite(suite: Given) -> Suite:
    """Read a suite and its items.

    Args:
        suite: a preset's name, or a path.

    Raises:
        MergetuneError: there is no such suite, or it or its items break a rule.
    """
    from mergetune.evaluation import suite as suites

    return suites.read_suite(find("evals", str(suite), Path()))


def read_items(
    file: Given,
    *,
    fields: Mapping[str, str | Sequence[str]] | None = None,
    answers: str | None = None,
    split: str | None = None,
    config_name: str | None = None,
    skip: Sequence[int] = (),
) -> ItemFile:
    """Read a file of items, whatever its form, as a task of a suite does.

    Args:
        file: a file, a folder that `save_to_disk` wrote, or `hf:owner/name`.
        fields: where in a row the fields of an item stand, by dotted paths.
        answers: a second file, joined by `id`, or `none`: no tool is to be called, or `any`: one is.
        split: of a data set.
        config_name: of a data set on the Hub.
        skip: rows to leave out, by the line or row that errors name.

    Returns:
        The items, and in words what the file was taken for (`summary`).

    Raises:
        MergetuneError: the file cannot be read, is of no known form, or a row is broken, or one that is to be
            left out is not there.
    """
    from mergetune.evaluation import item_files
    from mergetune.evaluation.fields import FieldMap
    from mergetune.files.yaml_io import validate

    where = validate(dict(fields or {}), FieldMap, "fields")
    source = item_files.ItemSource(str(file), where, answers, split, config_name, tuple(skip))
    return item_files.read_items(source, Path())


def preview_items(
    found: ItemFile,
    *,
    scorer: str | None = None,
    model: Given | None = None,
    chat_template: Path | None = None,
    n_items: int = 3,
) -> list[str]:
    """Return the first items as the model will see them, and what is wanted, as `mergetune items` does.

    Args:
        found: as `read_items` returns it.
        scorer: a scorer's kind; every item is checked for it.
        model: a directory or a hub id, whose chat template writes what is asked; None: message by message.
        chat_template: a file whose template takes the place of the model's.
        n_items: how many of them.

    Raises:
        MergetuneError: there is no such scorer, model or template, a template comes without a model, an item
            does not suit the scorer, or the chat template does not take a conversation.
    """
    from mergetune.evaluation.preview import preview, scorer_of
    from mergetune.files.yaml_io import read_text
    from mergetune.weights.chat_template import ChatTemplate, open_tokenizer
    from mergetune.weights.models import find_model

    if chat_template is not None and model is None:
        raise MergetuneError(
            f"The chat template {chat_template} takes the place of a model's, but no model is named. Name "
            "one, or leave the template out."
        )
    how = None if scorer is None else scorer_of(scorer)
    if how is not None:
        found.check(how)
    folder = None if model is None else find_model(str(model), Path())
    tokenizer = None if folder is None else open_tokenizer(folder)
    if folder is not None and chat_template is not None:
        ChatTemplate.of(folder, read_text(chat_template)).put_into(tokenizer)
    return [preview(item, how, tokenizer) for item in found.items[:n_items]]


def join_items(
    persona: ItemFile,
    tools: ItemFile,
    out: Given,
    *,
    scorer: str | Mapping[str, Any] = "regex",
    system: str | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> JointItems:
    """Make items that need a persona and tools at once, and a suite of them, as `mergetune join` does.

    Args:
        persona: items with a system message and what their scorer needs, as `read_items` returns them.
        tools: items whose answer is a call, or conversations with a call and its result.
        out: the suite's file, beside which its items are written.
        scorer: the persona's, by its kind or as a suite says it.
        system: the persona's system message, where its items have none.
        seed: of the pairing.
        limit: the most requests, each of which makes two items.

    Raises:
        MergetuneError: the scorer knows no voice, an item does not suit its scorer, a persona has no system
            message, no tool item calls a tool, or the file is there already.
    """
    from mergetune.evaluation import joint_items
    from mergetune.evaluation.joint_suite import write_joint_suite
    from mergetune.evaluation.preview import scorer_of

    how = scorer_of(scorer)
    joint = joint_items.join_items(persona, tools, how, system=system, seed=seed, limit=limit)
    write_joint_suite(joint, how, scorer, Path(out))
    return joint


def evaluate(
    model: Given,
    suite: Given,
    *,
    split: Split | Literal["all"] = "all",
    options: ModelOptions | None = None,
) -> Measurement:
    """Score any model on a suite, item by item, as `mergetune eval` does.

    Replies of models in files are kept in the cache: what was replied to before is not asked again.

    Args:
        model: a directory, hub id, adapter (with `options.base`), file of a recipe or a stack, or a server's
            address.
        suite: a preset's name, or a path.
        split: which of the suite's items.
        options: how the model is opened and run.

    Returns:
        A row per item, and `scores()` of objectives and guards.

    Raises:
        MergetuneError: the model or the suite cannot be had, or not be scored.
    """
    from mergetune.evaluation.evaluate import Evaluator
    from mergetune.measuring.pool import Job, Pool, PoolOptions
    from mergetune.measuring.reply_store import default_store

    options = options or ModelOptions()
    use_cache(options.cache, options.say)
    config, asked = options.config, read_suite(suite)
    opened, evaluator = options.opened(model, asked), Evaluator(asked)
    for line in (*asked.read_as.values(), *(f"warning: {each}" for each in evaluator.warnings)):
        options.say(line)
    with closing(Pool(opened, config, evaluator, default_store(), PoolOptions(say=options.say))) as pool:
        found = pool.measured(Job("eval", evaluator.documents(split)))
    options.say(f"{opened.reference}: {found.counted}")
    return found.measurement


def check(
    candidate: Given,
    baseline: Given,
    suite: Given,
    *,
    split: CheckSplit | None = None,
    alpha: float = 0.05,
    fast: bool = False,
    noise_floor: bool = True,
    unquantized: Given | None = None,
    training: tuple[Path, ...] = (),
    store: Path | None = None,
    options: ModelOptions | None = None,
) -> Checked:
    """Say whether a candidate is worse than a baseline by more than the margins, as `mergetune check` does.

    Args:
        candidate: given as in `evaluate`.
        baseline: likewise.
        suite: a preset's name, or a path; its objectives and guards have margins.
        split: which of the suite's items; None: those held out, if the suite holds out any.
        alpha: one-sided, in (0, 0.5): the error of PASS, and that of FAIL.
        fast: stop as soon as the verdict is clear.
        noise_floor: measure the baseline twice, and count what differs as noise.
        unquantized: the candidate before it was quantized, given likewise: what quantizing changed is said.
        training: files that one of the models was trained on, to look for the suite's items in.
        store: where replies are kept; None: in the cache.
        options: how the models are opened and run.

    Returns:
        The check (`check.verdict` is `pass`, `fail` or `inconclusive`) and the measurements.

    Raises:
        MergetuneError: a model or the suite cannot be had, or not be scored.
    """
    from mergetune.gate.run import CheckOptions, check_models
    from mergetune.measuring.reply_store import ReplyStore, default_store

    options = options or ModelOptions()
    use_cache(options.cache, options.say)
    deployed = read_suite(suite)
    how = CheckOptions(split, alpha, fast, noise_floor, options.config, training)
    first, second = (options.opened(model, deployed) for model in (candidate, baseline))
    origin = None if unquantized is None else options.opened(unquantized, deployed)
    kept = ReplyStore(store) if store else default_store()
    return check_models(first, second, deployed, how, kept, options.say, origin)


def check_measurements(
    candidate: Path,
    baseline: Path,
    suite: Given,
    *,
    split: CheckSplit | None = None,
    alpha: float = 0.05,
    training: tuple[Path, ...] = (),
) -> Checked:
    """Check what `evaluate` or an earlier check measured, as `mergetune check --from` does; no model runs.

    Args:
        candidate: a Parquet file with the items of a measurement.
        baseline: likewise.
        suite: a preset's name, or a path.
        split: see `check`.
        alpha: see `check`.
        training: see `check`.

    Raises:
        MergetuneError: a file is no measurement of this suite, or was made by other rules.
    """
    from mergetune.gate.run import CheckOptions, check_stored

    deployed = read_suite(suite)
    return check_stored(candidate, baseline, deployed, CheckOptions(split, alpha, training=training))


def import_config(
    file: Given, out: Given, *, layers: int | None = None, include_path: Path | None = None
) -> Imported:
    """Make a recipe or a study of a configuration of mergekit or mergekit-evolve, as `mergetune import` does.

    Args:
        file: the configuration.
        out: a new folder or, for a single recipe, a new file that ends in .yaml.
        layers: the number of the models' layers, where their files cannot be had.
        include_path: where lm-eval finds tasks of one's own.

    Returns:
        The files written and, line by line, what became of settings that have no counterpart.

    Raises:
        MergetuneError: something has no counterpart and changes the merge, or the place is taken or cannot be
            written; nothing is written.
    """
    from mergetune.importing.importer import import_file

    return import_file(Path(file), Path(out), layers, include_path)


def merge(
    recipe: Given, out: Given, *, cache: Path | None = None, say: Say = _quiet, at_work: Say = _quiet
) -> Path:
    """Write the model of a recipe or stack file, as `mergetune merge` does; returns its directory.

    Raises:
        MergetuneError: a model of the recipe cannot be had or is another than it names, or the disk is full.
    """
    from mergetune.merging.native import why_slow
    from mergetune.study.export import merge_recipe

    use_cache(cache, say)
    if reason := why_slow():
        say(f"warning: {reason}")
    merge_recipe(Path(recipe), Path(out), at_work)
    return Path(out)


def merge_as_adapter(
    recipe: Given,
    out: Given,
    *,
    rank: int | None = None,
    cache: Path | None = None,
    say: Say = _quiet,
    at_work: Say = _quiet,
) -> AdapterMerge:
    """Write the merge of a recipe file as one adapter, as `mergetune merge --adapter` does.

    Args:
        recipe: the recipe file.
        out: the adapter's directory.
        rank: the largest rank of a layer; None: whatever it takes to be exact.
        cache: None: this user's cache.
        say: is told what is said on the way.
        at_work: is told what is being done.

    Returns:
        How near the adapter comes to the merge, tensor by tensor (`fits`) and in sentences (`summary`).

    Raises:
        MergetuneError: as `merge` does; or the merge is no adapter, or without a rank not exactly one.
    """
    from mergetune.merging.inputs import open_recipe
    from mergetune.study.export import write_merged_adapter

    use_cache(cache, say)
    return write_merged_adapter(Path(out), *open_recipe(Path(recipe), at_work), rank, at_work)


@dataclass(frozen=True)
class Inspection:
    """What task vectors say before any merge.

    Attributes:
        warnings: what is suspicious about the models.
        statistics: lengths, redundancy, cosines and sign conflicts of the task vectors, by layer group.
        verdict: merge or retrain, with its reasons.
        groups: the layer groups.
        sensitivity: how each score's loss moves with each coefficient, as `measure_sensitivity` gives it;
            None without a suite.
    """

    warnings: tuple[str, ...]
    statistics: TaskVectorStatistics
    verdict: Advice
    groups: tuple[LayerGroup, ...]
    sensitivity: pd.DataFrame | None


def inspect(
    base: Given,
    experts: Mapping[str, Given],
    *,
    search_space: Given = LAYER_GROUPS,
    suite: Given | None = None,
    engine: EngineConfig | None = None,
    vocabulary: VocabularyRule = "refuse",
    cache: Path | None = None,
    say: Say = _quiet,
    at_work: Say = _quiet,
) -> Inspection:
    """Check that models fit together, and compare what they learned, as `mergetune inspect` does.

    Args:
        base: a directory or a hub id.
        experts: fine-tunes or adapters of it, by the names that they are to have.
        search_space: whose layer groups are compared by: a preset's name, or a path.
        suite: where the skills of this suite conflict is measured, too: a preset's name, or a path.
        engine: with a suite: the options of the transformers engine.
        vocabulary: what becomes of tokens that experts added.
        cache: None: this user's cache.
        say: is told what is under way.
        at_work: is told what is being done.

    Raises:
        MergetuneError: the models do not fit together, or something cannot be had.
    """
    from mergetune.analysis.advice import advise
    from mergetune.analysis.task_vectors import task_vector_statistics
    from mergetune.merging.inputs import open_inputs
    from mergetune.space.search_space_config import layer_groups, read_search_space
    from mergetune.weights.models import find_model

    use_cache(cache, say)
    folder = Path()
    skills = read_suite(suite) if suite is not None else None
    space = read_search_space(find("search_spaces", str(search_space), folder))
    found = {name: find_model(str(reference), folder) for name, reference in experts.items()}
    inputs = open_inputs(find_model(str(base), folder), found, vocabulary, say=at_work)
    if skills is not None:
        inputs = inputs.with_chat(skills.config.chat_template)
    groups = layer_groups(space, inputs.base.names)
    statistics = task_vector_statistics(inputs, groups)
    frame = None
    if skills is not None:
        from mergetune.slopes.suite_sensitivity import suite_sensitivity

        frame = suite_sensitivity(inputs, skills, engine or EngineConfig(kind="transformers"), say)
    return Inspection(inputs.warnings, statistics, advise(statistics), tuple(groups), frame)
