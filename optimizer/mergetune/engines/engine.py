"""What every engine does: take a candidate's weights in place, and be lm-eval's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from mergetune.files.yaml_io import Strict, validate

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import Tensor

    from mergetune.space.recipe import MergeRecipe

EngineKind = Literal["auto", "transformers", "vllm"]


class EngineConfig(Strict):
    """The study file's `engine`.

    `dtype: auto` is the base's own; `max_length` bounds prompt and reply together, in tokens;
    `batch_size` is how many items are worked on at a time, by default 32 in transformers and as many
    as fit in vLLM.

    `workers` is how many engines work side by side, each on a GPU (or `tensor_parallel_size` of them) or a
    share of the cores, in a Ray cluster: that at `ray_address` (`auto` finds the one that runs on this
    machine), or one of this machine alone. Null is one engine in this process, without Ray.

    `device` is `auto`, which takes CUDA where there is one, `cpu`, `cuda` or one GPU, such as `cuda:1`; vLLM
    computes on what it was built for. A model that fits no GPU alone is spread over all by transformers.

    With vLLM alone: `gpu_memory_utilization` is the share of a GPU's memory to take; `kv_cache_gib`
    says instead how much the cache of keys and values has, 4 GiB by default on a CPU.
    `enforce_eager: null` compiles the model on GPUs only; on a CPU that takes 90 s for a small model,
    once, and makes it faster. `timeout_s` is how long the engine may be silent while it works before
    it is taken for hung. `arguments` are any others of vLLM's `EngineArgs` by name.
    """

    kind: EngineKind = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_length: int | None = Field(None, gt=0)
    batch_size: int | None = Field(None, gt=0)

    device: str = "auto"
    workers: int | None = Field(None, gt=0)
    ray_address: str | None = Field(None, min_length=1)

    tensor_parallel_size: int = Field(1, gt=0)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_gib: float | None = Field(None, gt=0)
    enforce_eager: bool | None = None
    seed: int = Field(0, ge=0)
    timeout_s: float = Field(600, gt=0)
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, data: object) -> object:
        """Leave out what 0.1.0 wrote down of an option that is gone, where it was not used."""
        if isinstance(data, dict) and data.get("server", data) is None:
            return {key: value for key, value in data.items() if key != "server"}
        return data

    @model_validator(mode="after")
    def _suits_kind(self) -> EngineConfig:
        fields = type(self).model_fields
        for name in _OF_VLLM if self.kind == "transformers" else ():
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise ValueError(f"`{name}` is no option of `kind: {self.kind}`; leave it out")
        if self.ray_address is not None and self.workers is None:
            raise ValueError("`ray_address` needs `workers`: how many engines to start there")
        if self.workers is not None and ":" in self.device:
            raise ValueError(f"`device: {self.device}` is one GPU, but `workers` choose theirs; leave it out")
        return self


_OF_VLLM = (
    *("tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager"),
    *("seed", "timeout_s", "arguments"),
)


@dataclass(frozen=True)
class EngineChanges:
    """Options given beside a file that has them, too; None leaves those of the file."""

    kind: EngineKind | None = None
    batch_size: int | None = None
    workers: int | None = None
    ray_address: str | None = None

    def put_into(self, config: EngineConfig) -> EngineConfig:
        """Return the options with these in their place.

        Raises:
            MergetuneError: they do not go together.
        """
        changes = {name: value for name, value in asdict(self).items() if value is not None}
        return validate({**config.model_dump(), **changes}, EngineConfig, "The engine's options")


UNCHANGED = EngineChanges()


@dataclass(frozen=True)
class LoadTime:
    """How long it took to merge a candidate and to put it in the engine, in seconds."""

    merge_s: float
    load_s: float

    @classmethod
    def of(
        cls, load: Callable[[Iterator[tuple[str, Tensor]]], None], tensors: Iterator[tuple[str, Tensor]]
    ) -> LoadTime:
        """Load tensors that are merged while they are iterated over, and tell the two times apart."""
        merge_s, start = 0.0, time.perf_counter()

        def watched() -> Iterator[tuple[str, Tensor]]:
            nonlocal merge_s
            while True:
                asked = time.perf_counter()
                item = next(tensors, None)
                merge_s += time.perf_counter() - asked
                if item is None:
                    return
                yield item

        load(watched())
        return cls(merge_s, time.perf_counter() - start - merge_s)


class Engine(Protocol):
    """A living inference process: built once a study, its weights swapped for every candidate."""

    @property
    def lm(self) -> LM:
        """The model as lm-eval sees it, always with the weights loaded last."""
        ...

    def load(self, recipe: MergeRecipe) -> LoadTime:
        """Merge a recipe and put it in place of the present weights.

        Raises:
            TrialError: these coefficients make a weight infinite or NaN.
            EngineError: the engine broke; start another.
            MergetuneError: the recipe does not fit the models, or these do not fit the engine.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory and end its processes."""
        ...
