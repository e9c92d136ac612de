"""The command line: verbs only; each imports its stage when it is called."""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mergetune import __version__
from mergetune.errors import MergetuneError
from mergetune.machine.interrupts import Interrupts, end_as_by_ctrl_c
from mergetune.stats.number_text import number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from mergetune.analysis.advice import Advice
    from mergetune.analysis.task_vectors import TaskVectorStatistics
    from mergetune.api import ModelOptions
    from mergetune.merging.as_adapter import AdapterMerge
    from mergetune.space.recipe import LayerGroup
    from mergetune.study.soup import SoupResult
    from mergetune.weights.tokenizer_files import VocabularyRule

EXIT_ERROR = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="mergetune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune merge coefficients of language models by evaluation.\n\n"
    "Exit codes: 0 done, 3 an error that the message explains, 130 interrupted; "
    "of check: 0 pass, 1 fail, 2 inconclusive.",
)
_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)

Study = Annotated[Path, typer.Argument(help="The study file.", metavar="STUDY.yaml")]
Engine = Annotated[
    str,
    typer.Option(
        help="auto (vLLM where it can run), transformers, vllm, or a YAML file with all options in `engine`, "
        "such as a study file.",
        metavar="KIND|FILE.yaml",
    ),
]
Model = Annotated[
    str, typer.Argument(help="A directory, a hub id, `smollm2-demo` or a stack (.yaml).", metavar="BASE")
]
_TESTED = (
    "A directory, a hub id, an adapter, a recipe or a stack (.yaml) or a server: http://host:port or "
    "…:port#name."
)
Tested = Annotated[str, typer.Argument(help=_TESTED, metavar="MODEL")]
Suite = Annotated[str, typer.Option(help="A suite: a preset's name or a path.")]
Base = Annotated[str | None, typer.Option(help="The base of an adapter.")]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="For the log-likelihoods of a server: the tokenizer's directory or hub id."),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Items at a time; for a server, requests at a time (32).")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Engines side by side, each on a GPU or a share of the cores, by Ray."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="A Ray cluster that runs already; `auto`: that of this machine.", metavar="ADDRESS"),
]
Vocabulary = Annotated[
    Literal["refuse", "base", "mean"],
    typer.Option(help="What becomes of tokens that a model added; mean: they get their models' mean rows."),
]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        help="For a server: the variable that holds its key, such as api.example.com=OPENAI_API_KEY.",
        metavar="HOST=VARIABLE",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Where what is made once is kept: replies, the kernel, logs. Default: ~/.cache/mergetune.",
        metavar="DIR",
    ),
]
_SECONDS_BETWEEN_LOOKS = 3.0  # of `status --watch`
_OF_MODELS = {  # what `check` needs to measure models, and `--from` does not
    "candidate": "CANDIDATE",
    "baseline": "--baseline",
    "base": "--base",
    "tokenizer": "--tokenizer",
    "api_key": "--api-key",
    "vocabulary": "--vocabulary",
    "fast": "--fast",
    "noise_floor": "--noise-floor",
    "unquantized": "--unquantized",
    "engine": "--engine",
    "batch_size": "--batch-size",
    "workers": "--workers",
    "ray_address": "--ray-address",
    "cache": "--cache",
    "store": "--store",
}


class _Ended(Exception):  # noqa: N818  # no error
    """A command has done its work and ends with a code of its own."""

    def __init__(self, code: int) -> None:
        self.code = code


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergetune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def run(
    study: Study,
    out: Annotated[
        Path | None, typer.Option(help="The run directory. Default: runs/STUDY in this folder.")
    ] = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    cache: Cache = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be measured and about how long it takes; write nothing."
        ),
    ] = False,
) -> None:
    """Run a study, or go on with it: baselines, search, holdout, report and merged model."""
    if dry_run:
        from mergetune.engines.engine import EngineChanges
        from mergetune.study.dry_run import describe_study

        describe_study(study, _out, EngineChanges(workers=workers, ray_address=ray_address), cache)
        return
    _run(study, out or Path("runs") / study.stem, cache, workers=workers, ray_address=ray_address)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    engine: Annotated[
        Literal["auto", "transformers", "vllm"], typer.Option(help="auto: vLLM where it can run.")
    ] = "auto",
    workers: Workers = None,
    cache: Cache = None,
) -> None:
    """Run the example study: two LoRA experts of SmolLM2-135M-Instruct, on this machine's CPU."""
    from mergetune.files.library import shared_folder

    _run(shared_folder("examples") / "taskmaster" / "study.yaml", out, cache, engine=engine, workers=workers)


