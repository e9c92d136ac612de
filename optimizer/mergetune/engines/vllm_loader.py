"""How vLLM reads a stack: from the files of its models, where a directory has no weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mergetune.engines.vllm_arguments import STACK_FORMAT
from mergetune.weights.tensor_files import open_weights


@register_model_loader(STACK_FORMAT)
class StackLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM need not be installed
    """vLLM's loader with the weights of a stack."""

    def get_all_weights(self, model_config: Any, _model: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by its name in the stack."""
        files = open_weights(Path(model_config.model))
        yield from ((name, files.view(name)) for name in files.names)
