"""The study file: what is merged, searched and measured, within which budget."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mergetune.engines.engine import UNCHANGED, EngineChanges, EngineConfig, EngineKind
from mergetune.errors import MergetuneError
from mergetune.files.secret_url import SecretUrl
from mergetune.files.yaml_io import KindAlone, Strict, nearest, read_yaml, refuse_unknown
from mergetune.space.search_space_config import Grain
from mergetune.space.stack import ModelReference
from mergetune.weights.quantized import Bits
from mergetune.weights.tokenizer_files import VocabularyRule

TAKEN = {"base", "suite", "search_space"}  # what a study's record and its guards call by these names


class Budget(Strict):
    """When the search ends: as soon as one of these is spent or reached.

    Attributes:
        trials: candidates of the search, baselines not counted.
        hours: of measuring, see docs/study.md.
        items: measured on the search split, once for each candidate, baselines included.
        patience: so many candidates in a row that brought no better merge, by the rule that recommends one.
        target: scores by objective; a merge that reaches all of them and keeps every guard is enough.
    """

    trials: int = Field(40, ge=0)
    hours: float = Field(8.0, gt=0)
    items: int | None = Field(None, gt=0)
    patience: int = Field(20, ge=1)
    target: dict[str, float] = Field(default_factory=dict)


class SamplerConfig(Strict):
    """Optuna's sampler: `auto`, or the name of a class in `optuna.samplers` with its own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """Return the options for the sampler's constructor."""
        return dict(self.model_extra or {})


class WarmStartConfig(Strict):
    """Where the search starts: at the baselines, or also at points that the slopes of losses lead to.

    `auto` follows the slopes where that can be done. `grain` is how finely: the coefficients of the search
    space, or a layer group for each layer, for attention and MLP of each layer, or for each tensor (`auto`,
    unless there are very many); the sampler then searches around the points found, in the search space's
    layer groups.
    """

    kind: Literal["auto", "gradient", "none"] = "auto"
    grain: Grain = "auto"


class MlflowConfig(Strict):
    """MLflow: a parent run for the study, a child run for each candidate.

    By default MLflow's own environment variables say where: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`.
    """

    kind: Literal["mlflow"]
    tracking_uri: SecretUrl | None = None
    experiment: str | None = None


class WandbConfig(Strict):
    """Weights & Biases: one run for the study, a step for each candidate.

    By default W&B's own environment variables say where: `WANDB_PROJECT`, `WANDB_ENTITY`.
    """

    kind: Literal["wandb"]
    project: str | None = None
    entity: str | None = None


LoggerConfig = MlflowConfig | WandbConfig
_LOGGERS: dict[str, type[LoggerConfig]] = {"mlflow": MlflowConfig, "wandb": WandbConfig}


def _of_its_kind(given: object) -> object:
    if isinstance(given, dict) and (found := _LOGGERS.get(str(given.get("kind")))) is not None:
        refuse_unknown(given, found.model_fields)
    return given


_Logger = Annotated[
    Annotated[LoggerConfig, Field(discriminator="kind")], BeforeValidator(_of_its_kind), KindAlone
]


class AdapterConfig(Strict):
    """The recommended merge as one LoRA adapter of the base: exact or, where `rank` is given, the nearest."""

    rank: int | None = Field(None, ge=1)


class ExportConfig(Strict):
    """In which other forms the recommended merge is written, beside the model in `best/`."""

    adapter: AdapterConfig


class DeployConfig(Strict):
    """The recommended merge with fewer bits to a weight, as it will be deployed.

    `python` is the interpreter of an environment that has llm-compressor; by default the one that runs this.
    """

    quantize: Bits
    python: str | None = None


def _form_alone(given: object) -> object:
    if not isinstance(given, str):
        return given
    refuse_unknown([given], ExportConfig.model_fields)
    return {given: {}}


class StudyConfig(Strict):
    """The file `study.yaml`; see docs/study.md for its keys.

    `elimination` is the error level at which a candidate of the sampler is dropped on part of its items: with
    that probability at most, all of them would have put it on the front. At 0 none is dropped.

    `finalists` is how many merges, fixed before anything is looked at, are measured on the holdout
    split at the end.

    After the baselines a study stops where an objective is flat (no expert is better than the base, or all
    models score alike), since a search over it is wasted; `allow_flat_objectives` lets it go on.

    `vocabulary` says what becomes of tokens that experts added to the base's, everything else in the
    tokenizers being equal. Rows of embeddings and head are matched by token; a row of the base whose
    token an expert lacks is left as it is by that expert.

    - `refuse`: nothing; such an expert is an error.
    - `base`: the merged model has the base's tokens, and the rows of others are left out.
    - `mean`: the merged model has the base's tokens and all that were added. The row of an added
      token is the mean over the experts that have it, whatever the coefficients.

    `export: adapter`, or `export: {adapter: {rank: 32}}`, also writes the recommended merge as an adapter.
    One of a rank is measured as it will be served, and what it loses against the full merge is said.

    `deploy: {quantize: int8}`, or `fp8` or `int4`, also writes the recommended merge quantized, by
    llm-compressor. It is measured as it will be served, and what merging and what quantizing lose is said.

    `cache` is where things made once per machine are kept, such as the compiled kernel; by default this
    user's cache.

    `on_finish` is a command that is called at the end of a study, with the report's path as its last argument
    and the study's status as JSON on its standard input.

    `storage` is a database to mirror the study in, for dashboards, and `loggers` are trackers of experiments
    that are told of every candidate; see docs/watch.md. What holds a password is never written down with it.

    `training_data` names the files that experts were trained on, to find items of the suite in them.
    """

    base: ModelReference
    experts: dict[str, ModelReference] = Field(min_length=1)
    training_data: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    search_space: str
    suite: str
    vocabulary: VocabularyRule = "refuse"
    engine: Annotated[EngineConfig, KindAlone] = EngineConfig()
    budget: Budget = Budget()
    sampler: Annotated[SamplerConfig, KindAlone] = SamplerConfig()
    warm_start: Annotated[WarmStartConfig, KindAlone] = WarmStartConfig()
    elimination: float = Field(0.05, ge=0, lt=0.5)
    finalists: int = Field(3, ge=1)
    export: Annotated[ExportConfig, BeforeValidator(_form_alone)] | None = None
    deploy: DeployConfig | None = None
    cache: str | None = None
    storage: SecretUrl | None = None
    loggers: tuple[_Logger, ...] = ()
    on_finish: str | None = Field(None, min_length=1)
    allow_flat_objectives: bool = False
    seed: int = Field(0, ge=0)

    @field_validator("loggers", mode="before")
    @classmethod
    def _one_logger(cls, given: object) -> object:
        return [given] if isinstance(given, (str, dict)) else given

    @field_validator("training_data", mode="before")
    @classmethod
    def _one_file(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: [files] if isinstance(files, str) else files for name, files in data.items()}

    @field_validator("training_data")
    @classmethod
    def _of_experts(
        cls, data: dict[str, tuple[str, ...]], info: ValidationInfo
    ) -> dict[str, tuple[str, ...]]:
        refuse_unknown(data, info.data.get("experts", data))  # absent where it is itself in error
        return data

    @field_validator("on_finish")
    @classmethod
    def _has_words(cls, command: str | None) -> str | None:
        if command is not None:
            shlex.split(command)  # a quote that is not closed is a ValueError
        return command

    @model_validator(mode="after")
    def _names_are_plain(self) -> StudyConfig:
        for name in self.experts:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"an expert's name must be letters, digits, `-` and `_`, but got `{name}`")
            if name in TAKEN:
                raise ValueError(
                    f"an expert cannot be called `{name}`, which names something else of a study"
                )
        return self


class _EngineFile(Strict):
    """A file whose `engine` alone is read, such as a study file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    engine: Annotated[EngineConfig, KindAlone]


def engine_options(given: str, changes: EngineChanges = UNCHANGED) -> EngineConfig:
    """Return the options that `--engine` gives, a kind or the `engine` of a file, with others in their place.

    Raises:
        MergetuneError: it is neither, or the file's `engine` breaks a rule.
    """
    if given.endswith((".yaml", ".yml")):
        return changes.put_into(read_yaml(Path(given), _EngineFile).engine)
    kinds: dict[str, EngineKind] = {kind: kind for kind in get_args(EngineKind)}
    if given not in kinds:
        raise MergetuneError(
            f"--engine must be {', '.join(kinds)} or a YAML file with `engine`, but got `{given}`."
            f"{nearest(given, kinds)}"
        )
    return changes.put_into(EngineConfig(kind=kinds[given]))


def read_study(path: Path) -> StudyConfig:
    """Read a study file; raises `MergetuneError` as `read_yaml` does."""
    return read_yaml(path, StudyConfig)