@app.command()
def inspect(
    base: Model,
    experts: Annotated[
        list[str],
        typer.Argument(
            help="Fine-tunes or adapters of BASE: directories, hub ids or stacks; NAME=PATH if two paths end "
            "alike.",
            metavar="EXPERT",
        ),
    ],
    search_space: Annotated[
        str, typer.Option(help="The search space whose layer groups the tables use.")
    ] = "task_arithmetic_layer_groups",
    chart: Annotated[
        Path | None, typer.Option(help="Also draw the figures, to a file ending in .svg, .png or .html.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Measure where the skills of this suite conflict: a preset's name or a path."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --suite: items at a time where experts reply.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --suite: where the model runs, such as cpu or cuda:1.")
    ] = None,
    vocabulary: Vocabulary = "refuse",
    cache: Cache = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge or retrain? Check that models fit together, and compare what they learned."""
    from mergetune import api
    from mergetune.analysis.advice import as_data
    from mergetune.analysis.conflicts import sensitivity_as_data
    from mergetune.engines.engine import EngineConfig
    from mergetune.measuring.progress import Progress

    if chart is not None:
        from mergetune.analysis.chart import check_chart_path, write_chart

        check_chart_path(chart)
    for option, value in (("--batch-size", batch_size), ("--device", device)):
        if value is not None and suite is None:
            raise MergetuneError(f"{option} {value} goes with --suite. Name a suite, or leave it out.")
    with Progress(_err) as progress:
        found = api.inspect(
            base,
            _named(experts),
            search_space=search_space,
            suite=suite,
            engine=EngineConfig(kind="transformers", batch_size=batch_size, device=device or "auto"),
            vocabulary=vocabulary,
            cache=cache,
            say=_remark,
            at_work=progress.at_work,
        )
    if chart is not None:
        write_chart(found.statistics, found.verdict, chart, found.sensitivity)
    if as_json:
        data = as_data(found.statistics, found.verdict, found.warnings)
        if found.sensitivity is not None:
            data["sensitivity"] = sensitivity_as_data(found.sensitivity, found.groups)
        typer.echo(json.dumps(data, indent=1))
        return
    for warning in found.warnings:
        _out.print(f"warning: {warning}", highlight=False, markup=False)
    _print_inspection(found.statistics, found.verdict)
    if found.sensitivity is not None:
        _print_sensitivity(found.sensitivity, found.groups)


@app.command()
def items(
    file: Annotated[
        str,
        typer.Argument(
            help="JSON lines, a JSON array, CSV, Parquet, a folder of `datasets` or hf:owner/name.",
            metavar="FILE",
        ),
    ],
    fields: Annotated[
        list[str] | None,
        typer.Option(
            help="Where a field of an item stands, such as answer=gold.text. Several paths: choices=A,B,C.",
            metavar="FIELD=PATH",
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(help="A file of answers, joined by id; none: no tool is to be called; any: one is."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split of a data set.")] = None,
    config_name: Annotated[str | None, typer.Option(help="The configuration of a data set.")] = None,
    skip: Annotated[
        list[int] | None,
        typer.Option(help="A row to leave out, by the line or row that errors name.", metavar="ROW"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Show what this model's chat template makes of them.", metavar="DIR")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="With --model: a file whose template takes the place of the model's."),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Check every item for this scorer, such as exact.", metavar="KIND")
    ] = None,
) -> None:
    """What is in a file of items? Shows what it is taken for, and three items as a model sees them."""
    from mergetune import api

    found = api.read_items(
        file,
        fields=_named_paths(fields),
        answers=answers,
        split=split,
        config_name=config_name,
        skip=skip or (),
    )
    previews = api.preview_items(found, scorer=scorer, model=model, chat_template=chat_template)
    _out.print(found.summary, highlight=False, markup=False)
    for place, text in zip(found.places, previews, strict=False):
        _out.print(f"\n=== {place}\n{text}", highlight=False, markup=False)


@app.command()
def join(
    persona: Annotated[
        str, typer.Argument(help="Items with a system message and a voice.", metavar="PERSONA")
    ],
    tools: Annotated[
        str,
        typer.Argument(help="Items with tools and right calls, or conversations with them.", metavar="TOOLS"),
    ],
    out: Annotated[
        Path,
        typer.Option(help="The suite to write; its items are written beside it.", metavar="FILE.yaml"),
    ],
    scorer: Annotated[
        str,
        typer.Option(
            help="The persona's, as a suite says it: regex, or '{kind: regex, patterns: [hi]}'.",
        ),
    ] = "regex",
    system: Annotated[
        str | None, typer.Option(help="The persona's system message, where its items have none.")
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="A file with the answers of the tool items, joined by id.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the pairing.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="The most requests; each makes two items.")] = None,
) -> None:
    """Make items that need two skills at once: a persona's voice where tools are called."""
    from mergetune import api
    from mergetune.files.yaml_io import parse_yaml

    files = api.read_items(persona), api.read_items(tools, answers=answers)
    how = parse_yaml(scorer, "--scorer")
    joint = api.join_items(*files, out, scorer=how, system=system, seed=seed, limit=limit)
    for text in (*(file.summary for file in files), joint.summary, f"Suite: {out}"):
        _out.print(text, highlight=False, markup=False)


@app.command("import")
def import_config(
    file: Annotated[
        Path,
        typer.Argument(
            help="A configuration of mergekit or mergekit-evolve, in YAML.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder; for a single recipe also a new .yaml file. Default: FILE's name here."
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many layers the models have, where their files cannot be had.", metavar="N"
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            help="Where lm-eval finds your own tasks: mergekit-evolve's --task-search-path.", metavar="DIR"
        ),
    ] = None,
) -> None:
    """Come from elsewhere: a merge of mergekit becomes a recipe, a search of mergekit-evolve a study."""
    from mergetune import api

    found = api.import_config(file, out or Path(file.stem), layers=layers, include_path=include_path)
    for remark in found.remarks:
        _out.print(str(remark), highlight=False, markup=False)
    for path in found.files:
        _out.print(f"Written: {path}", highlight=False, markup=False)
    for command in found.commands:
        _out.print(f"Next: {command}", highlight=False, markup=False)


@app.command()
def merge(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe, such as report/recipes/NAME.yaml, or a stack of layers.", metavar="RECIPE.yaml"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT")],
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Write one LoRA adapter instead: exact, where experts are adapters."),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --adapter: the nearest of this rank, of any merge; its error is said.",
            metavar="R",
        ),
    ] = None,
    cache: Cache = None,
) -> None:
    """Write the model of a recipe or a stack: the same recipe and inputs give the same bits."""
    from mergetune import api
    from mergetune.measuring.progress import Progress

    if rank is not None and not adapter:
        raise MergetuneError(f"--rank {rank} goes with --adapter. Give both, or leave it out.")
    with Progress(_err) as progress:
        if adapter:
            found = api.merge_as_adapter(
                recipe, out, rank=rank, cache=cache, say=_remark, at_work=progress.at_work
            )
        else:
            api.merge(recipe, out, cache=cache, say=_remark, at_work=progress.at_work)
    if adapter:
        _print_adapter(found, out)
        return
    _out.print(f"Merged model: {out}", highlight=False, markup=False)


