"""What runs inside each of vLLM's workers: the merger, so that only recipes travel."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mergetune.engines.vllm_loader  # noqa: F401 (vLLM then knows how a stack is read)
from mergetune.engines.engine import LoadTime
from mergetune.errors import MergetuneError, TrialError
from mergetune.merging.inputs import ModelPaths
from mergetune.merging.merger import Merger
from mergetune.space.recipe import MergeRecipe


class MergeWorker:
    """Mixed into vLLM's worker class (`worker_extension_cls`); its methods are called by name.

    Arguments and results are plain JSON, so that they pass a server, too. An error in a method would
    end the engine: it is returned instead.
    """

    # of vLLM's worker
    reload_weights: Any
    model_runner: Any
    device: Any
    parallel_config: Any

    mergetune_merger: Merger

    def mergetune_open(self, paths: str) -> None:
        """Open the models that recipes name."""
        self.mergetune_merger = ModelPaths.model_validate_json(paths).open().merger

    def mergetune_load(self, recipe: str, progress: str) -> dict[str, Any]:
        """Merge a recipe into the living model; `progress` is a file that says how far it is.

        Returns the recipe's `digest`, `merge_s` and `load_s`; or `error`, a message, with `of_trial`
        for coefficients that cannot be merged. The model is whole even then, but no candidate.
        """
        wanted = MergeRecipe.model_validate_json(recipe)
        merged = _Whole(self.mergetune_merger, wanted, Path(progress))
        with self._mergetune_threads():
            time = LoadTime.of(lambda tensors: self.reload_weights(weights_iterator=tensors), iter(merged))
        self._mergetune_renew_tied_head()
        if merged.error is not None:
            return {"error": str(merged.error), "of_trial": isinstance(merged.error, TrialError)}
        return {"digest": wanted.digest, **asdict(time)}

    @contextmanager
    def _mergetune_threads(self) -> Iterator[None]:
        """Merge with this worker's share of the cores: a GPU's worker leaves itself one."""
        threads = torch.get_num_threads()
        if self.device.type != "cpu":
            n_cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, n_cores // self.parallel_config.world_size))
        try:
            yield
        finally:
            if self.device.type != "cpu":
                torch.set_num_threads(threads)

    def _mergetune_renew_tied_head(self) -> None:
        """Let the head follow the embeddings: on a CPU it computes with a packed copy of its own.

        vLLM's reload does not renew it (0.32), and the log-probabilities would be off by nats.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        model = self.model_runner.get_model()
        if not getattr(model.config, "tie_word_embeddings", False):
            return
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


class _Whole:
    """The tensors of a merge; where it fails the base's follow, for half a reload ruins a model."""

    def __init__(self, merger: Merger, recipe: MergeRecipe, progress: Path) -> None:
        self._merger, self._recipe, self._progress = merger, recipe, progress
        self._told = 0.0
        self.error: MergetuneError | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        base, yielded = self._merger.base, set()
        try:
            for name, tensor in self._merger.merge(self._recipe):
                yielded.add(name)
                self._tell(f"tensor {len(yielded)} of {len(base.names)}")
                yield name, tensor
        except MergetuneError as error:
            self.error = error
            for name in base.names:
                if name not in yielded:
                    yield name, base.view(name)

    def _tell(self, what: str) -> None:
        """Say how far it is, once a second: a long merge is no hang."""
        if (now := time.monotonic()) - self._told >= 1:
            self._progress.write_text(what, encoding="utf-8")
            self._told = now
