"""The plan of a study: everything that its file names, read and checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergetune.engines.engine import UNCHANGED, EngineChanges
from mergetune.errors import MergetuneError
from mergetune.evaluation.leakage import read_training_texts
from mergetune.evaluation.suite import Suite, read_suite
from mergetune.files.library import find, placed
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.results.config import DeployConfig, LoggerConfig, MlflowConfig, StudyConfig, read_study
from mergetune.results.run_dir import RunDir, StudyRecord
from mergetune.space.search_space_config import SearchSpaceConfig, read_search_space
from mergetune.study.search import check_sampler
from mergetune.weights.models import check_reference, find_model, reference_to


@dataclass(frozen=True)
class Plan:
    """A study file with everything it names read and checked; no model was opened yet."""

    config: StudyConfig
    folder: Path
    space: SearchSpaceConfig
    suite: Suite

    @classmethod
    def read(cls, study_file: Path, engine: EngineChanges = UNCHANGED) -> Plan:
        """Read a study file and check all that can be checked without a model.

        `engine` takes the place of options in the file.

        Raises:
            MergetuneError: something is missing, misspelt or does not fit together.
        """
        config = read_study(study_file)
        config = config.model_copy(update={"engine": engine.put_into(config.engine)})
        return cls._checked(config, study_file)

    @classmethod
    def read_of_run(cls, run: RunDir, suite: Path) -> Plan:
        """Read the study of a run directory with another suite; raises as `read` does."""
        study_file = run.path / "study.yaml"
        return cls._checked(read_study(study_file).model_copy(update={"suite": str(suite)}), study_file)

    @classmethod
    def _checked(cls, config: StudyConfig, study_file: Path) -> Plan:
        folder = study_file.resolve().parent
        space = read_search_space(find("search_spaces", config.search_space, folder))
        suite = read_suite(find("evals", config.suite, folder))
        check_sampler(config.sampler)
        for reference in [config.base, *config.experts.values()]:
            check_reference(reference, folder)
        for path in (path for files in _training_files(config, folder).values() for path in files):
            if not path.is_file():
                raise MergetuneError(
                    f"{path}: there is no such file. Give `training_data` as paths relative to {folder}."
                )
        if config.warm_start.grain not in ("auto", "search_space") and space.anchors is not None:
            raise MergetuneError(
                f"{study_file}: `warm_start.grain: {config.warm_start.grain}` needs a search space of layer "
                f"groups, but `{config.search_space}` has anchors. Take another one, or leave `grain` out."
            )
        for name in config.budget.target:
            if name not in suite.config.objectives:
                objectives = ", ".join(suite.config.objectives)
                raise MergetuneError(
                    f"{study_file}: `budget.target` must name objectives of the suite, {objectives}, but got "
                    f"`{name}`."
                )
        for name, guard in suite.config.guards.items():
            if guard.reference not in {"base", *config.experts}:
                raise MergetuneError(
                    f"{suite.path}: the guard `{name}` refers to `{guard.reference}`, but must refer "
                    f"to `base` or an expert: {', '.join(config.experts)}."
                )
        return cls(config, folder, space, suite)

    @property
    def cache(self) -> Path | None:
        """The folder that the study file names as its cache, absolute."""
        given = self.config.cache
        return None if given is None else placed(self.folder, given).resolve()

    @property
    def deploy(self) -> DeployConfig | None:
        """How the recommended merge is deployed; the Python's path is absolute."""
        given = self.config.deploy
        if given is None or given.python is None:
            return given
        # no symbolic link is followed: that of an environment tells Python which one it is
        return given.model_copy(update={"python": str(placed(self.folder, given.python).absolute())})

    @property
    def storage(self) -> str | None:
        """The database that the study is mirrored in."""
        return self._placed_url(self.config.storage)

    @property
    def loggers(self) -> tuple[LoggerConfig, ...]:
        """The trackers of experiments."""
        return tuple(
            each.model_copy(update={"tracking_uri": self._placed_url(each.tracking_uri)})
            if isinstance(each, MlflowConfig)
            else each
            for each in self.config.loggers
        )

    def _placed_url(self, url: str | None) -> str | None:
        """Return a URL; the file of SQLite is relative to the study file."""
        begin, _, file = (url or "").partition(":///")
        is_file = begin.startswith("sqlite") and file and not file.startswith((":memory:", "file:", "/"))
        return f"{begin}:///{placed(self.folder, file).resolve()}" if is_file else url

    def training_texts(self) -> dict[str, list[str]]:
        """Read what each expert was trained on, as far as the study file names it.

        Raises:
            MergetuneError: a file cannot be read, or a line is not JSON; the message names it.
        """
        files = _training_files(self.config, self.folder)
        return {
            name: [text for path in paths for text in read_training_texts(path)]
            for name, paths in files.items()
        }

    def open_inputs(self, out: Path | None = None, say: Callable[[str], object] = lambda _: None) -> Inputs:
        """Fetch, open and check the models.

        With `vocabulary: mean` a base with more tokens is written to the run directory `out`. The chat
        template is that of the suite's file or the base, or else of the experts. `say` is told what is done.

        Raises:
            MergetuneError: the models cannot be had or merged, or the suite has conversations and there is
                no chat template, or several to choose from.
        """
        base = find_model(self.config.base, self.folder)
        experts = {
            name: find_model(reference, self.folder) for name, reference in self.config.experts.items()
        }
        run = None if out is None else RunDir(out)
        if run is not None:
            run.check_own()
        extended = None if run is None else run.extended_base
        inputs = open_inputs(base, experts, self.config.vocabulary, extended, say)
        say("reading the weights of every model once")
        inputs.read_digests()
        return inputs.with_chat(self.suite.config.chat_template)

    def record(self, inputs: Inputs, rules: str) -> StudyRecord:
        """Return what the run directory keeps of the study: hub ids pinned, absolute paths, digests.

        `rules` is that of everything that makes a score; see `Evaluator.rules`.
        """
        sources = {"base": inputs.base_source, **inputs.expert_sources}
        space_text = self.space.model_dump_json(by_alias=True)
        return StudyRecord(
            **self.config.model_dump(
                exclude={
                    *("base", "experts", "training_data", "search_space", "suite", "cache"),
                    *("storage", "loggers", "deploy"),
                }
            ),
            cache=str(self.cache) if self.cache else None,
            deploy=self.deploy,
            storage=self.storage,
            loggers=self.loggers,
            base=reference_to(inputs.given or inputs.base.folder),
            experts={name: sources[name].path for name in self.config.experts},
            training_data={
                name: tuple(map(str, paths))
                for name, paths in _training_files(self.config, self.folder).items()
            },
            search_space=str(find("search_spaces", self.config.search_space, self.folder)),
            suite=str(self.suite.path),
            suite_name=self.suite.name,
            suite_config=self.suite.config,
            digests={
                "suite": self.suite.digest,
                "rules": rules,
                "search_space": hashlib.sha256(space_text.encode()).hexdigest(),
                **{name: source.digest or "" for name, source in sources.items()},
            },
        )


def _training_files(config: StudyConfig, folder: Path) -> dict[str, list[Path]]:
    """Return the files that each expert was trained on, as absolute paths."""
    return {
        name: [placed(folder, file).resolve() for file in files]
        for name, files in config.training_data.items()
    }