@app.command()
def soup(
    out: Annotated[Path, typer.Argument(help="The model directory to write.", metavar="OUT")],
    models: Annotated[
        list[str], typer.Argument(help="Two or more: directories, hub ids or adapters.", metavar="MODEL")
    ],
    base: Annotated[str | None, typer.Option(help="The base of the models; adapters need it.")] = None,
    last: Annotated[
        int | None,
        typer.Option(min=2, help="Take the last N checkpoints in MODEL, the folder of a training run."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Choose greedily by this suite: a preset's name or a path.")
    ] = None,
    split: Annotated[
        Literal["search", "holdout", "all"], typer.Option(help="Which of the suite's items to choose on.")
    ] = "search",
    engine: Engine = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items at a time.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Where the suite's measurements are kept. Default: OUT.soup.")
    ] = None,
    vocabulary: Annotated[
        Literal["refuse", "base"], typer.Option(help="What becomes of tokens that a model added.")
    ] = "refuse",
    cache: Cache = None,
) -> None:
    """Average models with equal weights: all of them or, with --suite, those that do not lower the score."""
    from mergetune.engines.engine import EngineChanges
    from mergetune.files.library import use_cache
    from mergetune.results.config import engine_options
    from mergetune.results.run_dir import RunDir
    from mergetune.study.soup import make_soup
    from mergetune.study.soup_plan import SoupPlan

    use_cache(cache, _remark)
    config = engine_options(engine, EngineChanges(batch_size=batch_size))
    plan = SoupPlan.read(out, models, base, last, suite, split, config, vocabulary)
    result = make_soup(plan, RunDir(run or plan.out.parent / f"{plan.out.name}.soup"), _out)
    if result is not None:
        _out.print(_soup_table(result))
    members = list(plan.models) if result is None else result.soup.members
    if len(members) > 1:
        _out.print(f"Averaged: {', '.join(members)}", highlight=False, markup=False)
    else:
        _out.print(f"No soup is as good as {members[0]} alone.", highlight=False, markup=False)
    _out.print(f"Merged model: {out}", highlight=False, markup=False)


