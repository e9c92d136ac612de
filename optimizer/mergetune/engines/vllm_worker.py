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
from mergetune.merging.merger import Merge, Merger
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

        Each rank merges only what its part of the model takes. Returns the recipe's `digest`, `merge_s`,
        `load_s` and `read_bytes`, how much of the base and the experts was merged; or `error`, a message,
        with `of_trial` for coefficients that cannot be merged. The model is whole even then, but no
        candidate, on this rank or any other.
        """
        wanted, began = MergeRecipe.model_validate_json(recipe), time.perf_counter()
        try:
            with self._mergetune_threads():
                merge = self.mergetune_merger.start(wanted)
                planned = time.perf_counter()
                self.reload_weights(weights_iterator=self._mergetune_tensors(merge, Path(progress)))
            self._mergetune_renew_tied_head()
            merge.check()
        except MergetuneError as error:
            return {"error": str(error), "of_trial": isinstance(error, TrialError)}
        merge_s = planned - began + merge.part_s
        load_time = LoadTime(merge_s, time.perf_counter() - began - merge_s)
        return {"digest": wanted.digest, **asdict(load_time), "read_bytes": merge.read_bytes}

    def _mergetune_tensors(self, merge: Merge, progress: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors that are merged where vLLM copies them, and say how far it is, once a second."""
        names, told = self.mergetune_merger.base.names, 0.0
        for i, name in enumerate(names, start=1):
            if (now := time.monotonic()) - told >= 1:  # a long merge is no hang
                progress.write_text(f"tensor {i} of {len(names)}", encoding="utf-8")
                told = now
            yield name, merge.deferred(name)

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
