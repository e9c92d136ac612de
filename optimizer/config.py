"""The study file: what is merged, searched and measured, within which budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from optimizer.engines.engine import EngineConfig
from optimizer.yaml_io import Strict, read_yaml


class Budget(Strict):
    """When the search ends: after so many trials (baselines not counted) or so many hours."""

    trials: int = Field(40, ge=0)
    hours: float = Field(8.0, gt=0)


class SamplerConfig(Strict):
    """Optuna's sampler: `auto`, or the name of a class in `optuna.samplers` with its own options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """Return the options for the sampler's constructor."""
        return dict(self.model_extra or {})


class StudyConfig(Strict):
    """The file `study.yaml`; see README for its keys."""

    base: str
    experts: dict[str, str] = Field(min_length=1)
    search_space: str
    suite: str
    engine: EngineConfig = EngineConfig()
    budget: Budget = Budget()
    sampler: SamplerConfig = SamplerConfig()
    seed: int = Field(0, ge=0)

    @field_validator("sampler", mode="before")
    @classmethod
    def _kind_alone(cls, sampler: object) -> object:
        return {"kind": sampler} if isinstance(sampler, str) else sampler

    @model_validator(mode="after")
    def _names_are_plain(self) -> StudyConfig:
        for name in self.experts:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"an expert's name must be letters, digits, `-` and `_`, but got `{name}`")
        return self


def read_study(path: Path) -> StudyConfig:
    """Read a study file; raises `MergetuneError` as `read_yaml` does."""
    return read_yaml(path, StudyConfig)