@app.command("eval")
def evaluate(
    model: Tested,
    suite: Suite,
    base: Base = None,
    tokenizer: Tokenizer = None,
    api_key: ApiKeys = None,
    vocabulary: Vocabulary = "refuse",
    split: Annotated[
        Literal["search", "holdout", "all"], typer.Option(help="Which of the suite's items.")
    ] = "all",
    engine: Engine = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    cache: Cache = None,
    out: Annotated[Path | None, typer.Option(help="Write the per-item scores (Parquet).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score any model on a suite, item by item."""
    from dataclasses import asdict

    from mergetune import api
    from mergetune.files.atomic_files import write_parquet
    from mergetune.files.library import writable

    if out is not None:
        writable(out.parent, "--out")
        if out.is_dir():
            raise MergetuneError(f"--out {out}: must be a file to write, but is a folder. Name a file in it.")
    with _model_options(
        engine, batch_size, workers, ray_address, base, tokenizer, api_key, vocabulary, cache
    ) as options:
        measurement = api.evaluate(model, suite, split=split, options=options)
    if out is not None:
        write_parquet(out, measurement.items)
    scores = measurement.scores()
    if as_json:
        typer.echo(json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1))
        return
    for name, score in scores.items():
        shown = f"{number(score.value)} ± {number(score.stderr)}"
        _out.print(f"{name:<16} {shown}  ({score.n_items} items)", highlight=False, markup=False)


@app.command()
def check(
    context: typer.Context,
    candidate: Annotated[str | None, typer.Argument(help=_TESTED, metavar="CANDIDATE")] = None,
    suite: Annotated[str | None, typer.Option(help="A suite: a preset's name or a path.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The model that CANDIDATE may not be worse than.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="Compare measurements instead. Give it twice: CANDIDATE's, then the baseline's.",
        ),
    ] = None,
    base: Base = None,
    tokenizer: Tokenizer = None,
    api_key: ApiKeys = None,
    vocabulary: Vocabulary = "refuse",
    split: Annotated[
        Literal["search", "holdout", "all"] | None,
        typer.Option(help="Which of the suite's items. Default: those held out, if the suite holds out any."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Stop as soon as the verdict is clear.")] = False,
    noise_floor: Annotated[
        bool, typer.Option(help="Measure the baseline twice, and count what differs as noise.")
    ] = True,
    unquantized: Annotated[
        str | None,
        typer.Option(
            help="CANDIDATE before it was quantized: what quantizing changed is said, too.", metavar="MODEL"
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            min=0.0001, max=0.4999, help="The largest probability of a wrong PASS, and of a wrong FAIL."
        ),
    ] = 0.05,
    training: Annotated[
        list[Path] | None,
        typer.Option(help="A file that a model was trained on, to look for the suite's items in."),
    ] = None,
    engine: Engine = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    cache: Cache = None,
    store: Annotated[
        Path | None, typer.Option(help="Where replies are kept. Default: `replies` in the cache.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write index.html, summary.md, junit.xml, check.json and the measurements here."),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Check nothing: show how the suite moved over the releases whose checks (--out) are in DIR.",
            metavar="DIR",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Is CANDIDATE worse than the baseline by more than the margin? Exits 0 pass, 1 fail, 2 inconclusive."""
    from mergetune import api
    from mergetune.files.atomic_files import write_parquet
    from mergetune.files.library import writable
    from mergetune.gate.judge import EXIT
    from mergetune.gate.outputs import (
        as_attribution_table,
        as_data,
        as_slice_table,
        as_table,
        write_outputs,
    )

    if history is not None:
        from mergetune.gate.history import write_history

        _out.print(f"History: {write_history(history)}", highlight=False, markup=False)
        return
    if suite is None:
        raise MergetuneError("Name the suite with --suite, or a folder of checks with --history.")
    texts = tuple(training or ())
    if measured:
        if len(measured) != 2:
            raise MergetuneError("Give --from twice: the candidate's measurement, then the baseline's.")
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        if unused := ", ".join(f"`{text}`" for name, text in _OF_MODELS.items() if name in given):
            raise MergetuneError(
                f"--from compares what was measured, so that {unused} has no use: leave it out."
            )
        checked = api.check_measurements(
            measured[0], measured[1], suite, split=split, alpha=alpha, training=texts
        )
        for warning in checked.check.warnings:
            _remark(f"warning: {warning}")
    elif candidate is None or baseline is None:
        raise MergetuneError("Name CANDIDATE and --baseline, or give two measurements with --from.")
    else:
        if out is not None:
            writable(out, "--out")
        if store is not None:
            writable(store, "--store")
        with _model_options(
            engine, batch_size, workers, ray_address, base, tokenizer, api_key, vocabulary, cache
        ) as options:
            checked = api.check(
                candidate,
                baseline,
                suite,
                split=split,
                alpha=alpha,
                fast=fast,
                noise_floor=noise_floor,
                unquantized=unquantized,
                training=texts,
                store=store,
                options=options,
            )
    result = checked.check
    if out is not None:
        write_outputs(result, out)
        write_parquet(out / "candidate.parquet", checked.candidate)
        write_parquet(out / "baseline.parquet", checked.baseline)
        if checked.unquantized is not None:
            write_parquet(out / "unquantized.parquet", checked.unquantized)
    if as_json:
        typer.echo(json.dumps(as_data(result), indent=1))
    else:
        _out.print(as_table(result))
        if (attributed := as_attribution_table(result)) is not None:
            _out.print(attributed)
        if (by_slice := as_slice_table(result)) is not None:
            _out.print(by_slice)
        _out.print(result.summary, highlight=False, markup=False)
    raise _Ended(EXIT[result.verdict])


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="A run directory; several are compared on one page.", metavar="RUN")
    ],
    slide: Annotated[
        bool, typer.Option("--slide", help="Write one page for a meeting: headline, chart, three sentences.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Of several runs: the page to write.", metavar="FILE.html")
    ] = Path("comparison.html"),
) -> None:
    """Write the report of a run directory again, or put several runs on one page."""
    from mergetune.report import write_comparison, write_report, write_slide
    from mergetune.results.run_dir import RunDir

    found = [RunDir(run) for run in runs]
    if len(found) > 1:
        if slide:
            raise MergetuneError("--slide is of one run: name one.")
        page = write_comparison(found, out)
    else:
        page = write_slide(found[0]) if slide else write_report(found[0])
    _out.print(f"Report: {page}", highlight=False, markup=False)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every few seconds, until no process is at work.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where does a study stand? Trials, front, hypervolume, time left."""
    import time
    from dataclasses import asdict

    from rich.live import Live
    from rich.table import Table

    from mergetune.report.status import Status, read_status
    from mergetune.results.run_dir import RunDir

    def table(found: Status) -> Table:
        shown = Table(show_header=False, box=None)
        for name, text in found.rows():
            shown.add_row(name, escape(text))
        return shown

    found = read_status(RunDir(run))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    if not watch:
        _out.print(table(found))
        return
    with Live(table(found), console=_out, auto_refresh=False) as live:
        while found.is_at_work:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            found = read_status(RunDir(run))
            live.update(table(found), refresh=True)


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="A run directory; nothing in it changes.", metavar="RUN")],
    suite: Annotated[str, typer.Option(help="What to score by: a preset's name or a path.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new run directory.")],
    cache: Cache = None,
) -> None:
    """Score what a run's models replied by another suite, without asking any model again."""
    from mergetune import api
    from mergetune.measuring.progress import Progress

    with Progress(_err) as progress:
        found = api.rescore(run, suite, out, cache=cache, say=progress.at_work)
    for task, n_items in found.lacking.items():
        _remark(f"{n_items} items of `{task}` are left out: not every candidate has replied to them.")
    _out.print(f"{found.n_items} items scored. Report: {found.report}", highlight=False, markup=False)


@app.command()
def methods() -> None:
    """List the merge methods with their coefficients and options."""
    from mergetune.space.method_table import METHODS

    table = Table("method", "merged weights", "coefficients", "options", box=None, header_style="bold")
    for name, method in METHODS.items():
        table.add_row(name, method.summary, method.coefficients, method.choices)
    _out.print(table, markup=False)


@app.command()
def presets() -> None:
    """List the search spaces and suites that can be named in a study file."""
    from mergetune.evaluation.suite import SuiteConfig
    from mergetune.files.library import presets as list_presets
    from mergetune.files.yaml_io import read_yaml
    from mergetune.space.search_space_config import read_search_space

    _out.print("Search spaces", style="bold")
    for name, path in list_presets("search_spaces").items():
        _out.print(f"  {name:<32} {escape(read_search_space(path).description)}")
    _out.print("Suites", style="bold")
    for name, path in list_presets("evals").items():
        _out.print(f"  {name:<32} {escape(read_yaml(path, SuiteConfig).description)}")


@contextmanager
def _model_options(
    engine: str,
    batch_size: int | None,
    workers: int | None,
    ray_address: str | None,
    base: str | None,
    tokenizer: str | None,
    api_keys: Sequence[str] | None,
    vocabulary: VocabularyRule,
    cache: Path | None,
) -> Iterator[ModelOptions]:
    """Return how models are opened and run; while the block runs, show its progress and say how it ended."""
    from mergetune.api import ModelOptions
    from mergetune.measuring.progress import Progress

    named = _named_variables(api_keys)
    with Interrupts() as interrupts:
        try:
            with Progress(_err) as progress:
                yield ModelOptions(
                    engine,
                    batch_size,
                    base,
                    tokenizer,
                    named,
                    vocabulary,
                    cache,
                    workers,
                    ray_address,
                    _remark,
                    progress.at_work,
                )
        except BaseException as error:
            if not interrupts.requested:
                raise
            _remark(
                "Interrupted; run the same command to go on. Replies of models in files and verdicts of "
                "judges are kept."
            )
            raise KeyboardInterrupt from error


def _named_variables(given: Sequence[str] | None) -> dict[str, str]:
    """Return the variables that hold API keys by host, from HOST=VARIABLE each."""
    pairs = [text.partition("=") for text in given or ()]
    if wrong := next((host for host, _, variable in pairs if not host or not variable), None):
        raise MergetuneError(f"--api-key must be HOST=VARIABLE, but is {wrong}.")
    return {host: variable for host, _, variable in pairs}


def _named_paths(given: Sequence[str] | None) -> dict[str, str | list[str]]:
    """Return the paths of the fields of items, from FIELD=PATH each."""
    pairs = [text.partition("=") for text in given or ()]
    if wrong := next(("".join(pair) for pair in pairs if not pair[0] or not pair[2]), None):
        raise MergetuneError(f"--fields must be FIELD=PATH, such as answer=gold.text, but is {wrong}.")
    return {field: path.split(",") if "," in path else path for field, _, path in pairs}


def _remark(text: str) -> None:
    """Say something on stderr, beside a result that may be JSON."""
    _err.print(text, highlight=False, markup=False)


def _run(study: Path, out: Path, cache: Path | None, **engine: Any) -> None:
    """Run a study; `engine` has options that take the place of those in its file."""
    from mergetune import api

    api.run_study(study, out, cache=cache, console=_out, **engine)
    _out.print(f"Report: {out / 'report' / 'index.html'}", highlight=False, markup=False)
    if (out / "best").is_dir():
        _out.print(f"Merged model: {out / 'best'}", highlight=False, markup=False)
    if (out / "adapter").is_dir():
        _out.print(f"Adapter: {out / 'adapter'}", highlight=False, markup=False)


def _print_inspection(statistics: TaskVectorStatistics, verdict: Advice) -> None:
    from mergetune.analysis.tables import inspection_tables, verdict_sections

    for table in inspection_tables(statistics, verdict):
        _out.print(table)
    for title, sentences in verdict_sections(verdict):
        _out.print(title, style="bold", highlight=False, markup=False)
        for sentence in sentences:
            _out.print(f"- {sentence}", highlight=False, markup=False)


def _named(experts: Sequence[str]) -> dict[str, str]:
    """Return the reference of each expert by its name: NAME of NAME=EXPERT, else the end of its path."""
    named: dict[str, str] = {}
    for expert in experts:
        name, _, reference = expert.partition("=")
        if not name or not reference or "/" in name or Path(expert).is_dir():
            name, reference = Path(expert).name, expert
        if name in named:
            raise MergetuneError(
                f"Experts must have distinct names, but {named[name]} and {reference} are both `{name}`. "
                f"Name one, such as other={reference}."
            )
        named[name] = reference
    return named


def _print_sensitivity(frame: pd.DataFrame, groups: Sequence[LayerGroup]) -> None:
    from mergetune.analysis.conflict_words import HOW_TO_READ, evidence
    from mergetune.analysis.conflicts import conflicts
    from mergetune.analysis.tables import sensitivity_sections, sensitivity_tables
    from mergetune.slopes.sensitivity import n_passes, slopes_by_group

    found = conflicts(frame, groups)
    for table in sensitivity_tables(slopes_by_group(frame, groups), found):
        _out.print(table)
    for title, findings in sensitivity_sections(found):
        _out.print(title, style="bold", highlight=False, markup=False)
        for finding in findings:
            _out.print(f"- {finding.sentence}", highlight=False, markup=False)
            for detail in finding.details:
                _out.print(f"  - {detail}", highlight=False, markup=False)
    cost = f"It took {n_passes(frame)} forward passes of one text, a backward pass being two."
    _out.print(f"{HOW_TO_READ} {evidence(frame)} {cost}", highlight=False, markup=False)


def _print_adapter(found: AdapterMerge, out: Path) -> None:
    from mergetune.merging.as_adapter import relative_error

    if not found.is_exact:
        table = Table(box=None)
        table.add_column("tensors", overflow="fold")
        for column in ("number", "rank", "relative error", "at most"):
            table.add_column(column, justify="right", no_wrap=True)
        for kind, fits in found.by_kind.items():
            worst, rank = max(fit.share for fit in fits), max(fit.rank for fit in fits)
            table.add_row(kind, str(len(fits)), str(rank), f"{relative_error(fits):.2%}", f"{worst:.2%}")
        _out.print(table, markup=False)
    for line in (f"Adapter: {out}", *found.summary):
        _out.print(line, highlight=False, markup=False)


def _soup_table(result: SoupResult) -> Table:
    table = Table(title="Greedy soup")
    table.add_column("tried")
    for name in result.rows[0].scores:
        table.add_column(name, justify="right")
    table.add_column("score", justify="right")
    table.add_column("kept")
    for row in result.rows:
        shown = [f"{number(score.value)} ± {number(score.stderr)}" for score in row.scores.values()]
        kept = "" if row.is_kept is None else "yes" if row.is_kept else "no"
        broken = " (breaks a guard)" if row.standing.allowance < 0 else ""
        table.add_row(escape(row.label), *shown, f"{number(row.standing.gain)}{broken}", kept)
    return table


def main() -> None:
    """Run the command line; an error of the user's is one message on stderr, without a traceback."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars would break the study's own line
    end_as_by_ctrl_c()
    faulthandler.enable()  # says where, if a file that is mapped is cut off (SIGBUS)
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # Python's own exit code, 1, and typer's, 2 for wrong usage, would read as verdicts.
    try:
        app(arguments, prog_name="mergetune")
    except _Ended as ended:
        sys.exit(ended.code)
    except SystemExit as ended:
        sys.exit(ended.code if ended.code in (0, EXIT_INTERRUPTED) else EXIT_ERROR)
    except Exception as error:
        message = _message(error)
        if message is None or "--debug" in sys.argv:
            traceback.print_exc()
        if message is not None:
            _err.print(f"error: {message}", highlight=False, markup=False)
        sys.exit(EXIT_ERROR)


def _message(error: Exception) -> str | None:
    """Return what the user can do about an error, None where that is for us to mend."""
    if isinstance(error, MergetuneError):  # what it quotes may be no Unicode
        return str(error).encode(errors="backslashreplace").decode()
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES) and error.filename:
        return f"{error.filename}: cannot be written or read ({error.strerror}). Name another place."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({error}). What was measured is kept: make room and run again."
    return None


if __name__ == "__main__":
    main()
