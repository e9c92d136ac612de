"""What every engine does: take a candidate's weights in place, and be lm-eval's model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from optimizer.yaml_io import Strict

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import Tensor


class EngineConfig(Strict):
    """The study file's `engine`.

    `device: auto` takes CUDA where there is one; `dtype: auto` the base's own. `max_length` bounds
    prompt and reply together, in tokens.
    """

    kind: Literal["auto", "transformers"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(32, gt=0)
    max_length: int | None = Field(None, gt=0)


class Engine(Protocol):
    """A living inference process: built once a study, its weights swapped for every candidate."""

    @property
    def lm(self) -> LM:
        """The model as lm-eval sees it, always with the weights loaded last."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The tensors that a candidate may be merged into directly, before `load` is told of them."""
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put these weights in place of the present ones.

        Args:
            tensors: every tensor of the model by its name in the base's checkpoint (a tied head left
                out), full and unsharded.

        Raises:
            MergetuneError: a tensor is missing, unknown or of another shape.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory and end its processes."""
        ...
