"""The plan of a soup: what goes into it and how it is judged, checked before any work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import Split, Suite, read_suite
from mergetune.files.library import find
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.results.config import TAKEN, Budget, StudyConfig
from mergetune.results.roles import BASE
from mergetune.space.search_space_config import read_search_space
from mergetune.study.plan import Plan
from mergetune.weights.adapter import is_adapter
from mergetune.weights.checkpoint import FullExpert
from mergetune.weights.models import check_reference, find_model
from mergetune.weights.tokenizer_files import VocabularyRule
from mergetune.weights.writer import check_replaceable

SplitChoice = Literal["search", "holdout", "all"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # as transformers' Trainer names them, by the step
_AUTO = EngineConfig()
_SPACE = "task_arithmetic"  # what the soup's run directory would be searched in, as a study


@dataclass(frozen=True)
class SoupPlan:
    """A soup with everything that its command names read and checked; no model was opened yet.

    Attributes:
        out: the model directory to write.
        models: the ingredients' references, by name.
        base: the base's reference; None where the ingredients are full models.
        study: what a greedy soup is, a study that searches nothing; None for the uniform soup.
        splits: the items that a greedy soup is chosen on.
        vocabulary: what becomes of tokens that models added; see `StudyConfig`.
    """

    out: Path
    models: Mapping[str, str]
    base: str | None
    study: Plan | None
    splits: tuple[Split, ...]
    vocabulary: VocabularyRule = "refuse"

    @classmethod
    def read(
        cls,
        out: Path,
        models: Sequence[str],
        base: str | None = None,
        last: int | None = None,
        suite: str | None = None,
        split: SplitChoice = "search",
        engine: EngineConfig = _AUTO,
        vocabulary: VocabularyRule = "refuse",
    ) -> SoupPlan:
        """Check all that can be checked without a model; paths are relative to this folder.

        Raises:
            MergetuneError: something is missing or does not fit together.
        """
        here = Path()
        if last is not None:
            if len(models) != 1:
                raise MergetuneError(f"--last takes the folder of one training run, but got {len(models)}.")
            models = [str(folder) for folder in last_checkpoints(Path(models[0]).expanduser(), last)]
        if len(models) < 2:
            raise MergetuneError(
                "A soup takes two models or more, but got 1. Give more, or --last N with the folder "
                "of a training run."
            )
        for reference in [*models, *([base] if base else [])]:
            check_reference(reference, here)
        named = dict(zip(_names(models), models, strict=True))
        if suite is None:
            return cls(out.resolve(), named, base, None, (), vocabulary)
        found = read_suite(find("evals", suite, here))
        _check_guards(found, named, base)
        study = _study(base or models[0], named, found, engine)
        return cls(out.resolve(), named, base, study, _splits(found, split), vocabulary)

    def open_inputs(self, say: Callable[[str], object] = lambda _: None) -> Inputs:
        """Fetch, open and check the models; without a base, the first gives layout and tokenizer.

        `say` is told what is done.

        Raises:
            MergetuneError: a model cannot be had or does not fit the others, an adapter came without
                its base, there is no chat template for the suite's conversations, or writing the soup
                would replace what it is made of.
        """
        chat = self.study.suite.config.chat_template if self.study else False
        folders = {name: find_model(reference, Path()) for name, reference in self.models.items()}
        if self.base is not None:
            base = find_model(self.base, Path())
            _check_out(self.out, [base, *folders.values()])
            return open_inputs(base, folders, self.vocabulary, say=say).with_chat(chat)
        _check_out(self.out, folders.values())
        adapters = [path for path in folders.values() if is_adapter(path)]
        if adapters:
            raise MergetuneError(f"{adapters[0]}: is an adapter. Name the model it belongs to with --base.")
        first, *others = folders
        rest = {name: folders[name] for name in others}
        inputs = open_inputs(folders[first], rest, self.vocabulary, say=say).with_chat(chat)
        return replace(
            inputs,
            experts=(FullExpert(first, inputs.base), *inputs.experts),
            norms={first: 0.0, **inputs.norms},
        )


def last_checkpoints(training_run: Path, count: int) -> list[Path]:
    """Return the last checkpoints that transformers' Trainer left in a folder, in the order of steps.

    Raises:
        MergetuneError: there is no such folder, or it holds fewer.
    """
    if not training_run.is_dir():
        raise MergetuneError(f"{training_run}: is no directory, but --last takes a training run's folder.")
    steps = {
        int(match[1]): path
        for path in training_run.iterdir()
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    }
    if len(steps) < count:
        present = ", ".join(steps[step].name for step in sorted(steps)) or "none"
        raise MergetuneError(
            f"{training_run}: --last {count} takes {count} folders named checkpoint-STEP, but there "
            f"are {len(steps)} ({present}). Give a smaller number or the training run's `output_dir`."
        )
    return [steps[step] for step in sorted(steps)[-count:]]


def _study(base: str, models: Mapping[str, str], suite: Suite, engine: EngineConfig) -> Plan:
    config = StudyConfig(
        base=base,
        experts=dict(models),
        search_space=_SPACE,
        suite=str(suite.path),
        engine=engine,
        budget=Budget(trials=0),
    )
    return Plan(config, Path(), read_search_space(find("search_spaces", _SPACE, Path())), suite)


def _names(references: Sequence[str]) -> list[str]:
    """Name models by the ends of their paths, as much of them as it takes to tell them apart."""
    paths = [Path(reference).expanduser() for reference in references]
    parts = [(path.resolve() if path.is_dir() else path).parts for path in paths]
    if len(set(parts)) == len(parts):
        for length in range(1, max(map(len, parts)) + 1):
            names = [_plain("-".join(own[-length:])) for own in parts]
            if len(set(names)) == len(names) and not TAKEN.intersection(names):
                return names
    raise MergetuneError(f"The models of a soup must differ, but these do not: {', '.join(references)}.")


def _plain(text: str) -> str:
    """Replace what a study's names may not hold."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text)


def _splits(suite: Suite, split: SplitChoice) -> tuple[Split, ...]:
    if suite.config.holdout == 0:
        if split == "holdout":
            raise MergetuneError(f"{suite.path}: has `holdout: 0`, and so no items for --split holdout.")
        return ("search",)
    return ("search", "holdout") if split == "all" else (split,)


def _check_guards(suite: Suite, models: Mapping[str, str], base: str | None) -> None:
    for name, guard in suite.config.guards.items():
        if guard.reference == BASE and base is None:
            raise MergetuneError(
                f"{suite.path}: the guard `{name}` compares with the base. Name it with --base."
            )
        if guard.reference not in {BASE, *models}:
            raise MergetuneError(
                f"{suite.path}: the guard `{name}` refers to `{guard.reference}`, but must refer to "
                f"`base` or a model of the soup: {', '.join(models)}."
            )


def _check_out(out: Path, sources: Iterable[Path]) -> None:
    """Refuse before the work what cannot be replaced after it."""
    if lost := [source for source in sources if source.is_relative_to(out)]:
        raise MergetuneError(
            f"{out}: would be replaced, but holds {lost[0]}, which the soup is made of. Give another "
            "output directory."
        )
    check_replaceable(out)
